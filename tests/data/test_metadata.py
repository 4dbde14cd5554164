import json
import os
from pathlib import Path

import pytest
from feature_samples import write_clip

from mm.config.data import DataSource
from mm.data.features import feature_name
from mm.data.metadata import MAX_CAPTION_CHARACTERS, load_samples
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
        (b'[{"path": "a", "fps": NaN}]', "DATA-060"),
        (b'{"path": "a"\n{"path": "b"}', "DATA-060"),
        (b'[{"path": "videos/one.mp4", "cap": "\xff\xfe"}]', "DATA-060"),
        (b"[" * 100_000, "DATA-060"),
    ],
    ids=["empty", "no rows", "cut off", "key twice", "NaN", "bad lines", "not UTF-8", "deep"],
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
        ({**GOOD, "path": "link.mp4"}, "DATA-063"),
        ({**GOOD, "path": "folder-link/outside.mp4"}, "DATA-063"),
        ({**GOOD, "path": "loop"}, ("DATA-063", "DATA-001")),
        ({**GOOD, "path": "x" * 5000}, ("DATA-063", "DATA-001")),
    ],
)
def test_rows_that_cannot_be_used(row: object, expected: str | tuple[str, ...], folder: Path) -> None:
    os.mkfifo(folder / "fifo")
    (folder / "link.mp4").symlink_to(folder.parent / "outside.mp4")
    (folder / "folder-link").symlink_to(folder.parent)
    (folder / "loop").symlink_to(folder / "loop")
    found = problems(folder, [row])
    assert len(set(found)) == 1 and found[0] in ((expected,) if isinstance(expected, str) else expected)


def test_link_inside_the_folder_is_fine(folder: Path) -> None:
    (folder / "link.mp4").symlink_to(folder / "videos" / "one.mp4")
    assert load_samples([source(folder, [{**GOOD, "path": "link.mp4"}])])[0].id == "link.mp4"


@pytest.mark.parametrize("path", ["videos/one.mp4", "./videos//one.mp4", "link.mp4"])
def test_one_video_listed_twice(path: str, folder: Path) -> None:
    (folder / "link.mp4").symlink_to(folder / "videos" / "one.mp4")
    assert problems(folder, [GOOD, {**GOOD, "path": path}]) == ["DATA-064"]


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
