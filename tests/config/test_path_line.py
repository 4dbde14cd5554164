"""Lists of paths: what the program writes is read back, and what people write by hand is read as the paths it names."""

import csv
from pathlib import Path

import pytest

from mm.config.data import data_source_line, data_sources, store_sources
from mm.config.path_line import LineError, read_paths, write_paths
from mm.config.storage import Storage
from mm.demo.configs import write_configs
from mm.errors import ConfigError

NAMES = [
    "run 1, final",
    "a,b,,c",
    'the "best" one',
    '"quoted"',
    "#5",
    " space in front",
    "space behind ",
    "run[1]*?",
    "a=b'c\\d",
    "run \u2028 1\x0b\x0c\x85",
    "été 一,个\u3000",
    ",",
]


def listed(tmp_path: Path, *lines: str) -> str:
    path = tmp_path / "list.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("exists", [True, False])
def test_a_written_line_is_read_back(tmp_path: Path, name: str, exists: bool) -> None:
    """Whatever is there: `a` and `a,b` may both exist."""
    folder = tmp_path / name
    if exists:
        folder.mkdir()
    for part in name.split(","):
        (tmp_path / part).mkdir(exist_ok=True)
    raw = listed(tmp_path, "# a comment", "", data_source_line(folder, "data.json"))
    assert [(s.folder, s.annotation) for s in data_sources(raw)] == [(folder, folder / "data.json")]
    features = listed(tmp_path, data_source_line(folder))
    assert [s.folder for s in store_sources(features, None, "data.jsonl", Storage())] == [folder]
    pair = [str(folder / "first.png"), str(folder / "last.png")]
    assert read_paths(write_paths(pair, ", "), (2,), lambda _: False) == tuple(pair)


@pytest.mark.parametrize("name", NAMES)
def test_the_lists_of_the_embedded_default_are_read_back(tmp_path: Path, name: str) -> None:
    home = tmp_path / name
    home.mkdir()
    write_configs(home / "configs", home)
    for task, features in (("", "features"), ("i2v", "features_i2v"), ("flf2v", "features_flf2v")):
        raw = str(home / "configs" / task / "data.txt")
        assert [s.annotation for s in data_sources(raw)] == [home / "dataset" / "data.json"]
        made = str(home / "configs" / task / "feature_data.txt")
        assert [s.annotation for s in store_sources(made, None, "data.jsonl", Storage())] == [
            home / features / "data.jsonl"
        ]


@pytest.mark.parametrize("path", ["two\nlines", "a\rb", "\udcff"])
def test_a_path_that_no_line_can_hold_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="CFG-130"):
        write_paths([path])


def test_quotes_are_those_of_csv(tmp_path: Path) -> None:
    """Written by Python's csv module with other settings than ours."""
    folders = ['a, "b"', "plain", " x "]
    with (tmp_path / "list.txt").open("w", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_NONNUMERIC).writerows([folder, "d.json"] for folder in folders)
    sources = data_sources(str(tmp_path / "list.txt"))
    assert [str(source.folder) for source in sources] == folders


def test_a_line_without_quotes_is_what_it_names(tmp_path: Path) -> None:
    folder = tmp_path / "run 1, final"
    folder.mkdir()
    (folder / "data.json").touch()
    raw = listed(tmp_path, f"{folder},data.json", f"{folder},{folder}/data.json")
    assert [(s.folder, s.annotation) for s in data_sources(raw)] == [(folder, folder / "data.json")] * 2
    features = listed(tmp_path, str(folder))
    assert [s.annotation for s in store_sources(features, None, "data.jsonl", Storage())] == [folder / "data.jsonl"]
    (tmp_path / "run 1").mkdir()  # this alone makes no second reading: the annotation would be "final"
    assert [s.folder for s in store_sources(features, None, "data.jsonl", Storage())] == [folder]


def test_a_line_of_two_meanings_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a,b").mkdir()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").touch()
    features = listed(tmp_path, f"{tmp_path}/a,b")
    with pytest.raises(ConfigError, match=r"CFG-054.*line 1.*several ways.*double quotes"):
        store_sources(features, None, "data.jsonl", Storage())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a,b,c", "2 commas"),
        ("a", "1 paths"),
        (",b", "empty path"),
        ('"a,b', "do not belong together"),
        ('"a"b,c', "do not belong together"),
        ('"a","b","c"', "3 paths"),
        ('"","b"', "empty path"),
        ("a\0,b", "NUL"),
    ],
)
def test_a_line_that_names_no_two_paths(line: str, said: str) -> None:
    with pytest.raises(LineError, match=said):
        read_paths(line, (2,), lambda _: False)
