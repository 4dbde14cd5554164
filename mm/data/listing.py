"""data.jsonl: the list of a feature store's samples."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import AfterValidator, ConfigDict, Field

from mm.config.base import Section, parse
from mm.config.data import TEMPORAL_STRIDE
from mm.config.tasks.registry import DEFAULT, FeatureTaskName
from mm.data.features import EMPTY_PROMPT, EXTRACT_AGAIN, FEATURES, LISTING
from mm.data.files import raise_limited, read_rows, write_atomically
from mm.data.place import FeaturePlace
from mm.errors import ConfigError, DataError, Problem

LatentShape = tuple[int, int, int, int]  # C, F, H, W


_MOST_VALUES = 2**30  # of a sample's latents, 4 GiB in fp32; a list that says more is damaged


def _possible(shape: LatentShape) -> LatentShape:
    """A shape that latents can have: readers make room for the largest that is listed."""
    if min(shape) < 1 or prod(shape) > _MOST_VALUES:
        raise ValueError(f"latents cannot be {list(shape)}")
    return shape


class Digest(Protocol):
    """A hash that is being fed, as hashlib's."""

    def update(self, data: bytes, /) -> None:
        """Take more bytes."""


class FeatureRow(Section):
    """One row of data.jsonl; names as in MindSpeed-MM where it has them.

    Attributes:
        sample: the sample's id, the key of its random numbers. file: its features, below the store.
        path, cap: the video as listed and the caption that was embedded.
        start_frame_idx, sample_num_frames, sample_size: the clip, `81x480x832`.
        latent_shape: [16, F, H, W], with the frames of images in front of the clip's. text_tokens: L.
        task: what the features are for.
        video: `mm.data.features.video_fingerprint` of the video; None in lists of earlier versions and migrated stores.
        taken: what a shape rule chose; left out where there is none.
    """

    sample: str = Field(min_length=1)
    file: str = Field(pattern=r"^features/[A-Za-z0-9_-]+\.safetensors$")
    path: str
    cap: str
    start_frame_idx: int = Field(ge=0)
    sample_num_frames: int = Field(ge=1)
    sample_size: str
    latent_shape: Annotated[LatentShape, AfterValidator(_possible)]
    text_tokens: int = Field(ge=1)
    task: FeatureTaskName = DEFAULT.name
    video: str | None = None
    taken: dict[str, Any] | None = None

    def line(self) -> bytes:
        """The row as a line of data.jsonl."""
        return (self.model_dump_json(exclude={"taken"} if self.taken is None else None) + "\n").encode()


class ListedSample(Section):
    """A sample's video, caption and clip, as lists of either kind of store have them; names as in `FeatureRow`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    sample: str
    path: str
    cap: str
    start_frame_idx: int = Field(ge=0)
    sample_num_frames: int = Field(ge=1)
    taken: dict[str, Any] | None = None

    def frames_in_front(self, latent_frames: int) -> int:
        """Latent frames in front of the clip's, of so many of both."""
        return latent_frames - ((self.sample_num_frames - 1) // TEMPORAL_STRIDE + 1)


@dataclass(frozen=True)
class RowsOfDraw:
    """Rows of a store that are one draw of each of its samples: `count` from row `first` on.

    Attributes:
        shapes: how many of each latent shape. in_bucket: row of the k-th of a shape.
    """

    first: int
    count: int
    shapes: Counter[LatentShape]
    in_bucket: Callable[[LatentShape, int], int]


class FeatureStore:
    """A complete store of one file a sample: its folder, the key of its recipe, and its rows, counted from 0."""

    def __init__(self, folder: Path, rows: Sequence[FeatureRow], recipe_key: str) -> None:
        self.folder = folder
        self.recipe_key = recipe_key
        self.rows = rows
        self._buckets: dict[LatentShape, list[int]] = {}
        for number, row in enumerate(rows):
            self._buckets.setdefault(row.latent_shape, []).append(number)

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, row: int) -> str:
        """The sample's id."""
        return self.rows[row].sample

    def latent_shape(self, row: int) -> LatentShape:
        """Shape (C, F, H, W) of the sample's latents."""
        return self.rows[row].latent_shape

    def text_tokens(self, row: int) -> int:
        """Tokens of the sample's caption."""
        return self.rows[row].text_tokens

    def listed(self, row: int) -> ListedSample:
        """The sample's video, caption and clip."""
        return ListedSample.model_validate(self.rows[row].model_dump())

    draws = 1
    """Of each sample."""

    def of_draw(self, draw: int) -> RowsOfDraw:
        """The rows of a draw, which are all."""
        del draw
        return RowsOfDraw(0, len(self), self.shapes(), self.in_bucket)

    def shapes(self) -> Counter[LatentShape]:
        """Number of samples with each latent shape, in the order of the shapes' first samples."""
        return Counter({shape: len(rows) for shape, rows in self._buckets.items()})

    def in_bucket(self, shape: LatentShape, k: int) -> int:
        """Row of the k-th sample of a shape."""
        return self._buckets[shape][k]

    def add_identity(self, digest: Digest) -> None:
        """Feed the names, clips, captions and videos of all samples to a digest."""
        for row in self.rows:
            content = (row.sample, row.cap, row.start_frame_idx, row.latent_shape, row.text_tokens, row.video)
            digest.update(f"{json.dumps(content)}\n".encode())

    def place(self, row: int) -> FeaturePlace:
        """Place of the sample."""
        listed = self.rows[row]
        return FeaturePlace(self.folder, listed.file, listed.sample, self.recipe_key, listed.latent_shape)

    def empty_prompt(self) -> Path:
        """The file of the empty caption's embedding."""
        return self.folder / FEATURES / EMPTY_PROMPT


