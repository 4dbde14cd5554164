"""Index of a live store: of every row and draw the shape that its features will have, found without decoding.

    STORE/plan/live.bin   it goes with the plan that it is of, whose rows and files it describes

All that a finished store says of its samples beside their features is known before they are made: shapes, starts,
captions, their tokens. So both have the same identity, and the same sampling plan.
"""

from __future__ import annotations

import logging
from array import array
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mm.config.bad_samples import OnBadSample
from mm.config.data import TEMPORAL_STRIDE
from mm.config.run.extraction import ExtractionRun, SourceClip
from mm.config.tasks.task import Media
from mm.data.clips import clip_facts
from mm.data.files import raise_limited
from mm.data.listing import FeatureRow, RowsOfDraw
from mm.data.metadata import VideoSample
from mm.data.sources.checking import RowReader
from mm.data.store.checksum import DIGEST_BYTES
from mm.data.store.shard import LatentShape
from mm.data.store.table import Table, open_table, write_table
from mm.data.store.writer import identity_of, order_by_shape
from mm.data.workers import Parcel, read_in_order
from mm.errors import DataError
from mm.extract.plan import PLAN, Plan
from mm.extract.planning import LATENT_CHANNELS
from mm.extract.rows import check_rows, listed_row, rows_of, source_word, usable
from mm.extract.skipping import BadClip, may_be_skipped, too_many
from mm.wan.encoders import clean_text
from mm.wan.tokenizer import open_tokenizer

INDEX = "live.bin"
KIND = "live index"
_FINGERPRINT_BYTES = 8
_REMEDY = "Remove it; the next training with --live makes it again."

log = logging.getLogger(__name__)


class LiveIndex:
    """The index of a plan's rows, open; rows of the store are told by draw and their number in it."""

    def __init__(self, table: Table) -> None:
        about = table.header.about
        self.plan: str = about["plan"]
        self.draws: int = about["draws"]
        self.identity: str = about["identity"]
        self._shapes = [{(c, f, h, w): n for c, f, h, w, n in shapes} for shapes in about["shapes"]]
        self._all_shapes = Counter[LatentShape]()
        for shapes in self._shapes:
            self._all_shapes.update(shapes)
        self._rows = table.columns["rows"]
        self._videos = table.columns["videos"]
        self._latents = table.columns["latents"]
        self._tokens = table.columns["tokens"]
        self._order = table.columns["order"]

    @property
    def rows_of_draw(self) -> int:
        """Number of samples of a draw."""
        return len(self._rows)

    def planned(self, number: int) -> int:
        """Row of the plan that a sample is, by its number in a draw."""
        return int(self._rows[number])

    def fingerprint(self, number: int) -> str:
        """`video_fingerprint` that a sample's video had, by its number in a draw."""
        return bytes(self._videos[number]).hex()

    def latent_shape(self, row: int) -> LatentShape:
        """Shape (C, F, H, W) that a sample's latents have."""
        channels, frames, height, width = map(int, self._latents[row])
        return channels, frames, height, width

    def text_tokens(self, row: int) -> int:
        """Tokens of a sample's caption."""
        return int(self._tokens[row])

    def shapes(self) -> Counter[LatentShape]:
        """Number of samples with each latent shape, in the order of the shapes' first samples."""
        return Counter(self._all_shapes)

    def of_draw(self, draw: int) -> RowsOfDraw:
        """The rows of one draw."""
        first, shapes = draw * self.rows_of_draw, self._shapes[draw]
        begins, begin = {}, first
        for shape, count in shapes.items():
            begins[shape] = begin
            begin += count
        return RowsOfDraw(
            first, self.rows_of_draw, Counter(shapes), lambda shape, k: first + int(self._order[begins[shape] + k])
        )


