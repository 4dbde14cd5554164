"""`mm data`: `look` is another file; `status STORE` and `repair STORE` are about stores of shards."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

from pydantic import Field
from tqdm import tqdm

from mm.cli import data_export, data_look
from mm.cli.entry import run
from mm.cli.storage_flags import StorageFlags
from mm.config.flags import Flags, parse_flags
from mm.config.storage import Location, location_of
from mm.errors import ConfigError

_JOBS: tuple[Literal["status", "repair"], ...] = ("status", "repair")


class StatusFlags(StorageFlags):
    """Say what a store of shards holds: shards, samples, shapes, and whether it can be trained on.

    `mm data status STORE [flags]`
    """

    json_output: bool = Field(False, description="print one JSON object in place of lines")


class RepairFlags(Flags):
    """Read every shard of a store, and remove those that are damaged, so that they alone are made again.

    `mm data repair STORE [flags]`
    """

    dry_run: bool = Field(False, description="say what is damaged, remove nothing")


def main(argv: Sequence[str]) -> None:
    """Run one of the jobs.

    Raises:
        MMError: what `mm.cli.data_look.main` raises.
        ConfigError: CFG-006 for words that are no job and its store, and for flags.
        DataError: what `mm.data.store.repair` raises; DATA-157 for shards that are damaged, after they were removed.
    """
    if argv and argv[0] in ("-h", "--help"):
        print("usage: mm data look STORE|run.yaml|TRAINING-FLAGS --out page.html")
        print("       mm data status STORE [--json-output]\n       mm data repair STORE [--dry-run]")
        print("       mm data export STORE TARGET --to FORMAT\n       mm data copy STORE TARGET")
        return
    if argv and argv[0] == "look":
        data_look.main(argv[1:])
        return
    if argv and argv[0] in data_export.JOBS:
        data_export.main(argv[0], argv[1:])
        return
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

    found = store_status(store)
    if flags.json_output:
        shapes = [[*shape, count] for shape, count in found.shapes.most_common()]
        print(
            json.dumps({**asdict(replace(found, shapes=Counter())), "missing": list(found.missing), "shapes": shapes})
        )
        return
    state = "finished" if found.finished and not found.missing else "not finished"
    print(f"{store}: {state}, {found.samples} samples in {found.shards} shards, {format_bytes(found.body_bytes)}")
    if found.missing:
        print(f"{len(found.missing)} shards are missing: {', '.join(map(str, found.missing[:20]))}")
    if found.unfinished:
        print(f"{found.unfinished} shards are being written, or were left by a process that was killed")
    for shape, count in found.shapes.most_common():
        print(f"{count} samples of {list(shape)}")


def repair(store: Path, flags: RepairFlags) -> None:
    """Remove the shards of a store that are damaged.

    Raises:
        DataError: what `mm.data.store.repair.damaged_shards` raises, DATA-157 when a shard is damaged or missing.
    """
    from mm.data.files import raise_limited
    from mm.data.store.repair import catalog_is_whole, damaged_shards, drop_shards
    from mm.errors import Problem

    with tqdm(desc="shards", unit="shard", disable=None) as bar:

        def done(count: int, total: int) -> None:
            bar.total = total
            bar.update(count - bar.n)

        damaged = damaged_shards(store, done)
    if not damaged and catalog_is_whole(store):
        print(f"{store}: all shards are whole")
        return
    if not flags.dry_run:
        drop_shards(store, damaged)
    removed = "would be" if flags.dry_run else "were"
    message = f"{store}: {len(damaged)} shards are damaged or missing, and {removed} removed, with the manifest."
    remedy = "Run what wrote the store (mm migrate shards) again: it makes these shards only, and finishes it."
    facts = [problem for shard in damaged for problem in shard.problems[:1]]
    raise_limited([Problem("DATA-157", message, remedy), *facts])


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