def open_feature_store(folder: Path, listing: Path, recipe_key: str, task: str = DEFAULT.name) -> FeatureStore:
    """Read the rows of a store and check that every file they name is there.

    Args:
        folder: the store. listing: its data.jsonl.
        recipe_key, task: of its recipe.

    Raises:
        DataError: DATA-010 when the listing is missing or not a listing, DATA-011 for files that are missing, DATA-046
            for samples of another task than the store's, DATA-064 for samples listed twice; all rows at once.
    """
    if not listing.exists():
        remedy = "Run feature extraction (again); it writes the list when every sample is done."
        raise DataError("DATA-010", f"{listing} does not exist: {folder} is no complete feature store.", remedy)
    checker = RowChecker(folder, listing, task)
    rows: list[FeatureRow] = []
    problems: list[Problem] = []
    for number, values in enumerate(read_rows(listing, "DATA-010"), start=1):
        row, found = checker.check(values, number)
        problems += found
        if row is not None:
            rows.append(row)
    raise_limited(problems)
    return FeatureStore(folder, rows, recipe_key)


class RowChecker:
    """Checks the rows of one listing, in order; its arguments are those of `open_feature_store`."""

    def __init__(self, folder: Path, listing: Path, task: str) -> None:
        self._folder, self._listing, self._task = folder, listing, task
        features = folder / FEATURES
        self._present = {entry.name for entry in features.iterdir()} if features.is_dir() else set[str]()
        self._seen: set[str] = set()

    def check(self, values: Any, number: int) -> tuple[FeatureRow | None, list[Problem]]:
        """The row with its problems, those that `open_feature_store` raises; None where it has the wrong form."""
        place = f"{self._listing} row {number}"
        try:
            row = parse(FeatureRow, values, place)
        except ConfigError as error:
            return None, [Problem("DATA-010", problem.message, EXTRACT_AGAIN) for problem in error.problems]
        problems: list[Problem] = []
        if row.sample in self._seen:
            problems.append(Problem("DATA-064", f'{place}: sample "{row.sample}" is listed twice.', "Keep one row."))
        if row.task != self._task:
            message = f"{place} is of the task {row.task}, and {self._folder} of {self._task}."
            problems.append(Problem("DATA-046", message, "Keep the samples of each task in a store of their own."))
        if Path(row.file).name not in self._present:
            message = f"{place}: {self._folder / row.file} does not exist."
            problems.append(Problem("DATA-011", message, EXTRACT_AGAIN))
        self._seen.add(row.sample)
        return row, problems


def write_listing(folder: Path, rows: Sequence[FeatureRow]) -> None:
    """Write data.jsonl in one step; raises what `write_atomically` raises."""
    lines = [row.line() for row in rows]
    write_atomically(folder / LISTING, lines, sum(map(len, lines)))