def open_index(store: Path, plan: Plan) -> LiveIndex | None:
    """The index of a plan, if there is one.

    Raises:
        DataError: DATA-150 for one that is damaged.
    """
    path = store / PLAN / INDEX
    if not path.exists():
        return None
    index = LiveIndex(open_table(path, KIND, _REMEDY))
    return index if index.plan == plan.key else None


def write_index(run: ExtractionRun, store: Path, plan: Plan, reader: RowReader, policy: OnBadSample) -> None:
    """Write the index of a plan: every file is opened once, by the readers of the extraction, and not decoded.

    Args:
        run: the extraction. store: its folder. plan, reader: its rows. policy: for clips that cannot be read.

    Raises:
        DataError: what `mm.extract.rows.check_rows` and `mm.data.clips.clip_facts` raise, DATA-073 for more clips that
            cannot be read than may be left out, DATA-018 and DATA-019 when it cannot be written.
    """
    found, bad = _Columns(run, plan), list[BadClip]()
    jobs = _Jobs(run, plan, reader, policy)
    outcomes = read_in_order(
        _Facts(run.data.clip, run.extraction.seed, plan.draws, run.task.media),
        jobs,
        num_workers=run.data.workers,
        time_limit=run.data.read_timeout * plan.draws,
        buffer_bytes=0,
    )
    with closing(outcomes), tqdm(total=plan.num_rows, desc="shapes of clips", unit="sample", disable=None) as bar:
        for row in jobs.with_outcomes(outcomes):
            if isinstance(row, BadClip):
                if not policy.skips:
                    raise_limited([row.problem()])
                bad.append(row)
                if len(bad) > policy.allowed(plan.num_rows):
                    raise_limited(too_many(len(bad), plan.num_rows, policy, bad))
            else:
                found.add(row)
            bar.update()
    if bad:
        log.warning("%d clips of %s cannot be read and are left out: %s", len(bad), store, bad[0].problem())
    found.write(store / PLAN / INDEX)


@dataclass(frozen=True, slots=True)
class _Row:
    """A row with what was found of each of its draws: start, frames, height and width, and the word of its source."""

    planned: int
    sample: VideoSample
    clips: Sequence[Sequence[int]]
    words: Sequence[str]


class _Jobs:
    """The samples of a plan as jobs, and the rows that have none because their videos are known to be bad."""

    def __init__(self, run: ExtractionRun, plan: Plan, reader: RowReader, policy: OnBadSample) -> None:
        self._run, self._plan, self._reader, self._policy = run, plan, reader, policy
        self._given: deque[tuple[int, VideoSample | BadClip]] = deque()

    def __iter__(self) -> Iterator[VideoSample]:
        for run in range(self._plan.num_runs):
            rows = rows_of(self._plan, run, self._reader)
            check_rows(rows, self._run.data.clip, self._policy)
            for number, row in enumerate(rows):
                sample = usable(row, self._run.data.clip)
                self._given.append((run * self._plan.shard_rows + number, sample))
                if not isinstance(sample, BadClip):
                    yield sample

    def with_outcomes(self, outcomes: Iterator[tuple[VideoSample, Parcel | DataError]]) -> Iterator[_Row | BadClip]:
        """All rows in their order."""
        for sample, outcome in outcomes:
            yield from self._known_bad()
            planned, _ = self._given.popleft()
            if isinstance(outcome, DataError):
                if not may_be_skipped(outcome):
                    raise outcome
                yield BadClip.of(sample.id, sample.where, outcome.problems[0])
            else:
                yield _Row(planned, sample, outcome.facts["clips"], outcome.facts["words"])
        yield from self._known_bad()

    def _known_bad(self) -> Iterator[BadClip]:
        while self._given and isinstance(self._given[0][1], BadClip):
            sample = self._given.popleft()[1]
            assert isinstance(sample, BadClip)  # noqa: S101  asked above
            yield sample


