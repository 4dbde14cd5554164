"""Opening of live stores: their plans settled and their rows looked at by one process, then open on all."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from types import TracebackType

import torch

from mm.config.bad_samples import parse_on_bad_sample
from mm.config.run.extraction import ExtractionRun
from mm.config.storage import Location
from mm.config.units import format_bytes
from mm.data.files import make_folder
from mm.data.recipe import extraction_recipe
from mm.data.sources.checking import RowReader, annotated_sources
from mm.data.store.catalog import is_sharded
from mm.errors import DataError
from mm.extract.claims import CLAIMS, Claims
from mm.extract.encode import ClipEncoder
from mm.extract.live.index import open_index, write_index
from mm.extract.live.parts import PART_BYTES, Allowance, Parts, kept_bytes, remove_copied, remove_left_behind
from mm.extract.live.store import LiveStore, Made
from mm.extract.plan import open_plan
from mm.extract.planning import settle_plan
from mm.extract.run import extract, open_encoders
from mm.extract.skipping import SKIPS, Skipping
from mm.extract.store import WORK, check_store, hold_against_plan

log = logging.getLogger(__name__)


def prepare(run: ExtractionRun) -> int:
    """Settle on the plan of an extraction and write the index of its rows; returns the bytes that are kept already.

    One process calls it, before any opens the store.

    Raises:
        ConfigError, DataError: what `mm.extract.run.extract` raises before it encodes, and `write_index`.
    """
    words = run.origins
    policy = parse_on_bad_sample(run.data.on_bad_sample, words["data.on_bad_sample"].name)
    recipe, store = extraction_recipe(run), Path(run.output.path)
    check_store(store, recipe, run.output.overwrite, words)
    make_folder(store, words["output.path"].place())
    reader = RowReader(annotated_sources(run.data), run.task)
    with Claims(store / WORK / CLAIMS) as claims:
        plan = settle_plan(run, store, recipe, reader, claims, policy)
        hold_against_plan(store, plan, Skipping(policy, plan.num_rows, store / WORK / SKIPS))
        if not is_sharded(store) and open_index(store, plan) is None:
            write_index(run, store, plan, reader, policy)
    remove_left_behind(store)
    return kept_bytes(store)


def open_live(run: ExtractionRun) -> LiveStore | None:
    """The store of an extraction that was prepared; None where it is finished, and read as any other.

    Raises:
        DataError: DATA-150 for a plan or an index that is damaged, DATA-190 where another process has planned anew.
    """
    store = Path(run.output.path)
    if is_sharded(store):
        return None
    plan = open_plan(store)
    index = None if plan is None else open_index(store, plan)
    if plan is None or index is None:
        found = f"The rows of {store} were planned anew while this training began."
        raise DataError("DATA-190", found, "Start it again; other rows, files or flags count now.")
    reader = RowReader(annotated_sources(run.data), run.task)
    return LiveStore(run, plan.recipe, plan, reader, index)


class LiveStores:
    """The live stores of a training. Leaving it, as a context manager, ends the parts that this process writes."""

    def __init__(self, runs: Sequence[ExtractionRun]) -> None:
        """Open those that are not finished; raises what `open_live` raises."""
        found = [(run, open_live(run)) for run in runs]
        self._open = [(run, store) for run, store in found if store is not None]
        self._stack = ExitStack()
        self.made = Made()

    @property
    def by_folder(self) -> Mapping[Location, LiveStore]:
        """The stores by their folders."""
        return {store.folder: store for _, store in self._open}

    def can_make(self, device: torch.device, most_bytes: int | None) -> None:
        """Let this process make features.

        Args:
            device: where the encoders come to stand, when the first of them is needed.
            most_bytes: that it may write in all; None for no limit.
        """
        allowance = Allowance(most_bytes)
        size = PART_BYTES if most_bytes is None else min(PART_BYTES, most_bytes // 4)
        encoders: dict[str, Callable[[], ClipEncoder]] = {}
        for run, store in self._open:
            named = f"{run.task.name} {run.encoders.model_dump_json()}"  # one set for stores of the same encoders
            if named not in encoders:
                encoders[named] = cache(partial(open_encoders, run.encoders, run.task, device))
            parts = self._stack.enter_context(Parts(store.folder, store.recipe_key, allowance, size))
            store.can_make(encoders[named], parts, self.made)

    def make_empty_captions(self) -> None:
        """Have the empty caption's embedding in every store."""
        for _, store in self._open:
            store.empty_prompt()

    def __enter__(self) -> LiveStores:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def finish(self, device: torch.device, budget: int | None) -> None:
        """Finish the stores of which all features are kept, by copying them, where the budget has room for copies.

        Any processes may call it at once, when none of them trains any more.

        Raises:
            DataError: what `mm.extract.run.extract` raises.
        """
        for run, store in self._open:
            size = kept_bytes(store.folder)
            if not store.is_all_kept:
                message = "%s holds %s of features that were made; mm run %s makes the rest and finishes the store"
                log.info(message, store.folder, format_bytes(size), run.origins.file)
            elif budget is not None and 2 * size > budget:
                message = "%s holds all features, and the budget has no room for finishing it; mm run %s does that"
                log.info(message, store.folder, run.origins.file)
            else:
                extract(run, device=device)
                remove_copied(store.folder)
