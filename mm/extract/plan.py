"""Plan of an extraction: the rows of all data sets, cut into runs that become shards. It is written once.

    STORE/plan/rows.txt   the text of each row, as it stands in its table
    STORE/plan/plan.bin   where each text is, the kind of its sample's id, and for each run of rows the digest of what
                          its shard is made from

The plan is a function of the rows, the recipe and the size of a shard, and of nothing else: shards of any workers, in
any number, are equal byte for byte. A worker maps it and reads the rows of the shards that it makes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from uuid import uuid4

import numpy as np

from mm.data.files import TEMPORARY_PREFIX, sync_folder, write_error
from mm.data.store.checksum import DIGEST_BYTES
from mm.data.store.table import Table, open_table, read_table_header
from mm.errors import DataError

PLAN = "plan"
KIND = "extraction plan"
TABLE = "plan.bin"
ROWS = "rows.txt"
_REMEDY = "Remove the store's folder plan; the next extraction writes it again, and keeps the shards."


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """One row of the plan: its data set, its number there, its text and line, and the kind of its sample's id."""

    source: int
    number: int
    text: str
    line: int | None
    kind: int


class Plan:
    """A plan, open. Run `r` of rows becomes shard `r + d * num_runs` for each draw `d`."""

    def __init__(self, folder: Path, table: Table) -> None:
        self._folder = folder
        about = table.header.about
        self.key: str = about["key"]
        self.recipe: str = about["recipe"]
        self.inputs: str | None = about["inputs"]
        self.looked: bool = about["looked"]
        self.num_rows: int = about["rows"]
        self.shard_rows: int = about["shard_rows"]
        self.draws: int = about["draws"]
        self._first: Sequence[int] = about["sources"]
        self._columns = table.columns

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def num_runs(self) -> int:
        """Number of runs of rows."""
        return -(-self.num_rows // self.shard_rows)

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return self.num_runs * self.draws

    def shards_of(self, run: int) -> list[int]:
        """The shards of a run, by draw."""
        return [run + draw * self.num_runs for draw in range(self.draws)]

    def rows_in(self, run: int) -> int:
        """Number of rows of a run."""
        return min(self.shard_rows, self.num_rows - run * self.shard_rows)

    def made_from(self, shard: int) -> str:
        """Digest of what a shard is made from: recipe, rows, draw, and files as far as they were looked at."""
        digest = bytes(self._columns["digests"][shard % self.num_runs]).hex()
        draw = shard // self.num_runs
        return f"{digest}/{draw}" if draw else digest

    def rows(self, run: int) -> list[PlannedRow]:
        """The rows of a run.

        Raises:
            DataError: DATA-150 when they are not those that were planned, DATA-072 when they cannot be read.
        """
        begin, end = run * self.shard_rows, run * self.shard_rows + self.rows_in(run)
        offsets = [int(offset) for offset in self._columns["offsets"][begin : end + 1]]
        path = self._folder / ROWS
        try:
            with open(path, "rb") as file:
                file.seek(offsets[0])
                content = file.read(offsets[-1] - offsets[0])
        except OSError as error:
            raise DataError("DATA-072", f"{path} cannot be read ({error}).", "Check the disk it is on.") from None
        if blake2b(content, digest_size=DIGEST_BYTES).digest() != bytes(self._columns["texts"][run]):
            raise DataError("DATA-150", f"{path} is damaged: rows {begin + 1} to {end} are others.", _REMEDY)
        lines = self._columns["lines"]
        rows = []
        for place, index in enumerate(range(begin, end)):
            source = int(np.searchsorted(self._first, index, side="right")) - 1
            text = content[offsets[place] - offsets[0] : offsets[place + 1] - offsets[0]]
            line = int(lines[index]) if len(lines) else 0
            number = index - self._first[source] + 1
            kind = int(self._columns["kinds"][index])
            rows.append(PlannedRow(source, number, text.decode(errors="surrogateescape"), line or None, kind))
        return rows


def open_plan(store: Path, draft: Path | None = None) -> Plan | None:
    """The plan of a store, if it has one, or a draft of one.

    Raises:
        DataError: DATA-150 for one that is damaged.
    """
    path = (draft or store / PLAN) / TABLE
    return Plan(path.parent, open_table(path, KIND, _REMEDY)) if path.exists() else None


def plan_key(store: Path) -> str | None:
    """Key of a store's plan as it is now; None where there is none."""
    path = store / PLAN / TABLE
    return read_table_header(path, KIND, _REMEDY).about["key"] if path.exists() else None


def install(store: Path, draft: Path) -> Plan:
    """Make a draft the plan of a store, in place of another.

    Raises:
        DataError: DATA-018 when it cannot be renamed.
    """
    target, aside = store / PLAN, store / f"{TEMPORARY_PREFIX}plan-{uuid4().hex[:12]}"
    try:
        if target.exists():
            os.rename(target, aside)
        os.rename(draft, target)
        sync_folder(store)
    except OSError as error:
        raise write_error(target, 0, error) from error
    shutil.rmtree(aside, ignore_errors=True)
    plan = open_plan(store)
    if plan is None:
        raise ValueError("a plan that was written is not there")
    return plan
