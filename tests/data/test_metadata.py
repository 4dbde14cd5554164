import json
import os
from pathlib import Path
from typing import Any

import pytest
from annotated import check_rows, load_samples
from feature_samples import write_clip

from mm.config.data import DataSource
from mm.config.tasks.speedcontrol import SPEEDCONTROL
from mm.data.features import feature_name
from mm.data.sources.cells import MAX_CAPTION_CHARACTERS
from mm.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_clip(tmp_path / "set" / "videos" / "one.mp4")
    write_clip(tmp_path / "set" / "other" / "one.mp4")
    write_clip(tmp_path / "outside.mp4")
    return tmp_path / "set"


def source(folder: Path, content: bytes | list[object]) -> DataSource:
    annotation = folder / "data.json"
    annotation.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return DataSource(folder, annotation)


def problems(folder: Path, content: bytes | list[object]) -> list[str]:
    with pytest.raises(DataError) as caught:
        load_samples([source(folder, content)])
    return [problem.id for problem in caught.value.problems]


GOOD = {"path": "videos/one.mp4", "cap": "a red circle"}


def test_guide_format(folder: Path) -> None:
    full = {**GOOD, "num_frames": 9, "fps": 24, "resolution": {"height": 48, "width": 64}, "cut": [2]}
    (sample,) = load_samples([source(folder, [full])])
    assert sample.id == "videos/one.mp4" and sample.file == (folder / "videos/one.mp4").resolve()
    assert sample.captions == ("a red circle",)


@pytest.mark.parametrize(
    "content",
    [
        b'\xef\xbb\xbf[{"path": "videos/one.mp4",\r\n "cap": "x"}]\r\n',
        b'\xef\xbb\xbf{"path": "videos/one.mp4", "cap": "x"}\r\n\r\n{"path": "other/one.mp4", "cap": ""}\r\n',
        '[{"path": "videos/one.mp4", "cap": "一个\u2028红色圆圈"}]'.encode(),
    ],
    ids=["array with BOM and CRLF", "JSONL with BOM and CRLF, empty caption", "Chinese caption"],
)
def test_accepted_with_a_note(content: bytes, folder: Path) -> None:
    assert load_samples([source(folder, content)])[0].id == "videos/one.mp4"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "DATA-060"),
        (b"[]", "DATA-060"),
        (b"[{", "DATA-060"),
        (b'[{"path": "a", "path": "b", "cap": "x"}]', "DATA-060"),
        (b'[{"path": "a", "fps": Infinity}]', "DATA-060"),
        (b'{"path": "a"\n{"path": "b"}', "DATA-060"),
        (b'[{"path": "videos/one.mp4", "cap": "\xff\xfe"}]', "DATA-060"),
        (b"[" * 100_000, "DATA-060"),
    ],
    ids=["empty", "no rows", "cut off", "key twice", "Infinity", "bad lines", "not UTF-8", "deep"],
)
def test_file_that_is_no_list_of_rows(content: bytes, expected: str, folder: Path) -> None:
    assert set(problems(folder, content)) == {expected}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"path": "videos/one.mp4"}, "DATA-062"),
        ({**GOOD, "cap": []}, "DATA-062"),
        ({**GOOD, "cap": None}, "DATA-062"),
        ({**GOOD, "cap": "x" * (MAX_CAPTION_CHARACTERS + 1)}, "DATA-062"),
        ({**GOOD, "cap": "\ud800"}, "DATA-061"),
        ({**GOOD, "cap": 3}, "DATA-061"),
        ({**GOOD, "cap": ["x", 3]}, "DATA-061"),
        ({"cap": "x"}, "DATA-061"),
        ({**GOOD, "num_frames": "81"}, "DATA-061"),
        ({**GOOD, "fps": 0}, "DATA-061"),
        ({**GOOD, "resolution": {"height": 480}}, "DATA-061"),
        ({**GOOD, "cut": []}, "DATA-061"),
        ({**GOOD, "crop": [0, 1, 0, 1]}, "DATA-061"),
        ("videos/one.mp4", "DATA-061"),
        ({**GOOD, "path": "videos/none.mp4"}, "DATA-001"),
        ({**GOOD, "path": "videos"}, "DATA-001"),
        ({**GOOD, "path": "fifo"}, "DATA-001"),
        ({**GOOD, "path": ""}, "DATA-063"),
        ({**GOOD, "path": "."}, "DATA-063"),
        ({**GOOD, "path": "/etc/passwd"}, "DATA-063"),
        ({**GOOD, "path": "../outside.mp4"}, "DATA-063"),
        ({**GOOD, "path": "videos/../../outside.mp4"}, "DATA-063"),
        ({**GOOD, "path": "videos/one.mp4\0"}, "DATA-063"),
        ({**GOOD, "path": "\udc80"}, "DATA-061"),
        ({**GOOD, "path": "folder-link/../outside.mp4"}, "DATA-063"),
        ({**GOOD, "path": "loop"}, "DATA-001"),
        ({**GOOD, "path": "dangling"}, "DATA-001"),
        ({**GOOD, "path": "x" * 5000}, "DATA-001"),
        ({**GOOD, "num_frames": 80.5}, "DATA-061"),
        ({**GOOD, "cut": [1.5]}, "DATA-061"),
        ({**GOOD, "cap": float("nan")}, "DATA-062"),
        ({**GOOD, "aesthetics": 5.1}, "DATA-061"),
    ],
)
def test_rows_that_cannot_be_used(row: object, expected: str, folder: Path) -> None:
    os.mkfifo(folder / "fifo")
    (folder / "folder-link").symlink_to(folder.parent)
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "dangling").symlink_to(folder / "nothing")
    assert set(problems(folder, [row])) == {expected}


