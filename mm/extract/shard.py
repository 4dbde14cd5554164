"""Making of the shards of a run of rows: one shard for each draw."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from mm.data.clips import Clip
from mm.data.features import Feature, Origin
from mm.data.listing import FeatureRow
from mm.data.metadata import VideoSample
from mm.data.recipe import Recipe
from mm.data.store.writer import ShardWriter, prompt_blob, prompt_key
from mm.errors import DataError
from mm.extract.encode import ClipEncoder
from mm.extract.former import FormerSample, read_former, read_former_prompt
from mm.extract.plan import Plan, plan_key
from mm.extract.rows import listed_row
from mm.extract.skipping import SKIPPED, BadClip, Skipping, may_be_skipped


@dataclass(frozen=True, slots=True)
class DrawTask:
    """One draw of a sample: the caption that it uses, what it is made from, and where it is found already made."""

    sample: VideoSample
    draw: int
    caption: str
    origin: Origin
    former: FormerSample | None


@dataclass(frozen=True, slots=True)
class RunTask:
    """A run of rows: of each its draws, or why it has none."""

    run: int
    rows: Sequence[Sequence[DrawTask] | BadClip]

    def to_read(self) -> Iterator[tuple[VideoSample, int]]:
        """The clips to read, in the order in which `ShardMaker.make` asks for them."""
        for row in self.rows:
            if not isinstance(row, BadClip):
                yield from ((task.sample, task.draw) for task in row if task.former is None)


@dataclass(frozen=True, slots=True)
class Made:
    """Numbers of a run's samples that were encoded, copied, and left out."""

    encoded: int
    copied: int
    skipped: int


class ShardMaker:
    """Makes shards of a store."""

    def __init__(self, store: Path, plan: Plan, recipe: Recipe, encoders: Callable[[], ClipEncoder]) -> None:
        """
        Args:
            store: its folder. plan: its rows. recipe: of the features.
            encoders: the loaded encoders; called when one is needed.
        """
        self._store, self._plan, self._recipe, self._encoders = store, plan, recipe, encoders
        self._empty: Tensor | None = None

    def make(
        self, task: RunTask, clips: Iterator[Clip | DataError], skipping: Skipping, done: Callable[[], object]
    ) -> Made:
        """Make the shards of a run, one for each draw.

        Args:
            task: its rows. clips: of `task.to_read()`. skipping: what may be left out. done: told after each row.

        Raises:
            DataError: DATA-013 for values that are not finite, DATA-018 and DATA-019 when a shard cannot be written,
                DATA-190 when the store has another plan by now, what `Skipping.add` and the encoders raise.
        """
        plan = self._plan
        shards = plan.shards_of(task.run)
        bad: list[BadClip] = []
        encoded = copied = 0
        with ExitStack() as stack:
            writers = [stack.enter_context(ShardWriter(self._store, shard, plan.recipe)) for shard in shards]
            prompts = _Prompts(self, writers, shards)
            if task.run == 0:
                prompts.add_empty()
            for row in task.rows:
                fault = row if isinstance(row, BadClip) else self._add(row, clips, prompts, writers)
                if fault is not None:
                    bad.append(fault)
                    skipping.add(task.run, bad)
                elif not isinstance(row, BadClip):
                    is_copy = all(draw.former is not None for draw in row)
                    copied, encoded = copied + is_copy, encoded + (not is_copy)
                done()
            self._commit(task.run, writers, shards, bad)
        return Made(encoded, copied, len(bad))

    def _add(
        self,
        row: Sequence[DrawTask],
        clips: Iterator[Clip | DataError],
        prompts: _Prompts,
        writers: Sequence[ShardWriter],
    ) -> BadClip | None:
        """Add all draws of a row to their shards, or none of them where one cannot be read."""
        features = self._features(row, clips, prompts)
        if isinstance(features, BadClip):
            return features
        for task, feature in zip(row, features, strict=True):
            place, length = prompts.add(task)
            writers[task.draw].add(_row(task, feature, length, self._recipe), feature, task.origin, place)
        return None

    def _commit(self, run: int, writers: Sequence[ShardWriter], shards: Sequence[int], bad: Sequence[BadClip]) -> None:
        if plan_key(self._store) != self._plan.key:
            found = f"The rows of {self._store} were planned anew while shard {shards[0]} was being made."
            raise DataError("DATA-190", found, "Start this process again; other rows, files or flags count now.")
        lines = "".join(json.dumps(asdict(clip)) + "\n" for clip in bad).encode()
        for draw in reversed(range(len(shards))):  # the first draw last
            said = {"rows": self._plan.made_from(shards[draw]), "skipped": 0 if draw else len(bad)}
            writers[draw].commit(said, {SKIPPED: lines} if bad and not draw else None)

    def _features(
        self, row: Sequence[DrawTask], clips: Iterator[Clip | DataError], prompts: _Prompts
    ) -> list[Feature] | BadClip:
        """Features of all draws of a row; its first error where one of them cannot be read."""
        found: list[Feature] = []
        fault: DataError | None = None
        for task in row:
            feature = None if task.former is None else read_former(task.former.blob, task.origin)
            if task.former is not None and feature is None:
                message = f"{task.former.blob} was whole a moment ago, and is not now."
                raise DataError("DATA-153", message, "Check the disk it is on, and start again.")
            if feature is None:
                clip = next(clips)
                if isinstance(clip, DataError):
                    fault = fault or clip
                elif fault is None:
                    feature = self._encoders().encode(clip, prompts.of(task), task.sample.columns)
            if feature is not None:
                found.append(feature)
        if fault is None:
            return found
        if not may_be_skipped(fault):
            raise fault
        return BadClip.of(row[0].sample.id, row[0].sample.where, fault.problems[0])

    def empty_prompt(self) -> Tensor:
        """The empty caption's embedding, [L, D]; made once."""
        if self._empty is None:
            self._empty = self._encoders().prompt("")
        return self._empty

    def content(self, caption: str, prompt: Tensor) -> bytes:
        """Blob of a caption's embedding."""
        return prompt_blob(caption, prompt, self._recipe.max_text_tokens, self._recipe.key)

    def prompt(self, task: DrawTask) -> Tensor:
        """The embedding of a draw's caption, [L, D], copied where the draw is."""
        former = None if task.former is None else read_former_prompt(task.former.prompt, task.caption, self._recipe.key)
        return self._encoders().prompt(task.caption) if former is None else former


