"""`mm data export STORE TARGET` and `mm data copy STORE TARGET`: a store in another format, or in another place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import Field
from tqdm import tqdm

from mm.cli.storage_flags import StorageFlags
from mm.config.exports import ExportFormat
from mm.config.flags import parse_flags
from mm.config.output import require_writable_folder
from mm.config.storage import Location, Storage, location_of
from mm.errors import ConfigError

JOBS = ("export", "copy")


class ExportFlags(StorageFlags):
    """Write the samples of a store of shards as WebDataset or Parquet, or a Parquet list of them.

    `mm data export STORE TARGET --to FORMAT [flags]`. Both may be `s3://...`. Started again it writes what is missing.
    """

    to: ExportFormat = Field(description="format of the files")


class CopyFlags(StorageFlags):
    """Copy a store of shards to another place, of which each may be `s3://...`; every byte of it is checked.

    `mm data copy STORE TARGET [flags]`. Started again it copies the shards that are missing.
    """


def main(job: str, argv: Sequence[str]) -> None:
    """Run one of the jobs, `export` or `copy`.

    Raises:
        ConfigError: CFG-006 for words that are not a store, a target and flags; CFG-131, CFG-230 for the target.
        DataError: what `mm.data.exports.export.export` and `mm.data.store.copying.copy_store` raise.
    """
    program = f"mm data {job} STORE TARGET"
    if list(argv) in (["-h"], ["--help"]):
        argv = ["STORE", "TARGET", "--help"]
    if len(argv) < 2 or (argv[1].startswith("-") and "--help" not in argv):
        raise ConfigError("CFG-006", f"mm data {job} takes a store and a target.", f"Give {program}.")
    if job == "copy":
        copy(*_places(argv, parse_flags(CopyFlags, argv[2:], program=program).storage()))
    else:
        flags = parse_flags(ExportFlags, argv[2:], program=program)
        export(*_places(argv, flags.storage()), flags.to)


def copy(source: Location, target: Location) -> None:
    """Copy a store; raises what `mm.data.store.copying.copy_store` raises."""
    from mm.data.store.copying import copy_store

    with _bar("copy") as done:
        manifest = copy_store(source, target, done)
    print(f"{manifest.samples} samples are in {manifest.shards} shards of {target}")


def export(source: Location, target: Location, to: ExportFormat) -> None:
    """Export a store; raises what `mm.data.exports.export.export` raises."""
    from mm.data.exports.export import export as write

    with _bar("export") as done:
        note = write(source, target, to, done)
    print(f"{note.samples} samples are in {note.files} files of {target}")


def _places(argv: Sequence[str], storage: Storage) -> tuple[Location, Location]:
    source, target = location_of(argv[0], storage), location_of(argv[1], storage)
    if isinstance(target, Path):
        require_writable_folder(target, "TARGET")
    return source, target


@contextmanager
def _bar(job: str) -> Iterator[Callable[[int, int], None]]:
    with tqdm(desc=job, unit="shard", disable=None) as bar:

        def done(count: int, total: int) -> None:
            bar.total = total
            bar.update(count - bar.n)

        yield done
