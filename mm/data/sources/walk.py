"""Walks through folders of media."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

log = logging.getLogger(__name__)


def files_below(root: Path, endings: frozenset[str]) -> Iterator[str]:
    """Paths below a folder of all files with one of some endings, in the order of their names, folder by folder.

    Links to folders are followed, except to one that they lie in. Names that begin with a dot are left out. The log
    says at the end how many files with other endings there are.

    Args:
        root: the folder. endings: in lower case; those of files may be in any.
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
    with os.scandir(root / below) as entries:
        found = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
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
