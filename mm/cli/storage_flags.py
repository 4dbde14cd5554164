"""Flags of commands that take stores in object storage."""

from __future__ import annotations

from pydantic import Field

from mm.config.flags import Flags
from mm.config.storage import Storage


class StorageFlags(Flags):
    """Access to stores in object storage (`s3://...`); see `mm.config.storage.Storage`."""

    cache: str | None = Field(
        None, description="s3://: folder that keeps what was read; else in the user's cache folder"
    )
    cache_gigabytes: float = Field(50.0, gt=0, description="s3://: the most that it keeps, in 10^9 bytes")
    request_timeout: float = Field(60.0, gt=0, description="s3://: seconds for one request")
    give_up_after: float = Field(120.0, ge=0, description="s3://: seconds of trying again before it is an error")
    endpoint_url: str | None = Field(None, description="s3://: another storage than Amazon's; else AWS_ENDPOINT_URL")
    region_name: str | None = Field(None, description="s3://: region, where it must be said; else AWS_DEFAULT_REGION")
    anonymous: bool = Field(False, description="s3://: ask without credentials, as public buckets allow")

    def storage(self) -> Storage:
        """The flags as a section."""
        return Storage(**{name: getattr(self, name) for name in Storage.model_fields})
