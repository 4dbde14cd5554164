"""Clients of object storage: which errors are final, and trying again where they are not."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, TypeVar

from mm.config.storage import Remote, Storage
from mm.errors import DataError

log = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_WAIT = 0.2
_LONGEST_WAIT = 20.0
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "CredentialRetrievalError")
_REFUSED = frozenset(
    [
        "403",
        "401",
        "AccessDenied",
        "AllAccessDisabled",
        "AccountProblem",
        "ExpiredToken",
        "Forbidden",
        "InvalidAccessKeyId",
        "InvalidToken",
        "SignatureDoesNotMatch",
        "RequestTimeTooSkewed",
        "TokenRefreshRequired",
    ]
)
_WRONG = frozenset(["InvalidBucketName", "PermanentRedirect", "AuthorizationHeaderMalformed", "NoSuchUpload"])


class MissingObjectError(FileNotFoundError):
    """An object, or a prefix, that is not there."""


def attempt(place: Remote, call: Callable[[Any], T]) -> T:
    """Do something with the client of a place, again and again where that can help, with longer and longer pauses.

    Args:
        place: which is worked on, for messages too. call: given the client (of fsspec).

    Raises:
        MissingObjectError: there is no such object.
        DataError: DATA-180 without the library, DATA-181 without credentials, DATA-182 where access is refused,
            DATA-183 for a bucket that is not there, DATA-184 for what the storage calls wrong in itself, DATA-185
            where it kept failing.
    """
    from_library = _library(place)
    client = client_of(place)
    began, storage = time.monotonic(), place.storage
    retrying = from_library.Retrying(
        retry=from_library.retry_if_exception(lambda error: _may_pass(error, place)),
        wait=from_library.wait_random_exponential(_FIRST_WAIT, _LONGEST_WAIT),  # between 0 and 0.2, 0.4, 0.8, ... s
        stop=from_library.stop_after_delay(storage.give_up_after),
        before_sleep=lambda state: _tell(place, state),
        reraise=True,
    )
    try:
        return retrying(call, client)
    except Exception as error:
        final = final_error(error, place)
        if final is not None:
            raise final from None
        if not _may_pass(error, place):
            raise
        tries, seconds = retrying.statistics["attempt_number"], time.monotonic() - began
        message = f"{place} could not be reached: the storage said {_said(error)}, {tries} times in {seconds:.0f} s."
        remedy = "Start again when it answers; storage.give_up_after is how long to try, request_timeout one request."
        raise DataError("DATA-185", message, remedy) from None


def client_of(place: Remote) -> Any:
    """The client of this process for a place.

    Raises:
        DataError: DATA-180.
    """
    _library(place)
    return _client(place.protocol, place.storage.model_copy(update={"cache": None}), os.getpid())


def final_error(error: Exception, place: Remote) -> Exception | None:
    """The error to tell where trying again cannot help; None where it may."""
    if isinstance(error, DataError | MissingObjectError):
        return error
    chain = list(_chain(error))
    codes = {_code(one) for one in chain}
    names = {type(one).__name__ for one in chain}
    if names & set(_NO_CREDENTIALS):
        remedy = (
            "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; storage.anonymous of a public bucket."
        )
        return DataError("DATA-181", f"{place}: there are no credentials for it ({_said(error)}).", remedy)
    if "NoSuchBucket" in codes:
        return DataError("DATA-183", f"{place}: its bucket does not exist.", "Correct the address, or the endpoint.")
    if codes & _REFUSED or isinstance(error, PermissionError):
        remedy = "Correct the credentials, or let them read it (GetObject, ListBucket); for copies PutObject too."
        return DataError("DATA-182", f"{place}: access is refused ({_said(error)}).", remedy)
    if isinstance(error, FileNotFoundError):
        return MissingObjectError(f"{place} does not exist")
    if codes & _WRONG or names & {"ParamValidationError", "InvalidEndpointBeginningError"}:
        remedy = "Correct the address, the endpoint or the region."
        return DataError("DATA-184", f"{place}: the storage takes no such request ({_said(error)}).", remedy)
    return None


@lru_cache(maxsize=32)
def _client(protocol: str, storage: Storage, process: int) -> Any:
    """A client; one of a process that this one was forked from would wait for threads that are not there."""
    import fsspec

    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if protocol in ("s3", "s3a"):
        seconds = storage.request_timeout
        retries = {"total_max_attempts": 1, "mode": "standard"}  # trying again is done here, where it is told
        options["config_kwargs"] = {"connect_timeout": seconds, "read_timeout": seconds, "retries": retries}
        options["anon"] = storage.anonymous
        if storage.endpoint_url is not None:
            options["endpoint_url"] = storage.endpoint_url
        if storage.region_name is not None:
            options["client_kwargs"] = {"region_name": storage.region_name}
    client = fsspec.filesystem(protocol, **options)
    if hasattr(client, "retries"):
        client.retries = 1
    return client


def _library(place: Remote) -> Any:
    """The library that tries again, where that and the one of the place's protocol are installed."""
    try:
        import fsspec
        import tenacity

        fsspec.get_filesystem_class(place.protocol)
    except ImportError as error:
        remedy = 'Install it: pip install "mm-wan[s3]", or what fsspec needs for another storage.'
        raise DataError("DATA-180", f"{place} cannot be read without a library: {error}.", remedy) from None
    except ValueError:
        message = f"{place}: fsspec knows no storage {place.protocol}://."
        raise DataError("DATA-180", message, "Use s3://, or a path.") from None
    return tenacity


def _may_pass(error: BaseException, place: Remote) -> bool:
    """Tell whether trying again may help; defects of this program are none of the storage."""
    if not isinstance(error, Exception) or final_error(error, place) is not None:
        return False
    of_storage = type(error).__module__.partition(".")[0] in {"botocore", "aiobotocore", "aiohttp", "fsspec", "s3fs"}
    return of_storage or isinstance(error, OSError | EOFError | asyncio.TimeoutError)


def _tell(place: Remote, state: Any) -> None:
    error, pause = state.outcome.exception(), state.next_action.sleep
    log.warning("%s: %s; try %d follows in %.1f s", place, _said(error), state.attempt_number + 1, pause)


def _said(error: BaseException) -> str:
    """One line of what an error says."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:300]}" if words else type(error).__name__


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _code(error: BaseException) -> str:
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""
