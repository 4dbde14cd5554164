"""Index of a shard: fixed-width records of its samples and captions, mapped and checked before they are used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mm.config.storage import Location, LocationT
from mm.data.store.blobs import REMEDY, Blob
from mm.data.store.checksum import DIGEST_BYTES, Checksum
from mm.data.store.table import ALIGNMENT, Column, Table, open_table
from mm.errors import DataError

SHARDS = "shards"
BODY = "body.bin"
INDEX = "index.bin"
LISTING = "listing.jsonl"
KIND = "shard index"
LatentShape = tuple[int, int, int, int]  # C, F, H, W

_PLACE: list[Any] = [("offset", "<u8"), ("length", "<u8"), ("digest", "u1", (DIGEST_BYTES,))]
SAMPLE = np.dtype(
    [
        *_PLACE,
        ("shape", "<i4", (4,)),
        ("text_tokens", "<u4"),
        ("prompt_shard", "<u4"),
        ("prompt_key", "u1", (DIGEST_BYTES,)),
        ("name_offset", "<u8"),
        ("name_length", "<u4"),
    ]
)
"""Place of the blob, latent shape, tokens of the caption, where the caption's embedding is, place of the name."""
PROMPT = np.dtype([*_PLACE, ("key", "u1", (DIGEST_BYTES,)), ("tokens", "<u4")])
"""Place of the blob, `prompt_key` of the caption, its tokens; in the order of the keys."""


@dataclass(frozen=True, slots=True)
class ShardFacts:
    """Facts that the store was finished with about one shard.

    Attributes:
        number: of the shard; its folder's name. digest: checksum of its index.
        num_samples, body_bytes: what it holds. recipe_key: of the store. num_shards: of the store.
    """

    number: int
    digest: bytes
    num_samples: int
    body_bytes: int
    recipe_key: str
    num_shards: int


def shard_folder(store: LocationT, number: int) -> LocationT:
    """The folder of a shard."""
    return store / SHARDS / f"{number:08d}"


class Shard:
    """One shard, open: what its index says of its samples 0, 1, ... and of its captions."""

    def __init__(self, folder: Location, table: Table) -> None:
        self.body = folder / BODY
        self._samples = table.columns["samples"]
        self._prompts = table.columns["prompts"]
        self._names = table.columns["names"]
        self._order = table.columns["order"]
        self._begins = _begins(table.header.about)
        self._checksum = table.header.checksum.kind

    def __len__(self) -> int:
        return len(self._samples)

    def name(self, row: int) -> str:
        """The sample's id."""
        record = self._samples[row]
        begin = int(record["name_offset"])
        return bytes(self._names[begin : begin + int(record["name_length"])]).decode()

    def latent_shape(self, row: int) -> LatentShape:
        """Shape (C, F, H, W) of the sample's latents."""
        channels, frames, height, width = map(int, self._samples[row]["shape"])
        return channels, frames, height, width

    def text_tokens(self, row: int) -> int:
        """Tokens of the sample's caption."""
        return int(self._samples[row]["text_tokens"])

    def blob(self, row: int) -> Blob:
        """Place of the sample's blob."""
        return self._blob(self._samples[row])

    def prompt_of(self, row: int) -> tuple[int, bytes]:
        """The shard that holds the embedding of the sample's caption, and the caption's key."""
        record = self._samples[row]
        return int(record["prompt_shard"]), bytes(record["prompt_key"])

    def prompt(self, key: bytes) -> Blob:
        """Place of the embedding of a caption.

        Raises:
            DataError: DATA-151 when the shard has none of that key.
        """
        found = self.find_prompt(key)
        if found is None:
            message = f"{self.body.parent} holds no caption {key.hex()}, which a sample of the store names."
            raise DataError("DATA-151", message, REMEDY)
        return found

    def find_prompt(self, key: bytes) -> Blob | None:
        """Place of the embedding of a caption, if the shard has it."""
        low, high = 0, len(self._prompts)
        while low < high:
            middle = (low + high) // 2
            if bytes(self._prompts[middle]["key"]) < key:
                low = middle + 1
            else:
                high = middle
        if low == len(self._prompts) or bytes(self._prompts[low]["key"]) != key:
            return None
        return self._blob(self._prompts[low])

    def in_bucket(self, shape: LatentShape, k: int) -> int:
        """Number of the k-th sample of a shape."""
        return int(self._order[self._begins[shape] + k])

    def blobs(self) -> Iterator[Blob]:
        """Places of all blobs."""
        for records in (self._samples, self._prompts):
            for record in records:
                yield self._blob(record)

    def _blob(self, record: Any) -> Blob:
        checksum = Checksum(self._checksum, bytes(record["digest"]))
        return Blob(self.body, int(record["offset"]), int(record["length"]), checksum)


