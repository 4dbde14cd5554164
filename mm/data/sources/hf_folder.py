"""metadata.jsonl and .csv of Hugging Face's ImageFolder and VideoFolder: `file_name` beside the files, and their text.

A column that ends in `_file_name` or `_file_names` names further files, whose role is the word in front.
"""

from __future__ import annotations

from collections.abc import Sequence

from mm.config.data import DataSource
from mm.config.tasks.task import Column
from mm.data.sources.base import Dialect, OpenSource, Taken
from mm.data.sources.cells import Cells
from mm.data.sources.table import CellSource, target

_CAPTIONS = ("text", "caption", "prompt")
_BESIDE = ("_file_name", "_file_names")


def _take(cells: Cells, source: DataSource, /) -> Taken | None:
    path = cells.path("file_name")
    named = [name for name in _CAPTIONS if cells.has(name)]
    if len(named) > 1:
        cells.wrong(f" has captions in {' and '.join(named)}.", "Keep one of these columns.")
    chosen = named[0] if named else _CAPTIONS[0]
    captions = cells.captions(chosen)
    for name in _CAPTIONS:
        if name != chosen:  # null, or told above
            cells.take(name)
    roles = {}
    for name in cells.names():
        if role := next((name.removesuffix(end) for end in _BESIDE if name.endswith(end)), ""):
            roles[role] = cells.files(name, source.folder)
    kind = cells.kind(path) if path is not None else "video"
    return target(path, captions, source, kind=kind, roles={role: paths for role, paths in roles.items() if paths})


def _open(source: DataSource, columns: Sequence[Column], /) -> OpenSource:
    return CellSource(source, columns, take=_take, path_columns=("file_name",), caption_columns=_CAPTIONS)


HF_FOLDER = Dialect("hf-folder", (frozenset({"file_name"}),), _open)
