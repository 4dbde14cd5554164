"""Blobs: the contents of samples and captions in a shard's body, each a safetensors content that says what it is of."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mm.config.model import WanConfig
from mm.config.storage import Location, Remote
from mm.data.features import EMPTY_PROMPT_ID, PROMPT_ID, Feature, Header, check_header, checked_feature, parse_feature
from mm.data.remote.reading import read_range, read_up_to
from mm.data.store.checksum import Checksum
from mm.errors import DataError

REMEDY = (
    "Run mm data repair on the store, then what wrote it (mm extract, mm migrate shards), which makes its shard again."
)


@dataclass(frozen=True, slots=True)
class Blob:
    """Place of a blob: its file, first byte, number of bytes, and the checksum that they must have."""

    file: Location
    offset: int
    length: int
    checksum: Checksum

    def __str__(self) -> str:
        return f"{self.file} at byte {self.offset}"


def read_sample_blobs(sample: Blob, prompt: Blob, model: WanConfig, origin: tuple[str, str]) -> Feature:
    """Read one sample and its caption's embedding, and check them against the model.

    Args:
        sample, prompt, origin: as in `read_raw_blobs`. model: the transformer that is to take them.

    Raises:
        DataError: what `read_raw_blobs` raises, and what `mm.data.features.read_feature` raises for tensors.
    """
    name = _name(sample, origin)
    header, tensors = read_raw_blobs(sample, prompt, origin)
    check_header(header, name, model, REMEDY)
    return checked_feature(header, tensors, name, REMEDY, model)


def parsed_feature(sample: bytes, prompt: bytes, name: str, model: WanConfig) -> Feature:
    """A sample from the contents of its blob and its caption's, checked as those that are read.

    Args:
        sample, prompt: the contents. name: of the sample, for messages. model: the transformer that is to take it.

    Raises:
        DataError: as `read_sample_blobs`.
    """
    both = (_parsed(memoryview(bytearray(content)), name) for content in (sample, prompt))
    header, tensors = _both(*both)
    check_header(header, name, model, REMEDY)
    return checked_feature(header, tensors, name, REMEDY, model)


def read_raw_blobs(sample: Blob, prompt: Blob, origin: tuple[str, str]) -> tuple[Header, dict[str, Tensor]]:
    """Read one sample and its caption's embedding, whatever model is to take them.

    Args:
        sample, prompt: their places. origin: (sample id, recipe key) that they must have.

    Raises:
        DataError: what `read_tensors` raises, DATA-016 for a blob of something else or another caption.
    """
    name = _name(sample, origin)
    header, tensors = read_tensors(sample, name)
    _check_origin(header, name, origin)
    about_prompt, of_prompt = read_tensors(prompt, f"{prompt} (a caption)")
    found, expected = about_prompt.origin, header.origin
    if found.sample not in (PROMPT_ID, EMPTY_PROMPT_ID) or (found.recipe, found.caption) != (
        origin[1],
        expected.caption,
    ):
        message = (
            f"{prompt} holds caption {found.caption} of recipe {found.recipe}, expected {expected.caption} of {name}."
        )
        raise DataError("DATA-016", message, REMEDY)
    return _both((header, tensors), (about_prompt, of_prompt))


def _both(
    sample: tuple[Header, dict[str, Tensor]], prompt: tuple[Header, dict[str, Tensor]]
) -> tuple[Header, dict[str, Tensor]]:
    """A sample with its caption's embedding."""
    header, about_prompt = sample[0], prompt[0]
    both = Header({**header.tensors, **about_prompt.tensors}, header.origin, header.start_frame, header.taken)
    return both, {**sample[1], **prompt[1]}


def _name(sample: Blob, origin: tuple[str, str]) -> str:
    return f'{sample} (sample "{origin[0]}")'


def read_prompt_blob(blob: Blob, model: WanConfig, recipe_key: str) -> Tensor:
    """Read a caption's embedding [L, D] that no sample is read with: that of the empty caption.

    Raises:
        DataError: as `read_sample_blobs`.
    """
    name = f"{blob} (the empty caption)"
    header, tensors = read_tensors(blob, name)
    _check_origin(header, name, (EMPTY_PROMPT_ID, recipe_key))
    check_header(header, name, model, REMEDY)
    return checked_feature(header, tensors, name, REMEDY, model).prompt


def read_blob(blob: Blob, name: str) -> memoryview:
    """Content of a blob, compared with its checksum; its memory is the caller's.

    Args:
        blob: its place. name: what to call it in messages.

    Raises:
        DataError: DATA-072 when the body cannot be read, DATA-152 when it ends before the blob does or is not there,
            DATA-153 for bytes that are not those that were written; of object storage what
            `mm.data.remote.client.attempt` raises.
    """
    try:
        content, is_whole = _content(blob)
    except FileNotFoundError:
        raise DataError("DATA-152", f"{blob.file} does not exist.", REMEDY) from None
    except OSError as error:
        remedy = "Check its permissions and the disk it is on."
        raise DataError("DATA-072", f"{name} cannot be read ({error}).", remedy) from None
    if is_whole:
        return content
    if len(content) < blob.length:
        message = f"{name}: the file ends after {len(content)} of its {blob.length} bytes."
        raise DataError("DATA-152", message, REMEDY)
    found = blob.checksum.of_same_kind([content])
    if found != blob.checksum:
        message = f"{name} is damaged: its bytes have the checksum {found}, expected {blob.checksum}."
        raise DataError("DATA-153", message, REMEDY)
    return content


def read_tensors(blob: Blob, name: str) -> tuple[Header, dict[str, Tensor]]:
    """Header and tensors of a blob.

    Raises:
        DataError: what `read_blob` raises, DATA-153 for one that is no feature.
    """
    return _parsed(read_blob(blob, name), name)


def _parsed(content: memoryview, name: str) -> tuple[Header, dict[str, Tensor]]:
    try:
        return parse_feature(content)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:  # RecursionError is the first
        raise DataError("DATA-153", f"{name} is no complete feature ({error}).", REMEDY) from None


def _content(blob: Blob) -> tuple[memoryview, bool]:
    """Bytes of a blob, as far as they are there, and whether they are known to have their checksum."""
    if isinstance(blob.file, Remote):
        checksum = blob.checksum
        return read_range(blob.file, blob.offset, blob.length, checksum.value.hex(), checksum.fits)
    with open(blob.file, "rb", buffering=0) as stream:
        stream.seek(blob.offset)
        return read_up_to(stream, blob.length), False


def _check_origin(header: Header, name: str, origin: tuple[str, str]) -> None:
    if (header.origin.sample, header.origin.recipe) != origin:
        found = f'sample "{header.origin.sample}" of recipe {header.origin.recipe}'
        message = f'{name} holds {found}, expected sample "{origin[0]}" of recipe {origin[1]}.'
        raise DataError("DATA-016", message, REMEDY)
