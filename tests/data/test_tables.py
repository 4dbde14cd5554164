"""Tables of rows against Python's own readers of JSON and CSV, and how much of one is in memory."""

import csv
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from mm.data import tables
from mm.data.tables import Form, open_table
from mm.errors import DataError


def rows_of(path: Path) -> list[Any]:
    rows = list(open_table(path, "DATA-060"))
    assert [row.problem for row in rows] == [None] * len(rows)
    return [row.value for row in rows]


def some_rows(count: int) -> list[Any]:
    """Rows with what is hard to cut: escapes, brackets and quotes in text, numbers, nested lists."""
    drawn = random.Random(5)
    pieces = ["é", '"', "\\", "[", "]", "{", "}", ",", "\n", "😀", "\u2028", "word ", "\t", "1e5"]
    return [
        {"text": "".join(drawn.choices(pieces, k=drawn.randrange(40))), "n": [drawn.uniform(-1e9, 1e9), None, True]}
        for _ in range(count)
    ]


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 2**20])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_an_array_is_read_the_same_wherever_it_is_cut(
    chunk: int, ascii_only: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "CHUNK", chunk)
    rows = [*some_rows(40), 12, -3.5e7, "x", None, True, []]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=ascii_only), encoding="utf-8")
    assert rows_of(path) == json.loads(path.read_text(encoding="utf-8")) == rows


@pytest.mark.parametrize("chunk", [1, 5, 2**20])
@pytest.mark.parametrize(
    ("content", "place"),
    [
        ('[{"a": 1},\n {"a": }]', "Expecting value: line 2 column 8 (char 18)"),
        ('[{"a": 1}\n {"a": 2}]', "Expecting ',' or the end of the list: line 2 column 2 (char 11)"),
        ('[{"a": 1}] x', "Extra data: line 1 column 12 (char 11)"),
        ('[{"a": "b', "Unterminated string starting at: line 1 column 8 (char 7)"),
        ('[{"a": 1}, {"a": 1, "a": 2}]', "a key occurs twice"),
        ('[{"a": Infinity}]', "Infinity is not a JSON number"),
    ],
)
def test_where_an_array_is_wrong(
    chunk: int, content: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the words and at the place of Python's reader, where it reads the whole file."""
    monkeypatch.setattr(tables, "CHUNK", chunk)
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        list(open_table(path, "DATA-060"))
    assert caught.value.id == "DATA-060" and place in str(caught.value)


def test_csv_is_what_python_s_reader_gives(tmp_path: Path) -> None:
    """Quoted line ends, commas and quotes, CRLF, a byte order mark, Chinese; and each row's own text."""
    drawn = random.Random(3)
    pieces = ["a", ",", '"', "\n", "\r\n", "一", " ", "'", ";"]
    rows = [["".join(drawn.choices(pieces, k=6)) for _ in range(3)] for _ in range(50)]
    path = tmp_path / "data.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([["x", "y", "z"], *rows])
    table = open_table(path, "DATA-060")
    read = list(table)
    assert table.form is Form.CSV and table.header.columns == ("x", "y", "z")
    assert [list(row.value.values()) for row in read] == rows
    assert [next(csv.reader(row.text.splitlines(keepends=True))) for row in read] == rows
    (tmp_path / "again.csv").write_text(table.text_of(read[::2]), encoding="utf-8", newline="")
    assert [list(row.value.values()) for row in open_table(tmp_path / "again.csv", "X")] == rows[::2]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"x,y\n", "lists no samples"),
        (b"x,x\n1,2\n", "names columns twice: x"),
        (b"x,\n1,2\n", "without a name"),
        (b'"x,y\n1,2\n', "no CSV"),
        (b"x,y\n1,\xff\n", "cannot be read"),
    ],
)
def test_csv_that_is_no_table(content: bytes, found: str, tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_bytes(content)
    with pytest.raises(DataError, match=found) as caught:
        list(open_table(tmp_path / "data.csv", "DATA-060"))
    assert caught.value.id == "DATA-060"


def test_rows_of_csv_that_cannot_be_read_name_their_line(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text('x,y\n1,"2\n2"\n1\n\n1,2,3\n"a"b,2\n1,2\n', newline="")
    rows = list(open_table(tmp_path / "data.csv", "DATA-060"))
    assert [(row.line, row.problem.id if row.problem else row.value) for row in rows] == [
        (2, {"x": "1", "y": "2\n2"}),
        (4, "DATA-061"),
        (6, "DATA-061"),
        (7, "DATA-060"),
        (8, {"x": "1", "y": "2"}),
    ]


@pytest.mark.parametrize(
    "name", ["rows.csv", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("rows.json", "rows.jsonl"))]
)
def test_memory_does_not_grow_with_the_table(name: str, tmp_path: Path) -> None:
    """Ten times as many rows take as much memory while they are gone through, up to one piece of the file."""
    peaks = []
    for count in (20_000, 200_000):
        path = tmp_path / name
        lines = [json.dumps({"path": f"videos/{i}.mp4", "cap": "a red circle " * 2}) for i in range(count)]
        if name.endswith(".csv"):
            lines = ["path,cap", *(f'videos/{i}.mp4,"a red, circle"' for i in range(count))]
        is_array = name.endswith(".json")
        path.write_text("[" + ",\n".join(lines) + "]" if is_array else "\n".join(lines))
        del lines
        tracemalloc.start()
        assert sum(1 for _ in open_table(path, "DATA-060")) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 2 * tables.CHUNK and peaks[1] < 8 * tables.CHUNK
