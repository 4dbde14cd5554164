"""SimpleTuner's multidatabackend.json: which samples it names, what each entry asks for, and what is wrong with one."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from annotated import check_rows, load_samples
from pyarrow import parquet

from mm.config.data import DataSource
from mm.config.tasks.speedcontrol import SPEEDCONTROL
from mm.data.metadata import VideoSample
from mm.errors import DataError


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for name in ("films/b.mp4", "films/sub/a_red.mp4", "films/.hidden.mp4", "films/notes.md", "pictures/p.jpg",
                 "depth/b.mp4", "depth/sub/a_red.mkv"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "films/b.txt").write_text("first caption\r\n\n  second caption\n", encoding="utf-8-sig")
    (tmp_path / "films/sub/a_red.txt").write_text("一只猫", encoding="utf-8")
    return tmp_path


FILMS: dict[str, Any] = {
    "id": "films", "type": "local", "dataset_type": "video", "instance_data_dir": "films",
    "caption_strategy": "textfile",
}  # fmt: skip
TEXTS: dict[str, Any] = {"id": "texts", "dataset_type": "text_embeds", "default": True, "cache_dir": "cache/text"}
EXAMPLE = [
    FILMS
    | {"crop": False, "resolution": 480, "minimum_image_size": 480, "maximum_image_size": 480,
       "target_downsample_size": 480, "resolution_type": "pixel_area", "cache_dir_vae": "cache/vae/films",
       "disabled": False, "metadata_backend": "discovery", "repeats": 0,
       "video": {"num_frames": 75, "min_frames": 75, "bucket_strategy": "aspect_ratio"}},
    TEXTS | {"disabled": False, "write_batch_size": 128},
]  # fmt: skip


def source(home: Path, entries: list[Any]) -> DataSource:
    path = home / "multidatabackend.json"
    path.write_text(json.dumps(entries))
    return DataSource(home, path)


def read(home: Path, *entries: dict[str, Any]) -> list[VideoSample]:
    return load_samples([source(home, list(entries))])


def problems(home: Path, *entries: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        read(home, *entries)
    return [str(problem) for problem in caught.value.problems]


def test_the_example_of_its_guide(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    first, second = read(home, *EXAMPLE)
    assert (first.id, first.captions, first.kind) == ("films:b.mp4", ("first caption", "second caption"), "video")
    assert (second.id, second.captions) == ("films:sub/a_red.mp4", ("一只猫",))
    assert second.file == home / "films/sub/a_red.mp4"
    told = "\n".join(caplog.messages)
    assert "is read as simpletuner" in told and "the entries texts name stores" in told
    assert "1 .md, 2 .txt" in told


@pytest.mark.parametrize(
    ("fields", "captions"),
    [
        ({"caption_strategy": "filename"}, [("b",), ("a red",)]),
        ({"caption_strategy": "filename", "instance_prompt": "zyx", "prepend_instance_prompt": True},
         [("zyx b",), ("zyx a red",)]),
        ({"caption_strategy": "instanceprompt", "instance_prompt": "zyx"}, [("zyx",), ("zyx",)]),
        ({"only_instance_prompt": True, "instance_prompt": "zyx"}, [("zyx",), ("zyx",)]),
        ({"disable_multiline_split": True}, [("first caption\n\n  second caption",), ("一只猫",)]),
        ({"instance_prompt": "zyx", "prepend_instance_prompt": True},
         [("zyx first caption", "zyx second caption"), ("zyx 一只猫",)]),
    ],
)  # fmt: skip
def test_captions(fields: dict[str, Any], captions: list[Any], home: Path) -> None:
    assert [sample.captions for sample in read(home, FILMS | fields)] == captions


def test_one_entry_is_taken(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    pictures = {"id": "p", "instance_data_dir": str(home / "pictures"), "type": "local"}
    both = source(home, [FILMS, pictures])
    assert [sample.id for sample in load_samples([replace(both, entry="p")])] == ["p:p.jpg"]
    with pytest.raises(DataError, match=r"DATA-171: .* has no entry q .* Name one of films, p\.") as caught:
        load_samples([replace(both, entry="q")])
    assert len(caught.value.problems) == 1


def test_a_part_of_an_entry_is_drawn_by_its_id(home: Path) -> None:
    for number in range(20):
        (home / f"films/{number:02}.mp4").write_bytes(b"x")
        (home / f"films/{number:02}.txt").write_text("a")
    every, few, more = (
        [s.id for s in read(home, FILMS | said)] for said in ({}, *({"max_num_samples": n} for n in (7, 9)))
    )
    assert len(few) == 7 and set(few) < set(more) < set(every) and few == sorted(few) != every[:7]
    other = [s.id.removeprefix("other") for s in read(home, FILMS | {"id": "other", "max_num_samples": 7})]
    assert other != [name.removeprefix("films") for name in few]


def test_images_and_a_folder_that_is_switched_off(home: Path) -> None:
    pictures = {"id": "p", "instance_data_dir": str(home / "pictures"), "type": "local"}
    off = FILMS | {"id": "off", "disabled": True, "instance_data_dir": "nowhere"}
    (sample,) = read(home, pictures, off)
    assert (sample.id, sample.kind, sample.captions) == ("p:p.jpg", "image", ("p",))


def test_conditioning_goes_by_the_path(home: Path) -> None:
    depth = {"id": "depth", "dataset_type": "conditioning", "instance_data_dir": "depth", "conditioning_type": "depth"}
    linked = read(home, FILMS | {"conditioning_data": "depth"}, depth)
    back = read(home, FILMS, depth | {"source_dataset_id": "films"})
    for samples in (linked, back):
        assert [dict(sample.roles) for sample in samples] == [
            {"control": (home / "depth/b.mp4",)},
            {"control": (home / "depth/sub/a_red.mkv",)},
        ]
    (home / "depth/b.mp4").unlink()
    (problem,) = problems(home, FILMS | {"conditioning_data": "depth"}, depth)
    assert problem.startswith("DATA-001") and "films: b.mp4 has no partner" in problem
    masks = depth | {"conditioning_type": "mask", "instance_data_dir": "films"}
    assert set(read(home, FILMS | {"conditioning_data": ["depth"]}, masks)[0].roles) == {"mask"}


def test_a_folder_of_partners_is_looked_into_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not once a file, which takes the square of the time: 80 seconds for 6,000 files."""
    for number in range(50):
        (home / f"films/{number}.mp4").write_bytes(b"x")
        (home / f"depth/{number}.mkv").write_bytes(b"x")
    looked: list[str] = []
    list_folder = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: [looked.append(str(folder)), *list_folder(folder)][1:])
    depth = {"id": "depth", "dataset_type": "conditioning", "instance_data_dir": "depth", "conditioning_type": "depth"}
    films = FILMS | {"conditioning_data": "depth", "caption_strategy": "filename"}
    found = read(home, films, depth)
    assert [sample.roles["control"] for sample in found if sample.id == "films:7.mp4"] == [(home / "depth/7.mkv",)]
    assert len(found) == 52 and sorted(looked) == [str(home / "depth"), str(home / "depth/sub")]


