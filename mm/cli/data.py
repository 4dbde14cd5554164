"""`mm data`: `look` is another file; `status STORE` and `repair STORE` are about stores of shards."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field
from tqdm import tqdm

from mm.cli import data_export, data_look
from mm.cli.entry import run
from mm.cli.storage_flags import StorageFlags
from mm.config.flags import Flags, parse_flags
from mm.config.storage import Location, location_of
from mm.errors import ConfigError

if TYPE_CHECKING:
    from mm.extract.progress import Progress

_JOBS: tuple[Literal["status", "repair"], ...] = ("status", "repair")


class StatusFlags(StorageFlags):
    """Say what a store of shards holds, whether it can be trained on, and how far its extraction is.

    `mm data status STORE [flags]`
    """

    json_output: bool = Field(False, description="print one JSON object in place of lines")


class RepairFlags(Flags):
    """Read every shard of a store, and remove those that are damaged, so that they alone are made again.

    `mm data repair STORE [flags]`
    """

    dry_run: bool = Field(False, description="say what is damaged, remove nothing")
    retry_skipped: bool = Field(
        False, description="also have clips read again that an extraction left out, because they could not be read"
    )


def main(argv: Sequence[str]) -> None:
    """Run one of the jobs.

    Raises:
        MMError: what `mm.cli.data_look.main` raises.
        ConfigError: CFG-006 for words that are no job and its store, and for flags.
        DataError: what `mm.data.store.repair` raises; DATA-157 for shards that are damaged, after they were removed.
    """
    if argv and argv[0] in ("-h", "--help"):
        print("usage: mm data look STORE|run.yaml|TRAINING-FLAGS --out page.html")
        print("       mm data status STORE [--json-output]\n       mm data repair STORE [--dry-run] [--retry-skipped]")
        print("       mm data export STORE TARGET --to FORMAT\n       mm data copy STORE TARGET")
        return
    if argv and argv[0] == "look":
        data_look.main(argv[1:])
        return
    if argv and argv[0] in data_export.JOBS:
        data_export.main(argv[0], argv[1:])
        return
    if len(argv) == 2 and argv[0] in _JOBS and argv[1] in ("-h", "--help"):
        argv = [argv[0], "STORE", "--help"]
    if len(argv) < 2 or argv[0] not in _JOBS or (argv[1].startswith("-") and "--help" not in argv):
        found = f"mm data takes a job and a store, and got {' '.join(argv) or 'none'}."
        raise ConfigError("CFG-006", found, "Give mm data look, or mm data status, repair, export or copy, and STORE.")
    if argv[0] == "status":
        flags = parse_flags(StatusFlags, argv[2:], program="mm data status STORE")
        status(location_of(argv[1], flags.storage()), flags)
    else:
        repair(Path(argv[1]), parse_flags(RepairFlags, argv[2:], program="mm data repair STORE"))


def status(store: Location, flags: StatusFlags) -> None:
    """Print what a store holds; raises what `mm.data.store.repair.store_status` raises."""
    from mm.config.units import format_bytes
    from mm.data.store.repair import store_status
    from mm.extract.progress import extraction_progress

    found = store_status(store)
    progress = extraction_progress(store) if isinstance(store, Path) else None  # extraction writes local stores
    if flags.json_output:
        shapes = [[*shape, count] for shape, count in found.shapes.most_common()]
        said = {**asdict(replace(found, shapes=Counter())), "missing": list(found.missing), "shapes": shapes}
        if progress is not None:
            said["extraction"] = {**asdict(progress), "to_do": progress.to_do, "left_s": progress.left_s}
        print(json.dumps(said))
        return
    state = "finished" if found.finished and not found.missing else "not finished"
    print(f"{store}: {state}, {found.samples} samples in {found.shards} shards, {format_bytes(found.body_bytes)}")
    if found.missing:
        print(f"{len(found.missing)} shards are missing: {', '.join(map(str, found.missing[:20]))}")
    if progress is not None:
        _print_progress(progress)
    elif found.unfinished:
        print(f"{found.unfinished} shards are being written, or were left by a process that was killed")
    for shape, count in found.shapes.most_common():
        print(f"{count} samples of {list(shape)}")


def _print_progress(progress: Progress) -> None:
    """Print how far an extraction is, who works on what, and what failed."""
    meter = tqdm.format_meter(
        progress.rows_done, progress.rows, progress.elapsed_s, unit="sample", rate=progress.rate, ncols=100
    )
    print(f"extraction: {meter.strip()}")
    live = [one for one in progress.running if not one.is_expired]
    expired = len(progress.running) - len(live)
    counts = f"{progress.done} of {progress.runs} shards done, {len(live)} running, {expired} left by a worker"
    print(f"{counts}, {len(progress.failed)} failed, {progress.to_do} to do; {progress.skipped} clips left out")
    if progress.kept:
        print(f"{progress.kept} samples are kept to be copied: made by trainings (--live), or of former shards")
    for one in progress.running:
        gone = ", which is gone" if one.is_expired else ""
        when = f"since {one.since_s / 60:.1f} min, seen {one.seen_s:.0f} s ago"
        print(f"shard {one.run}: process {one.pid} of {one.host}{gone}, {when}")
    for failure in progress.failed:
        print(f"shard {failure.run}: failed on {failure.host}, {failure.error}: {failure.message}")


def repair(store: Path, flags: RepairFlags) -> None:
    """Remove the shards of a store that are damaged.

    Raises:
        DataError: what `mm.data.store.repair.damaged_shards` raises, DATA-157 when a shard is damaged or missing.
    """
    from mm.data.files import raise_limited
    from mm.data.store.repair import (
        catalog_is_whole,
        damaged_shards,
        delete_shard,
        drop_shards,
        shards_that_lack_clips,
    )
    from mm.errors import Problem
    from mm.extract.former import put_aside
    from mm.extract.plan import PLAN

    with tqdm(desc="shards", unit="shard", disable=None) as bar:

        def done(count: int, total: int) -> None:
            bar.total = total
            bar.update(count - bar.n)

        damaged = damaged_shards(store, done)
    drop = put_aside if (store / PLAN).is_dir() else delete_shard  # an extraction takes over what is whole in them
    if not damaged and catalog_is_whole(store):
        print(f"{store}: all shards are whole")
        lacking = shards_that_lack_clips(store) if flags.retry_skipped else []
        if lacking and not flags.dry_run:
            drop_shards(store, lacking, drop)
            print(f"The next extraction reads the clips again that {len(lacking)} shards lack.")
        return
    if not flags.dry_run:
        drop_shards(store, [shard.number for shard in damaged], drop)
    removed = "would be" if flags.dry_run else "were"
    message = f"{store}: {len(damaged)} shards are damaged or missing, and {removed} removed, with the manifest."
    remedy = (
        "Run what wrote the store (mm extract, mm migrate shards) again: it makes these shards only, and finishes it."
    )
    facts = [problem for shard in damaged for problem in shard.problems[:1]]
    raise_limited([Problem("DATA-157", message, remedy), *facts])


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
