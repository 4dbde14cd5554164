"""Files that survive a crash: written under a temporary name, forced to disk, then given their name in one step."""

from __future__ import annotations

import filecmp
import glob
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from mm.checkpoint import fault
from mm.config.units import format_bytes
from mm.errors import CheckpointError

log = logging.getLogger(__name__)

# Space left free beside what is written, for logs and the small files of the protocol.
RESERVE_BYTES = 64 * 2**20
_DIGITS = 12  # of a temporary name


@contextmanager
def writing_errors() -> Iterator[None]:
    """Turn an operating system error into a `CheckpointError` CKPT-031 that names the file."""
    try:
        yield
    except OSError as error:
        where = error.filename or "the checkpoint folder"
        raise CheckpointError(
            "CKPT-031",
            f"{where} cannot be read or written: {error.strerror or error}.",
            "Check the path, its permissions and the free space; checkpoints committed before are untouched.",
        ) from error


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to disk, so that a name survives a power loss."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_new(path: Path, text: str) -> None:
    """Create a text file that must not exist yet, and force it to disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str, before_replacing: str = "") -> None:
    """Give `path` the content `text` in one step: readers see the old content or the new, never a part.

    Args:
        path: the file, which need not exist.
        text: its new content.
        before_replacing: a fault point to pass when the new content is on disk under a temporary name.
    """
    draft = path.with_name(temporary_name(path.name))
    try:
        write_new(draft, text)
        if before_replacing:
            fault.point(before_replacing)
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def temporary_name(name: str) -> str:
    """A name no other process uses: hidden, recognisable, unique."""
    return f".tmp-{name}-{uuid4().hex[:_DIGITS]}"


def remove_drafts(folder: Path, names: str) -> None:
    """Delete files that killed processes left under `temporary_name` of these names; only while nobody writes them.

    Args:
        folder: of the files. names: a pattern of their names, `epoch-*.safetensors`.
    """
    for draft in folder.glob(f".tmp-{names}-{'[0-9a-f]' * _DIGITS}"):
        log.info("%s is removed, which a run that was killed has left", draft)
        draft.unlink(missing_ok=True)


def require_free_space(folder: Path, num_bytes: int) -> None:
    """Check before writing that `num_bytes` will fit below `folder`, with a fifth to spare.

    Raises:
        CheckpointError: CKPT-030 when they will not.
    """
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    needed = num_bytes * 6 // 5 + RESERVE_BYTES
    if free < needed:
        raise CheckpointError(
            "CKPT-030",
            f"{folder} has {format_bytes(free)} free, {format_bytes(needed)} are needed.",
            "Free some space or choose another folder; nothing was written and what exists is untouched.",
        )


def remove_folder(folder: Path) -> None:
    """Delete a folder; what cannot be deleted is reported and left."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("%s could not be deleted: %s", folder, error)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name when the block ends well, and vanishes when it does not.

    Raises:
        CheckpointError: CKPT-020 when `target` exists and is not an empty folder, CKPT-031 when it cannot be written.
    """
    with writing_errors():
        require_absent(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        warn_of_leftovers(target.parent, target.name)
        temporary = target.parent / temporary_name(target.name)
        temporary.mkdir()
        try:
            fault.point("convert.folder_created")
            yield temporary
            fault.point("convert.files_written")
            sync_folder(temporary)
            fault.point("convert.before_rename")
            temporary.rename(target)  # an empty folder is replaced; anything that appeared meanwhile is not
        except BaseException:
            remove_folder(temporary)
            raise
        sync_folder(target.parent)
        fault.point("convert.committed")


@contextmanager
def added_files(target: Path, last: str, rivals: Iterable[str] = ()) -> Iterator[Path]:
    """A temporary folder in the folder `target`, whose entries are moved into `target` when the block ends well.

    An entry that a run before has moved, and that holds the same bytes, stays: so a run that was killed between two
    moves is finished by the same command.

    Args:
        target: keeps what is in it. last: the entry without which the others are nothing; it is moved at the end.
        rivals: names in `target` that only entries may have.

    Raises:
        CheckpointError: CKPT-020 when an entry is there already with another content, or a rival, CKPT-031 when
            `target` cannot be written; `target` is then as it was.
    """
    moved: list[Path] = []
    with writing_errors():
        warn_of_leftovers(target, target.name)
        temporary = target / temporary_name(target.name)
        temporary.mkdir(mode=0o750)
        try:
            fault.point("convert.folder_created")
            yield temporary
            fault.point("convert.files_written")
            for folder in (temporary, *(entry for entry in temporary.rglob("*") if entry.is_dir())):
                sync_folder(folder)
            entries = sorted(temporary.iterdir(), key=lambda entry: (entry.name == last, entry.name))
            new = [entry for entry in entries if not _same_content(entry, target / entry.name)]
            strange = {*rivals} - {entry.name for entry in entries}
            for name in (*(entry.name for entry in new), *sorted(strange)):
                require_absent(target / name)
            for entry in new:
                moved.append(entry.rename(target / entry.name))
                fault.point("convert.entry_moved")
            sync_folder(target)
        except BaseException:
            for entry in moved:
                if entry.is_dir():
                    remove_folder(entry)
                else:
                    entry.unlink(missing_ok=True)
            raise
        finally:
            remove_folder(temporary)


def require_addable(target: Path, names: Iterable[str], last: str) -> None:
    """Refuse at once what `added_files` would refuse in the end, or would mix with what is in `target`.

    Args:
        target: need not exist. names: of entries that must not be there, unless a run of `added_files` was killed in
            `target`, whose entries are compared when they are written. last: as in `added_files`.

    Raises:
        CheckpointError: CKPT-020.
    """
    require_absent(target / last)
    if next(_leftovers(target, target.name), None) is None:
        for name in names:
            require_absent(target / name)


def warn_of_leftovers(folder: Path, name: str) -> None:
    """Say which temporary folders for `name` are in `folder`."""
    for leftover in _leftovers(folder, name):
        log.warning("%s was left by an interrupted conversion or belongs to one that runs; delete it.", leftover)


def _leftovers(folder: Path, name: str) -> Iterator[Path]:
    return folder.glob(f".tmp-{glob.escape(name)}-*")


def _same_content(new: Path, old: Path) -> bool:
    """Compare a file or folder with another one, byte for byte."""
    if new.is_dir():
        names = sorted(entry.name for entry in new.iterdir())
        return (
            old.is_dir()
            and not old.is_symlink()
            and names == sorted(entry.name for entry in old.iterdir())
            and all(_same_content(new / name, old / name) for name in names)
        )
    return old.is_file() and not old.is_symlink() and filecmp.cmp(new, old, shallow=False)


def require_absent(target: Path) -> None:
    """Refuse a target that has content, instead of leaving it as it is or mixing with it.

    Raises:
        CheckpointError: CKPT-020.
    """
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise CheckpointError(
            "CKPT-020", f"The target {target} exists.", "Choose another target; nothing that is there was changed."
        )


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes to a new name and force them to disk."""
    with source.open("rb") as reader, target.open("xb") as writer:
        shutil.copyfileobj(reader, writer, length=2**24)
        writer.flush()
        os.fsync(writer.fileno())
