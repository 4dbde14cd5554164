"""Places of feature stores: folders, or prefixes of object storage with how that is read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import Field

from mm.config.base import Section
from mm.errors import ConfigError

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


class Storage(Section):
    """Access to object storage. Credentials come from where its library looks for them, as the environment.

    Attributes:
        cache: folder that keeps what was read; None: `mm-wan/storage` in the user's cache folder.
        cache_gigabytes: the most that it keeps, in 10^9 bytes; what was used longest ago goes first.
        request_timeout: seconds for one request.
        give_up_after: seconds of trying one read or write again before it is an error.
        endpoint_url: of another storage than Amazon's; None: `AWS_ENDPOINT_URL`, where it is set.
        region_name: where the storage cannot do without; None: `AWS_DEFAULT_REGION`, where it is set.
        anonymous: ask without credentials, as public buckets allow.
    """

    cache: str | None = Field(None, min_length=1)
    cache_gigabytes: float = Field(50.0, gt=0)
    request_timeout: float = Field(60.0, gt=0)
    give_up_after: float = Field(120.0, ge=0)
    endpoint_url: str | None = Field(None, pattern=r"^https?://")
    region_name: str | None = Field(None, min_length=1)
    anonymous: bool = False


@dataclass(frozen=True, slots=True)
class Remote:
    """A prefix or an object of object storage.

    Attributes:
        url: such as `s3://bucket/prefix`, without a slash at its end. storage: how it is read.
    """

    url: str
    storage: Storage

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.url}/{name}", self.storage)

    def __str__(self) -> str:
        return self.url

    @property
    def protocol(self) -> str:
        """Words before `://`."""
        return self.url.partition("://")[0]

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> Remote:
        """The address without its last part."""
        return Remote(self.url.rpartition("/")[0], self.storage)


Location = Path | Remote
"""A local path, or one of object storage."""

LocationT = TypeVar("LocationT", Path, Remote, Location)


def is_address(text: str) -> bool:
    """Tell whether a text is an address (`s3://...`) and no path."""
    return _ADDRESS.fullmatch(text) is not None


def location_of(text: str, storage: Storage) -> Location:
    """The place that a text names: a path, an address, or a path as an address (`file://...`).

    Raises:
        ConfigError: CFG-230 for an address without a bucket, or with a part that none can have.
    """
    found = _ADDRESS.fullmatch(text)
    if found is None:
        return Path(text)
    protocol, rest = found[1].lower(), found[2].rstrip("/")
    if protocol == "file":
        return Path(rest or "/")
    if not rest or rest.startswith("/") or {"", ".", ".."} & set(rest.split("/")) or not rest.isprintable():
        remedy = "Give PROTOCOL://BUCKET/PREFIX, such as s3://bucket/stores/a."
        raise ConfigError("CFG-230", f"{text!r} is no address of object storage.", remedy)
    return Remote(f"{protocol}://{rest}", storage)