def test_two_entries_of_one_folder(home: Path) -> None:
    """As they are written to train on it at two sizes."""
    samples = read(home, FILMS, FILMS | {"id": "large", "resolution": 1024})
    assert [sample.id for sample in samples] == [
        "films:b.mp4", "films:sub/a_red.mp4", "large:b.mp4", "large:sub/a_red.mp4",
    ]  # fmt: skip


def test_a_link_that_leads_back_ends(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    (home / "films/sub/loop").symlink_to(home / "films")
    (home / "films/more").symlink_to(home / "depth")
    ids = [sample.id for sample in read(home, FILMS | {"caption_strategy": "filename"})]
    assert ids == ["films:b.mp4", "films:more/b.mp4", "films:more/sub/a_red.mkv", "films:sub/a_red.mp4"]
    assert "loop leads back to a folder that it lies in" in caplog.text


def test_a_link_to_itself_is_a_file_that_cannot_be_read(home: Path) -> None:
    (home / "films/c.mp4").symlink_to("c.mp4")
    (home / "films/round").symlink_to("round")
    found = check_rows([source(home, [FILMS | {"caption_strategy": "filename"}])])
    problems = {row.sample.id: [problem.id for problem in row.problems] for row in found if row.sample is not None}
    assert problems == {"films:b.mp4": [], "films:c.mp4": ["DATA-001"], "films:sub/a_red.mp4": []}


def test_a_folder_that_cannot_be_listed(home: Path) -> None:
    """Its path is longer than Linux takes, 4096 bytes; one without permissions is the same to all but root."""
    here = os.open(home / "films", os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=here)
        here = os.open("d" * 250, os.O_RDONLY, dir_fd=here)
    (told,) = problems(home, FILMS | {"caption_strategy": "filename"})
    assert told.startswith("DATA-173: The folder ") and "cannot be listed: File name too long" in told


@pytest.mark.parametrize(
    ("fields", "expected", "found"),
    [
        ({"caption_stategy": "textfile"}, "DATA-171", 'Did you mean "caption_strategy"'),
        ({"resolution": "480"}, "DATA-171", "resolution"),
        ({"resolution_type": "pixels"}, "DATA-171", "resolution_type"),
        ({"repeats": -1}, "DATA-171", "repeats"),
        ({"video": {"frames": 5}}, "DATA-171", "frames"),
        ({"id": "a/b"}, "DATA-171", "id"),
        ({"instance_data_dir": None}, "DATA-171", "lacks instance_data_dir"),
        ({"maximum_image_size": 4.0}, "DATA-171", "alone"),
        ({"video": {"num_frames": 81, "min_frames": 5}}, "DATA-171", "fewer than num_frames"),
        ({"video": {"num_frames": 81, "max_frames": 80}}, "DATA-171", "fewer than it needs"),
        ({"video": {"frame_interval": 8}}, "DATA-171", "frame_interval"),
        ({"crop_aspect": "closest"}, "DATA-171", "no crop_aspect_buckets"),
        ({"crop_aspect_buckets": [{"aspect": 1, "weight": 0.5}]}, "DATA-171", "add up to 0.5"),
        ({"crop_aspect_buckets": [1, {"aspect": 1, "weight": 1}]}, "DATA-171", "Give each a weight"),
        ({"crop_aspect_buckets": [0]}, "DATA-171", "not above 0"),
        ({"caption_strategy": "instanceprompt"}, "DATA-171", "needs an instance_prompt"),
        ({"caption_strategy": "parquet"}, "DATA-171", "no field parquet"),
        ({"caption_strategy": "webshart"}, "DATA-172", "webshart"),
        ({"caption_filter_list": "words.txt"}, "DATA-172", "caption_filter_list"),
        ({"type": "huggingface"}, "DATA-172", "huggingface"),
        ({"type": "aws", "aws_bucket_name": "b", "aws_access_key_id": "x"}, "DATA-172", "holds credentials"),
        ({"dataset_type": "eval"}, "DATA-172", "eval"),
        ({"dataset_type": "image", "video": {}}, "DATA-171", "dataset_type image"),
        ({"text_embeds": "none"}, "DATA-171", "names none, which is not there"),
        ({"conditioning_data": "texts"}, "DATA-171", "of the dataset_type text_embeds"),
        ({"source_dataset_id": "texts"}, "DATA-171", "no entry of samples"),
        ({"id": "texts"}, "DATA-171", "2 entries have the id texts"),
        ({"disabled": True}, "DATA-171", "no entry is a source of samples"),
        ({"start_step": 10, "end_step": 10}, "DATA-171", "begins after step 10"),
        ({"start_epoch": 3, "end_epoch": 2}, "DATA-171", "ends with epoch 2 and begins with epoch 3"),
        ({"resolution": 1e300}, "DATA-171", "resolution"),
        ({"minimum_image_size": 1e300}, "DATA-171", "minimum_image_size"),
        ({"repeats": 10**40}, "DATA-171", "repeats"),
        ({"instance_data_dir": "nowhere"}, "DATA-173", "no folder"),
        ({"instance_data_dir": "d" * 5000}, "DATA-173", "no folder"),
        ({"instance_data_dir": "pictures"}, "DATA-173", "no video lies below"),
        ({"instance_data_dir": "depth"}, "DATA-062", "its caption cannot be read"),
    ],
)  # fmt: skip
def test_entries_that_cannot_be_used(fields: dict[str, Any], expected: str, found: str, home: Path) -> None:
    told = problems(home, FILMS | fields, TEXTS)
    assert told[0].startswith(expected) and found in told[0], told


def test_an_s3_entry_lacks_its_bucket(home: Path) -> None:
    (found,) = problems(home, FILMS | {"type": "aws"})
    assert found.startswith("DATA-171") and "lacks aws_bucket_name" in found


def test_all_that_is_wrong_is_told_at_once(home: Path) -> None:
    told = problems(home, FILMS | {"x": 1, "repeats": "2"}, TEXTS | {"y": 1}, {"dataset_type": "video"}, [1])
    assert len(told) == 5 and all("multidatabackend.json entry" in problem for problem in told), told
    same = FILMS | {"cache_dir_vae": "v"}
    told = problems(home, same, same | {"id": "more"}, TEXTS, TEXTS | {"id": "also"})
    assert ["cache_dir_vae v" in told[0], "2 of 2 text_embeds entries have default" in told[1]] == [True, True]


def test_a_task_with_a_column_has_no_place_for_it(home: Path) -> None:
    with pytest.raises(DataError, match=r"DATA-171.*motion_bucket_id"):
        check_rows([source(home, EXAMPLE)], SPEEDCONTROL)


PARQUET = {"path": "captions.parquet", "filename_column": "file", "caption_column": "text"}


@pytest.mark.parametrize("empty", [None, float("nan")])
def test_rows_of_a_parquet_table_that_name_no_file(empty: float | None, home: Path) -> None:
    """pandas writes NaN where a column of numbers has an empty cell; no file is called nan, and no caption is."""
    files = pyarrow.array([1.0, empty], pyarrow.float64()) if empty else pyarrow.array(["a_red", empty])
    parquet.write_table(pyarrow.table({"file": files, "text": ["of one", "of none"]}), home / "captions.parquet")
    with pytest.raises(DataError, match=rf"DATA-061: \S+ row 2: file is {empty}, and no name"):
        read(home, FILMS | {"caption_strategy": "parquet", "parquet": PARQUET})
    captions = pyarrow.table({"file": ["b", "a_red"], "text": [float("nan"), float("nan")]})
    parquet.write_table(captions, home / "captions.parquet")
    told = problems(home, FILMS | {"caption_strategy": "parquet", "parquet": PARQUET})
    assert len(told) == 2 and all(problem.startswith("DATA-062") for problem in told)


def test_captions_of_a_parquet_table(home: Path) -> None:
    columns = {"file": ["b", "a_red"], "text": ["of b", None], "other": ["x", "of a"]}
    parquet.write_table(pyarrow.table(columns), home / "captions.parquet")
    entry = FILMS | {"caption_strategy": "parquet", "parquet": PARQUET | {"fallback_caption_column": "other"}}
    assert [sample.captions for sample in read(home, entry)] == [("of b",), ("of a",)]
    (problem,) = problems(home, FILMS | {"caption_strategy": "parquet", "parquet": PARQUET})
    assert problem.startswith("DATA-062") and "a_red.mp4 is not in the table of captions" in problem