class _Prompts:
    """The captions of a run's shards: each is encoded and stored once, with the first draw that uses it.

    The empty one is in the first shard of the store, whoever uses it. Other captions are not shared between runs: who
    makes a shard would have to wait for the shard that has them.
    """

    def __init__(self, maker: ShardMaker, writers: Sequence[ShardWriter], shards: Sequence[int]) -> None:
        self._maker, self._writers, self._shards = maker, writers, shards
        self._found: dict[str, Tensor] = {}
        self._stored: dict[str, int] = {}

    def of(self, task: DrawTask) -> Tensor:
        """The embedding of a draw's caption."""
        if task.caption not in self._found:
            empty = not task.caption
            self._found[task.caption] = self._maker.empty_prompt() if empty else self._maker.prompt(task)
        return self._found[task.caption]

    def add_empty(self) -> None:
        """Store the empty caption in the first shard."""
        prompt = self._maker.empty_prompt()
        self._writers[0].add_prompt(prompt_key(""), self._maker.content("", prompt), len(prompt))

    def add(self, task: DrawTask) -> tuple[tuple[int, bytes], int]:
        """Store the caption of a draw unless it is; returns its shard and key, and its length L."""
        prompt, key = self.of(task), prompt_key(task.caption)
        if not task.caption:
            return (0, key), len(prompt)
        if task.caption not in self._stored:
            self._stored[task.caption] = self._shards[task.draw]
            self._writers[task.draw].add_prompt(key, self._maker.content(task.caption, prompt), len(prompt))
        return (self._stored[task.caption], key), len(prompt)


def _row(task: DrawTask, feature: Feature, text_tokens: int, recipe: Recipe) -> FeatureRow:
    latents = feature.latents
    assert latents is not None  # noqa: S101  only the empty caption has none
    channels, frames, height, width = latents.shape
    return listed_row(
        task.sample,
        task.origin.video,
        task.caption,
        (channels, frames, height, width),
        start_frame=feature.start_frame,
        text_tokens=text_tokens,
        task=recipe.task,
        taken=feature.taken,
    )
