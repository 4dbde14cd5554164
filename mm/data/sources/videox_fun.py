"""VideoX-Fun's metadata.json and .csv: `file_path`, `text`, `type`, `control_file_path`, `width`, `height`.

There a row without `type` is an image, and a video that is opened as one fails and is replaced by another row, time
and again. Here a row without `type` is what the ending of its file says, which is the same for every file that can be
read there. A control file that ends in `.txt` is a camera's path. Paths start from the data set's folder; absolute
ones, which win there, are refused like everywhere here; those of objects, which are not joined with the folder there,
start from it too.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import PurePosixPath

from mm.config.data import DataSource
from mm.config.tasks.task import Column
from mm.data.metadata import Resolution
from mm.data.sources.base import Dialect, OpenSource, SourceRow, Taken
from mm.data.sources.cells import Cells
from mm.data.sources.table import UNUSED_COLUMNS, CellSource, target
from mm.data.tables import TableRow

log = logging.getLogger(__name__)

_TYPES = ("video", "image")
_FACTS = frozenset({"width", "height"})


def _take(cells: Cells, source: DataSource, /) -> Taken | None:
    path, captions, said = cells.path("file_path"), cells.captions("text"), cells.text("type")
    if said not in (None, *_TYPES):
        cells.wrong(f": type is {said!r}.", "Give video or image.")
        said = None
    width, height = cells.count("width"), cells.count("height")
    if (width is None) != (height is None) and not cells.problems:
        cells.wrong(f" has {'a height' if width is None else 'a width'} alone.", "Give both, or neither.")
    resolution = Resolution(height=height, width=width) if width is not None and height is not None else None
    control = cells.files("control_file_path", source.folder)
    is_camera = any(PurePosixPath(file).suffix.lower() == ".txt" for file in control)
    found = {"camera" if is_camera else "control": control, "object": cells.files("object_file_path", source.folder)}
    roles = {role: files for role, files in found.items() if files}
    kind = cells.kind(path, said) if path is not None else "video"
    return target(path, captions, source, kind=kind, roles=roles, resolution=resolution)


class _VideoxFun(CellSource):
    """A table that tells, once, that kinds of files come from their endings."""

    _told = False

    def read(self, number: int, row: TableRow) -> SourceRow:
        """Read a row whole."""
        if not self._told and isinstance(row.value, dict) and not row.value.get("type"):
            log.info("%s: rows without type are what the endings of their files say", self.source.annotation)
            self._told = True
        return super().read(number, row)


def _open(source: DataSource, columns: Sequence[Column], /) -> OpenSource:
    return _VideoxFun(
        source,
        columns,
        take=_take,
        path_columns=("file_path",),
        caption_columns=("text",),
        unused=UNUSED_COLUMNS - _FACTS,
    )


VIDEOX_FUN = Dialect("videox-fun", (frozenset({"file_path"}),), _open)
