"""Walks through folders of media."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mm.errors import DataError

log = logging.getLogger(__name__)


def files_below(root: Path, endings: frozenset[str]) -> Iterator[str]:
    """Paths below a folder of all files with one of some endings, in the order of their names, folder by folder.

    Links to folders are followed, except to one that they lie in. Names that begin with a dot are left out. The log
    says at the end how many files with other endings there are.

    Args:
        root: the folder. endings: in lower case; those of files may be in any.

    Raises:
        DataError: DATA-173 for a folder that cannot be listed.
    """
    others: Counter[str] = Counter()
    yield from _walk(root, "", endings, others, (root.resolve(),))
    if others:
        counts = ", ".join(f"{count} {ending or 'without an ending'}" for ending, count in sorted(others.items()))
        log.info("%s: files of other kinds are no samples: %s", root, counts)


def _walk(
    root: Path, below: str, endings: frozenset[str], others: Counter[str], around: tuple[Path, ...]
) -> Iterator[str]:
    """`around` are the folders that this one lies in, itself among them."""
    try:
        with os.scandir(root / below) as entries:
            found = sorted((entry.name, _leads_to_a_folder(entry)) for entry in entries if entry.name[0] != ".")
    except OSError as error:
        message = f"The folder {root / below} cannot be listed: {error.strerror or error}."
        raise DataError("DATA-173", message, "Correct its permissions, or move it away.") from None
    for name, is_folder in found:
        path = f"{below}/{name}" if below else name
        if not is_folder:
            ending = PurePosixPath(name).suffix.lower()
            if ending in endings:
                yield path
            else:
                others[ending] += 1
            continue
        here = (root / path).resolve()
        if here in around:
            log.info("%s leads back to a folder that it lies in, and is not followed", root / path)
        else:
            yield from _walk(root, path, endings, others, (*around, here))


def _leads_to_a_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links; as a file it is told by its name
        return False