def test_links_are_followed_wherever_they_lead(folder: Path, tmp_path: Path) -> None:
    """Inside the folder, out of it, through a folder, as caches of hubs have them, and to the folder itself."""
    (folder / "inside.mp4").symlink_to("videos/one.mp4")
    (folder / "disk.mp4").symlink_to(tmp_path / "outside.mp4")
    (folder / "below").symlink_to(tmp_path)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "outside.mp4").rename(tmp_path / "blobs" / "0123")
    (folder / "deep").mkdir()
    (folder / "deep" / "hub.mp4").symlink_to("../../blobs/0123")
    (tmp_path / "outside.mp4").symlink_to(tmp_path / "blobs" / "0123")
    (tmp_path / "link").symlink_to(folder)
    paths = ["inside.mp4", "disk.mp4", "below/outside.mp4", "deep/hub.mp4", "videos/one.mp4"]
    source(folder, [{**GOOD, "path": path} for path in paths])
    samples = load_samples([DataSource(tmp_path / "link", tmp_path / "link" / "data.json")])
    assert [sample.id for sample in samples] == paths
    wanted = [(folder / "videos" / "one.mp4").read_bytes(), (tmp_path / "blobs" / "0123").read_bytes()]
    assert [sample.file.read_bytes() for sample in samples] == [wanted[i] for i in (0, 1, 1, 1, 0)]


@pytest.mark.parametrize(
    ("first", "again"),
    [
        ({}, {}),
        ({}, {"path": "./videos//one.mp4"}),
        ({}, {"cut": [0]}),
        ({"cut": [2, 5]}, {"cut": [2.0, 5.0]}),
        ({"cap": "x"}, {"cap": ["x"], "fps": 8}),
    ],
)
def test_a_row_listed_twice(first: dict[str, Any], again: dict[str, Any], folder: Path) -> None:
    assert problems(folder, [{**GOOD, **first}, {**GOOD, **first, **again}]) == ["DATA-064"]


