"""All dialects of metadata, and which of them a file is in."""

from __future__ import annotations

import logging

from mm.config.data import DataSource
from mm.data.sources.base import Dialect
from mm.data.sources.diffsynth import DIFFSYNTH
from mm.data.sources.hf_folder import HF_FOLDER
from mm.data.sources.mindspeed import MINDSPEED
from mm.data.sources.simpletuner import SIMPLETUNER
from mm.data.sources.videox_fun import VIDEOX_FUN
from mm.data.tables import Form, Table, open_table
from mm.errors import DataError

log = logging.getLogger(__name__)

DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect for dialect in (MINDSPEED, VIDEOX_FUN, DIFFSYNTH, SIMPLETUNER, HF_FOLDER)
}


def dialect_of(source: DataSource) -> Dialect:
    """The dialect that a source names, or else the one that the columns of its first row tell.

    JSON of which the first row tells nothing is taken for MindSpeed-MM's, which then says what its rows lack.

    Raises:
        DataError: DATA-060 for a file that cannot be read, DATA-170 where its columns are of no dialect or of several.
    """
    if source.format is not None:
        return DIALECTS[source.format]
    table = open_table(source.annotation, "DATA-060")
    columns = _first_columns(table)
    found = [dialect for dialect in DIALECTS.values() if all(group & columns for group in dialect.marks)]
    if len(found) == 1:
        log.info("%s is read as %s, which its first row tells", source.annotation, found[0].name)
        return found[0]
    if not found and table.form is not Form.CSV:
        return MINDSPEED
    names = [dialect.name for dialect in found or DIALECTS.values()]
    told = f"may be read as {' or '.join(names)}" if found else "are those of no format that is read here"
    message = f"{source.annotation} begins with the columns {', '.join(sorted(columns)):.200}, which {told}."
    remedy = f"Say which it is with data.format ({', '.join(names)})"
    more = "." if found else ", and see that the first row names the columns, with commas between them."
    raise DataError("DATA-170", message, remedy + more)


def _first_columns(table: Table) -> frozenset[str]:
    """Columns of the first row that has any; a file without one is for its reader to refuse."""
    if table.form is Form.CSV:
        return frozenset(table.header.columns)
    try:
        return next((frozenset(row.value) for row in table if isinstance(row.value, dict)), frozenset())
    except DataError:
        return frozenset()
