"""Metadata of several systems: the same samples out of each, how each is recognised, and what is wrong with a row."""

import csv
import io
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from annotated import check_rows, load_samples

from mm.config.data import DataSource, SourceFormat
from mm.config.tasks.i2v import I2V
from mm.config.tasks.speedcontrol import SPEEDCONTROL
from mm.config.tasks.t2v import T2V
from mm.data.metadata import VideoSample
from mm.data.sources.checking import iterate_rows
from mm.errors import DataError

FILES = ("videos/a.mp4", "videos/b.MOV", "images/c.PNG", "control/a.mp4", "pose/a.txt", "ref 1.jpg", "mask.mp4")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files that are there; what is in them is for others to say."""
    for name in FILES:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(b"x")
    return tmp_path / "set"


def write(folder: Path, rows: list[dict[str, Any]], form: str) -> Path:
    """A table of rows: `json`, `jsonl` or `csv`."""
    path = folder / f"metadata.{form}"
    if form == "csv":
        names = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names)
        writer.writeheader()
        writer.writerows(rows)
        path.write_text(text.getvalue(), encoding="utf-8", newline="")
    else:
        path.write_text(json.dumps(rows) if form == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(folder: Path, rows: list[dict[str, Any]], form: str = "json", format: SourceFormat | None = None) -> Any:
    return load_samples([DataSource(folder, write(folder, rows, form), format)])


def problems(folder: Path, rows: list[Any], form: str = "json", format: SourceFormat | None = None) -> list[str]:
    with pytest.raises(DataError) as caught:
        read(folder, rows, form, format)
    return [str(problem) for problem in caught.value.problems]


def plain(sample: VideoSample, folder: Path) -> tuple[Any, ...]:
    roles = {role: [str(file.relative_to(folder)) for file in files] for role, files in sample.roles.items()}
    return sample.id, sample.kind, sample.captions, roles


VIDEOX = [
    {"file_path": "videos/a.mp4", "text": "one, of two", "type": "video", "control_file_path": "control/a.mp4",
     "width": 64, "height": 48},
    {"file_path": "images/c.PNG", "text": "", "type": "image", "control_file_path": None, "width": 8, "height": 8},
    {"file_path": "videos/b.MOV", "text": "line\nend", "type": "video", "control_file_path": "pose/a.txt",
     "width": None, "height": None},
]  # fmt: skip


@pytest.mark.parametrize("format", [None, "videox-fun"])
@pytest.mark.parametrize("form", ["json", "jsonl", "csv"])
def test_videox_fun(form: str, format: SourceFormat | None, folder: Path) -> None:
    samples = read(folder, VIDEOX, form, format)
    assert [plain(sample, folder) for sample in samples] == [
        ("videos/a.mp4", "video", ("one, of two",), {"control": ["control/a.mp4"]}),
        ("images/c.PNG", "image", ("",), {}),
        ("videos/b.MOV", "video", ("line\nend",), {"camera": ["pose/a.txt"]}),
    ]
    sizes = [sample.annotation.resolution and sample.annotation.resolution.model_dump() for sample in samples]
    assert sizes == [{"height": 48, "width": 64}, {"height": 8, "width": 8}, None]


def test_a_row_without_a_type_is_what_its_ending_says(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    rows = [{"file_path": "videos/a.mp4", "text": "x"}, {"file_path": "images/c.PNG", "text": "x", "type": ""}]
    assert [sample.kind for sample in read(folder, rows)] == ["video", "image"]
    assert sum("rows without type" in message for message in caplog.messages) == 1


def test_lists_of_files_are_one_role(folder: Path) -> None:
    row = {"file_path": "videos/a.mp4", "text": "x", "type": "video", "object_file_path": ["ref 1.jpg", "images/c.PNG"]}
    (sample,) = read(folder, [row])
    assert plain(sample, folder)[3] == {"object": ["ref 1.jpg", "images/c.PNG"]}


DIFFSYNTH = [
    {"video": "videos/a.mp4", "prompt": "a", "control_video": "control/a.mp4", "reference_image": "ref 1.jpg",
     "vace_video_mask": "mask.mp4"},
    {"video": "images/c.PNG", "prompt": "an image, one frame"},
]  # fmt: skip


@pytest.mark.parametrize("form", ["json", "jsonl", "csv"])
def test_diffsynth(form: str, folder: Path) -> None:
    assert [plain(sample, folder) for sample in read(folder, DIFFSYNTH, form)] == [
        ("videos/a.mp4", "video", ("a",),
         {"control": ["control/a.mp4"], "reference": ["ref 1.jpg"], "mask": ["mask.mp4"]}),
        ("images/c.PNG", "image", ("an image, one frame",), {}),
    ]  # fmt: skip


def test_diffsynth_columns_that_are_left_out(folder: Path) -> None:
    row = {
        "video": "videos/a.mp4",
        "prompt": "x",
        "control_video": "control/a.mp4",
        "vace_reference_image": "no",
        "y": 1,
    }
    path = write(folder, [row], "csv")
    (sample,) = load_samples([DataSource(folder, path, "diffsynth", left_out=("vace_reference_image", "y"))])
    assert plain(sample, folder)[3] == {"control": ["control/a.mp4"]}


def test_diffsynth_images_alone_and_columns_that_are_named(folder: Path) -> None:
    rows = [{"image": "images/c.PNG", "prompt": "x", "depth": "control/a.mp4"}]
    path = write(folder, rows, "csv")
    (sample,) = load_samples([DataSource(folder, path, "diffsynth", ("image", "video", "depth"))])
    assert plain(sample, folder) == ("images/c.PNG", "image", ("x",), {"depth": ["control/a.mp4"]})
    assert "unknown column" in problems(folder, rows, "csv")[0]


ENDINGS = ("mp4", "avi", "mov", "wmv", "mkv", "flv", "webm", "gif", "jpg", "jpeg", "png", "webp", "bmp")


@pytest.mark.parametrize("ending", ENDINGS)
def test_diffsynth_s_endings(ending: str, folder: Path) -> None:
    kind = "image" if ending in ("jpg", "jpeg", "png", "webp", "bmp") else "video"
    for name in (f"x.{ending}", f"y.y.{ending.upper()}"):
        (folder / name).write_bytes(b"x")
    rows = [{"video": f"x.{ending}", "prompt": ""}, {"video": f"y.y.{ending.upper()}", "prompt": ""}]
    assert [sample.kind for sample in read(folder, rows)] == [kind, kind]


@pytest.mark.parametrize("form", ["jsonl", "csv"])
@pytest.mark.parametrize("caption", ["text", "caption", "prompt"])
def test_hugging_face_folder(form: str, caption: str, folder: Path) -> None:
    rows = [{"file_name": "videos/a.mp4", caption: "a", "mask_file_name": "mask.mp4"},
            {"file_name": "images/c.PNG", caption: "c", "mask_file_name": ""}]  # fmt: skip
    assert [plain(sample, folder) for sample in read(folder, rows, form)] == [
        ("videos/a.mp4", "video", ("a",), {"mask": ["mask.mp4"]}),
        ("images/c.PNG", "image", ("c",), {}),
    ]


def test_a_caption_that_is_null_leaves_the_column_to_another(folder: Path) -> None:
    row = {"file_name": "videos/a.mp4", "text": None, "caption": None, "prompt": "a"}
    assert [sample.captions for sample in read(folder, [row])] == [("a",)]


@pytest.mark.parametrize(
    "row",
    [
        {"path": "videos/a.mp4", "cap": "x"},
        {"file_path": "videos/a.mp4", "text": "x"},
        {"video": "videos/a.mp4", "prompt": "x"},
        {"file_name": "videos/a.mp4", "text": "x"},
    ],
)
def test_a_sample_has_one_id_in_whichever_table_it_stands(row: dict[str, Any], folder: Path) -> None:
    """Ids are the key of all that is drawn, of the caption too."""
    (sample,) = read(folder, [row])
    assert (sample.id, sample.captions, sample.kind) == ("videos/a.mp4", ("x",), "video")


def test_a_list_of_data_sets_in_several_formats(folder: Path) -> None:
    tables = [(folder / "one", {"path": "a.mp4", "cap": "1"}), (folder / "two", {"file_name": "a.mp4", "text": "2"})]
    sources = []
    for place, row in tables:
        place.mkdir()
        (place / "a.mp4").write_bytes(b"x")
        sources.append(DataSource(place, write(place, [row], "jsonl")))
    assert [(sample.id, sample.captions) for sample in load_samples(sources)] == [
        ("a.mp4", ("1",)),
        ("1:a.mp4", ("2",)),
    ]


@pytest.mark.parametrize(
    ("rows", "form", "names"),
    [
        ([{"file_path": "videos/a.mp4", "file_name": "videos/a.mp4", "text": "x"}], "json", "videox-fun or hf-folder"),
        ([{"path": "videos/a.mp4", "video": "videos/a.mp4", "prompt": "x"}], "csv", "mindspeed or diffsynth"),
        ([{"film": "videos/a.mp4", "words": "x"}], "csv", "no format"),
        ([{"video;prompt": "videos/a.mp4;x"}], "csv", "commas between"),
        ([{"videos/a.mp4": "videos/b.MOV", "a man": "a dog"}], "csv", "first row names the columns"),
    ],
)
def test_columns_of_no_format_or_of_several(rows: list[Any], form: str, names: str, folder: Path) -> None:
    (problem,) = problems(folder, rows, form)
    assert problem.startswith("DATA-170") and names in problem and "data.format" in problem


def test_what_is_recognised_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    check_rows([DataSource(folder, write(folder, DIFFSYNTH, "json"), None)], T2V)
    assert f"{folder / 'metadata.json'} is read as diffsynth, which its first row tells" in caplog.messages
    (left_out,) = (message for message in caplog.messages if "takes no files" in message)
    assert left_out.endswith("the task t2v takes no files of the roles control, mask, reference; they are left out")


GOOD = {"file_path": "videos/a.mp4", "text": "x", "type": "video"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"file_path": "/etc/passwd"}, "DATA-063"),
        ({"file_path": "../x.mp4"}, "DATA-063"),
        ({"file_path": "https://host/x.mp4"}, "DATA-063"),
        ({"control_file_path": "../x.mp4"}, "DATA-063"),
        ({"control_file_path": "http://host/x.mp4"}, "DATA-063"),
        ({"file_path": "videos/none.mp4"}, "DATA-001"),
        ({"file_path": None}, "DATA-061"),
        ({"file_path": 3}, "DATA-061"),
        ({"file_path": "pose/a.txt", "type": None}, "DATA-061"),
        ({"file_path": "images/c.PNG"}, "DATA-061"),
        ({"type": "film"}, "DATA-061"),
        ({"text": None}, "DATA-062"),
        ({"text": 5}, "DATA-061"),
        ({"text": "\ud800"}, "DATA-061"),
        ({"text": "x" * 70000}, "DATA-062"),
        ({"width": 64}, "DATA-061"),
        ({"width": -1, "height": 4}, "DATA-061"),
        ({"width": "6.5", "height": "4"}, "DATA-061"),
        ({"colour": "red"}, "DATA-061"),
    ],
)
def test_rows_that_cannot_be_used(row: dict[str, Any], expected: str, folder: Path) -> None:
    (problem,) = problems(folder, [{**GOOD, **row}], format="videox-fun")
    assert problem.startswith(expected) and "metadata.json row 1" in problem


def test_all_bad_rows_are_told_at_once(folder: Path) -> None:
    """Numbered as rows, and in CSV by line, whatever is quoted."""
    rows = [{**GOOD, "text": "two\nlines"}, {**GOOD, "file_path": "../x"}, {**GOOD, "text": "y", "type": "film"}]
    found = problems(folder, rows, "csv")
    assert ["row 2 (line 4)" in found[0], "row 3 (line 5)" in found[1]] == [True, True]
    many = problems(folder, [{**GOOD, "file_path": f"videos/{number}.mp4"} for number in range(250)], "csv")
    assert len(many) == 101 and "150 more" in many[-1]


@pytest.mark.parametrize(
    ("format", "columns", "lacking"),
    [
        ("videox-fun", "file_path,type", "text"),
        ("diffsynth", "video,text", "prompt"),
        ("hf-folder", "file,text", "file_name"),
    ],
)
def test_a_header_that_lacks_a_column(format: SourceFormat, columns: str, lacking: str, folder: Path) -> None:
    """Once, and not for every row."""
    (folder / "metadata.csv").write_text(f"{columns}\nvideos/a.mp4,x\nvideos/b.MOV,y\n")
    with pytest.raises(DataError) as caught:
        load_samples([DataSource(folder, folder / "metadata.csv", format)])
    (problem,) = caught.value.problems
    assert problem.id == "DATA-060" and f"lacks a column {lacking}" in problem.message


@pytest.mark.parametrize("form", ["json", "csv"])
def test_a_column_of_the_task(form: str, folder: Path) -> None:
    (name,) = (column.name for column in SPEEDCONTROL.columns)
    rows = [{**GOOD, "text": str(value), name: value} for value in (33.5, 101, None)]
    checked = check_rows([DataSource(folder, write(folder, rows, form))], SPEEDCONTROL)
    assert checked[0].sample is not None and checked[0].sample.columns == {name: 33.5}
    assert [[problem.id for problem in row.problems] for row in checked[1:]] == [["DATA-061"], ["DATA-061"]]


def test_an_image_is_no_sample_of_a_task_with_given_frames(folder: Path) -> None:
    rows = check_rows([DataSource(folder, write(folder, VIDEOX, "json"))], I2V)
    assert [[problem.id for problem in row.problems] for row in rows] == [[], ["DATA-047"], []]


def test_memory_for_a_row_that_was_seen(folder: Path) -> None:
    """Half a kilobyte, so that a million rows take half a gigabyte while they are checked."""
    count = 4000
    (folder / "videos" / "a.mp4").unlink()
    for number in range(count):
        os.link(folder / "mask.mp4", folder / "videos" / f"{number:06}-{'x' * 80}.mp4")
    rows = [{"path": f"videos/{number:06}-{'x' * 80}.mp4", "cap": "word " * 40} for number in range(count)]
    source = DataSource(folder, write(folder, rows, "jsonl"))
    del rows
    peaks = []
    for limit in (count // 10, count):
        tracemalloc.start()
        for number, row in enumerate(iterate_rows([source])):
            assert not row.problems
            if number + 1 == limit:
                peaks.append(tracemalloc.get_traced_memory()[0])
                break
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / (count * 0.9) < 600