def open_shard(store: Location, facts: ShardFacts) -> Shard:
    """Map the index of a shard and check that it tells the truth of its body, as far as that is known unread.

    Raises:
        DataError: what `mm.data.store.table.open_table` raises, DATA-151 for an index that contradicts itself or the
            store, DATA-152 for a body that is missing or of another size, DATA-155 for a shard of another recipe.
    """
    folder = shard_folder(store, facts.number)
    table = open_table(folder / INDEX, KIND, REMEDY, facts.digest)
    about = table.header.about
    if about.get("recipe") != facts.recipe_key:
        message = f"{folder} is of the recipe {about.get('recipe')}, its store of {facts.recipe_key}."
        raise DataError("DATA-155", message, REMEDY)
    try:
        fault = next(_faults(table, facts), None)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        fault = f"a part of it is missing or of another kind ({type(error).__name__}: {error})"
    if fault is not None:
        raise DataError("DATA-151", f"{folder / INDEX}: {fault}.", REMEDY)
    if isinstance(folder, Path):  # elsewhere each look costs a request, and what is read tells
        check_body(folder / BODY, facts.body_bytes)
    return Shard(folder, table)


def check_body(body: Path, size: int) -> None:
    """Compare the size of a body.

    Raises:
        DataError: DATA-152 when it is missing or another, DATA-072 when it cannot be looked at.
    """
    try:
        found = body.stat().st_size
    except FileNotFoundError:
        raise DataError("DATA-152", f"{body} does not exist.", REMEDY) from None
    except OSError as error:
        remedy = "Check its permissions and the disk it is on."
        raise DataError("DATA-072", f"{body} cannot be read ({error}).", remedy) from None
    if found != size:
        raise DataError("DATA-152", f"{body} has {found} bytes, expected {size}.", REMEDY)


def _begins(about: Mapping[str, Any]) -> dict[LatentShape, int]:
    """Begin of each shape in the order."""
    begins, begin = {}, 0
    for channels, frames, height, width, count in about["shapes"]:
        begins[channels, frames, height, width] = begin
        begin += count
    return begins


def _faults(table: Table, facts: ShardFacts) -> Iterator[str]:
    """Contradictions inside an index, and with the store."""
    about, columns = table.header.about, table.columns
    samples, prompts, names, order = (columns[name] for name in ("samples", "prompts", "names", "order"))
    if samples.dtype != SAMPLE or prompts.dtype != PROMPT or names.dtype != np.uint8 or order.dtype != np.dtype("<u4"):
        yield "its columns are of other types than this version's"
        return
    if not len(samples) == len(order) == about["samples"] == facts.num_samples:
        counts = f"{len(samples)} records, {len(order)} places in order, says {about['samples']}"
        yield f"it has {counts}, the store counts {facts.num_samples}"
    if about["body_bytes"] != facts.body_bytes:
        yield f"it says a body of {about['body_bytes']} bytes, the store one of {facts.body_bytes}"
    yield from _faults_of_places(samples, prompts, facts.body_bytes)
    ends = samples["name_offset"] + samples["name_length"]
    if len(samples) and (int(ends.max()) > len(names) or np.any(ends < samples["name_offset"])):
        yield f"a name ends outside of the {len(names)} bytes of names"
    if len(samples) and int(samples["prompt_shard"].max()) >= facts.num_shards:
        yield f"a sample names shard {int(samples['prompt_shard'].max())} of {facts.num_shards}"
    keys = [bytes(key) for key in prompts["key"]]
    if keys != sorted(set(keys)):
        yield "its captions are not in order"
    yield from _faults_of_order(about, samples, order)


def _faults_of_places(samples: Column, prompts: Column, body_bytes: int) -> Iterator[str]:
    offsets = np.concatenate([samples["offset"], prompts["offset"]])
    lengths = np.concatenate([samples["length"], prompts["length"]])
    if not len(offsets):
        return
    if np.any(lengths > body_bytes) or np.any(offsets > body_bytes) or np.any(offsets + lengths > body_bytes):
        yield f"a blob ends after the body's {body_bytes} bytes"
        return
    if np.any(offsets % ALIGNMENT):
        yield f"a blob begins at a byte that {ALIGNMENT} does not divide"
    by_place = np.argsort(offsets, kind="stable")
    if np.any((offsets + lengths)[by_place][:-1] > offsets[by_place][1:]):
        yield "two blobs overlap"


def _faults_of_order(about: Mapping[str, Any], samples: Column, order: Column) -> Iterator[str]:
    shapes = about["shapes"]
    wanted = np.repeat(
        np.array([shape[:4] for shape in shapes], np.int32).reshape(-1, 4), [shape[4] for shape in shapes], 0
    )
    if not np.array_equal(np.sort(order), np.arange(len(samples))):
        yield "its order by shape is no order of its samples"
    elif wanted.shape != (len(samples), 4) or not np.array_equal(samples["shape"][order], wanted):
        yield "its order by shape does not fit the shapes"
    elif np.any((np.diff(order.astype(np.int64)) <= 0) & np.all(wanted[:-1] == wanted[1:], axis=1)):
        yield "its order by shape mixes samples of one shape"