def test_a_data_set_listed_twice(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    once = source(folder, [GOOD])
    for again in (once, DataSource(tmp_path / "link", once.annotation)):
        with pytest.raises(DataError, match="DATA-064"):
            load_samples([once, again])


def test_cuts_and_captions_of_one_video_are_samples_of_their_own(folder: Path) -> None:
    """The first keeps the name it had alone, and adding a row renames none before it."""
    rows: list[object] = [
        {**GOOD, "cut": [0, 5]},
        {**GOOD, "cut": [4, 9]},
        {**GOOD, "cut": [4]},
        GOOD,
        {**GOOD, "cut": [4, 9], "cap": "another"},
        {**GOOD, "cut": [4, 9], "cap": ["two", "more"]},
        {**GOOD, "path": "other/one.mp4", "cut": [4, 9]},
    ]
    ids = [sample.id for sample in load_samples([source(folder, rows)])]
    one = "videos/one.mp4"
    assert ids[:4] == [one, f"{one}//4-9", f"{one}//4-", f"{one}//0-"]
    assert all(name.startswith(f"{one}//4-9//") for name in ids[4:6])
    assert ids[6] == "other/one.mp4"
    assert len(set(ids)) == len({feature_name(name) for name in ids}) == len(rows)
    for count in range(1, len(rows)):
        assert [sample.id for sample in load_samples([source(folder, rows[:count])])] == ids[:count]


def test_what_pandas_writes(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A column with an empty cell is one of floats; an empty cell is NaN or null."""
    lines = [
        '{"path": "videos/one.mp4", "cap": "x", "num_frames": 9.0, "cut": NaN, "aesthetic": 5.2, "duration": 1}',
        '{"path": "other/one.mp4", "cap": "y", "num_frames": NaN, "fps": null, "cut": [2.0, 9.0], "aesthetic": NaN}',
    ]
    caplog.set_level("INFO")
    first, second = load_samples([source(folder, "\n".join(lines).encode())])
    assert (first.annotation.num_frames, first.annotation.cut) == (9, None)
    assert (second.annotation.num_frames, second.annotation.fps, second.annotation.cut) == (None, None, [2, 9])
    assert [message for message in caplog.messages if "columns" in message] == [
        f"{folder / 'data.json'}: nothing here depends on the columns aesthetic, duration; they are left out"
    ]


@pytest.mark.parametrize(("other", "name"), [("text", "cap"), ("caption", "cap"), ("video", "path")])
def test_columns_of_other_tools_are_told_by_their_name_here(other: str, name: str, folder: Path) -> None:
    row = {key: value for key, value in GOOD.items() if key != name} | {other: GOOD[name]}
    with pytest.raises(DataError, match=f'DATA-061.*"{other}".*Call the column "{name}"'):
        load_samples([source(folder, [row])])


def test_every_row_is_reported_at_once_with_its_number(folder: Path) -> None:
    rows: list[object] = [{"path": "videos/one.mp4"}, {**GOOD, "path": "../x"}, GOOD, {**GOOD, "path": "none", "x": 1}]
    with pytest.raises(DataError) as caught:
        load_samples([source(folder, rows)])
    assert [(p.id, p.message.split(" row ")[1].split()[0].strip(":")) for p in caught.value.problems] == [
        ("DATA-062", "1"),
        ("DATA-063", "2"),
        ("DATA-061", "4"),
    ]


def test_a_row_with_two_faults_names_both(folder: Path) -> None:
    assert problems(folder, [{"path": "../x"}]) == ["DATA-062", "DATA-063"]


def test_long_lists_of_problems_end_with_their_count(folder: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_samples([source(folder, [{**GOOD, "path": f"none{i}"} for i in range(250)])])
    assert len(caught.value.problems) == 101 and "150 more" in caught.value.problems[-1].message


def test_names_do_not_collide_and_ids_survive_a_further_data_set(folder: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    write_clip(second / "videos" / "one.mp4")
    first_source = source(folder, [GOOD, {**GOOD, "path": "other/one.mp4"}])
    alone = load_samples([first_source])
    both = load_samples([first_source, source(second, [GOOD])])
    assert [s.id for s in both] == ["videos/one.mp4", "other/one.mp4", "1:videos/one.mp4"]
    assert both[:2] == alone
    names = [feature_name(s.id) for s in both]
    assert len(set(names)) == 3 and all(name.startswith("one_mp4-") for name in names)


def test_one_caption_of_a_list_is_drawn_from_the_seed(folder: Path) -> None:
    (sample,) = load_samples([source(folder, [{**GOOD, "cap": ["a", "b", "c"]}])])
    drawn = [sample.caption(seed) for seed in range(30)]
    assert drawn == [sample.caption(seed) for seed in range(30)]
    assert set(drawn) == {"a", "b", "c"}


SPEED = SPEEDCONTROL.columns[0]


@pytest.mark.parametrize("value", [0, 100, 33.25])
def test_a_column_of_the_task(folder: Path, value: float) -> None:
    (row,) = check_rows([source(folder, [{**GOOD, SPEED.name: value}])], SPEEDCONTROL)
    assert not row.problems and row.sample is not None and row.sample.columns == {SPEED.name: value}


@pytest.mark.parametrize("value", [None, -1, 100.5, True, "50", [50]])
def test_a_column_of_the_task_that_cannot_be_used(folder: Path, value: object) -> None:
    (row,) = check_rows([source(folder, [{**GOOD, SPEED.name: value}])], SPEEDCONTROL)
    (problem,) = row.problems
    assert problem.id == "DATA-061" and "takes a number from 0 to 100" in problem.message


def test_a_column_of_another_task_is_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    (sample,) = load_samples([source(folder, [{**GOOD, SPEED.name: "anything"}])])
    assert sample.columns == {} and "nothing here depends on the columns motion_bucket_id" in caplog.text