@dataclass(frozen=True)
class _Facts:
    """Work of a reader: facts of the clips of all draws of one sample."""

    clip: SourceClip
    seed: int
    draws: int
    media: Sequence[Media]

    def __call__(self, sample: VideoSample, /) -> Parcel:
        draws = range(self.draws)
        clips = [list(clip_facts(sample, self.clip, self.seed, draw, self.media)) for draw in draws]
        return Parcel({}, {"clips": clips, "words": [source_word(sample, draw) for draw in draws]})

    def describe(self, sample: VideoSample, /) -> str:
        return sample.where


class _Columns:
    """Columns of an index, gathered row by row."""

    def __init__(self, run: ExtractionRun, plan: Plan) -> None:
        self._run, self._plan = run, plan
        self._rows, self._latents, self._tokens = array("I"), array("i"), array("I")
        self._videos = bytearray()
        self._listed: list[list[FeatureRow]] = [[] for _ in range(plan.draws)]
        self._at = 0
        self._identities: dict[int, str] = {}
        named = run.encoders.tokenizer
        tokenizer = open_tokenizer(Path(named.from_pretrained))

        @lru_cache(maxsize=1024)
        def count(caption: str) -> int:
            return min(len(tokenizer.ids([clean_text(caption)])[0]), named.model_max_length)

        self._count = count

    def add(self, row: _Row) -> None:
        """Take the next row that has a sample."""
        self._end_runs(row.planned // self._plan.shard_rows)
        self._rows.append(row.planned)
        self._videos += bytes.fromhex(row.words[0][: 2 * _FINGERPRINT_BYTES])
        for draw, ((start, frames, height, width), word) in enumerate(zip(row.clips, row.words, strict=True)):
            sample, caption = row.sample, row.sample.caption(self._run.extraction.seed, draw)
            tokens = self._count(caption)
            task = self._run.task
            latent_frames = task.images_in_front(sample.roles) + (frames - 1) // TEMPORAL_STRIDE + 1
            channels, pixels = task.latent_channels or LATENT_CHANNELS, task.latent_pixels
            shape = (channels, latent_frames, height // pixels, width // pixels)
            self._latents.extend(shape)
            self._tokens.append(tokens)
            listed = listed_row(sample, word, caption, shape, start_frame=start, text_tokens=tokens, task=task.name)
            self._listed[draw].append(listed)

    def write(self, path: Path) -> None:
        """Write the index; raises what `mm.data.store.table.write_table` raises."""
        self._end_runs(self._plan.num_runs)
        draws, count = self._plan.draws, len(self._rows)
        latents = np.frombuffer(self._latents, "<i4").reshape(count, draws, 4).swapaxes(0, 1)
        tokens = np.frombuffer(self._tokens, "<u4").reshape(count, draws).swapaxes(0, 1)
        orders = [order_by_shape(latents[draw]) for draw in range(draws)]
        identity = blake2b(digest_size=DIGEST_BYTES)
        for shard in range(self._plan.num_shards):
            identity.update(bytes.fromhex(self._identities[shard]))
        about: dict[str, Any] = {
            "plan": self._plan.key,
            "draws": draws,
            "identity": identity.hexdigest(),
            "shapes": [[[*shape, held] for shape, held in shapes.items()] for _, shapes in orders],
        }
        columns = {
            "rows": np.frombuffer(self._rows, "<u4"),
            "videos": np.frombuffer(bytes(self._videos), np.uint8).reshape(count, _FINGERPRINT_BYTES),
            "latents": latents.reshape(-1, 4),
            "tokens": tokens.reshape(-1),
            "order": np.concatenate([order for order, _ in orders]),
        }
        write_table(path, KIND, about, columns)

    def _end_runs(self, until: int) -> None:
        """Reckon the identities of the shards of all runs before one, of which no further row comes."""
        for run in range(self._at, until):
            for shard, listed in zip(self._plan.shards_of(run), self._listed, strict=True):
                self._identities[shard] = identity_of(listed)
                listed.clear()
        self._at = until
