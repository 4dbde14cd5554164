"""`mm doctor data` against data sets with known faults: what it reports, what it keeps, how it leaves."""

import json
import shutil
from pathlib import Path
from typing import Any

import av
import pytest
from annotated import load_samples
from feature_samples import write_clip, write_data_set
from mindspeed_alone import load_extract_model
from numbered_clips import write_numbered
from store_content import as_files

from mm.cli import doctor, doctor_data
from mm.cli.entry import run
from mm.config.base import load
from mm.config.data import DataSource, data_sources
from mm.data.clips import load_clip
from mm.data.dataset import open_features
from mm.dialects.mindspeed.extraction import source
from mm.dialects.mindspeed.files import load_extract_data, load_train_data
from mm.dialects.mindspeed.pretrain_json import PretrainModel
from mm.dialects.mindspeed.training import features

CLIP = {"num_frames": 9, "max_height": 32, "max_width": 48}
NAMES = ["good", "empty", "fine", "missing", "short", "scratched", "well"]
BAD = {"empty": "DATA-002", "missing": "DATA-001", "short": "DATA-004", "scratched": "DATA-002"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set of seven, four of them bad; of one only a frame in its middle is damaged."""
    folder = tmp_path / "set"
    write_data_set(folder, [{"path": f"{name}.mp4", "cap": name} for name in NAMES], num_frames=20)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "missing.mp4").unlink()
    write_clip(folder / "short.mp4", num_frames=4)
    content = write_clip(folder / "scratched.mp4", num_frames=9, gop=12).read_bytes()
    middle = content.find(b"mdat") + (len(content) - content.find(b"mdat")) // 2
    (folder / "scratched.mp4").write_bytes(content[:middle] + bytes(300) + content[middle + 300 :])
    return folder


def data_json(tmp_path: Path, data_path: Path, data_folder: Path | None, mode: str | None = None) -> Path:
    basic = {"data_path": str(data_path)} | ({"data_folder": str(data_folder)} if data_folder else {})
    if mode:
        basic["data_storage_mode"] = mode
    param = {
        "dataset_type": "t2v",
        "basic_parameters": basic,
        "preprocess_parameters": CLIP,
        "tokenizer_config": {"from_pretrained": "tokenizer"},
    }
    file = tmp_path / "mm_data.json"
    file.write_text(json.dumps({"dataset_param": param}))
    return file


def check(file: Path, output: Path, *more: str) -> tuple[int, dict[str, Any]]:
    code = run(doctor.main, ["data", "--mm-data", str(file), "--output", str(output), *more])
    return code, json.loads((output / "report.json").read_text())


def test_every_bad_sample_is_reported_and_the_others_are_kept(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = check(data_json(tmp_path, folder / "data.json", folder), tmp_path / "out")
    assert code == 65
    assert {row["sample"].removesuffix(".mp4"): row["error"] for row in report["bad_samples"]} == BAD
    assert [row["row"] for row in report["bad_samples"]] == [2, 4, 5, 6]
    assert all(row["file"] == str(folder / row["sample"]) and row["reason"] for row in report["bad_samples"])
    assert report["samples"] == 7 and report["bad"] == 4 and report["seconds"] > 0
    assert report["by_error"] == {"DATA-001": 1, "DATA-002": 2, "DATA-004": 1}
    clean = tmp_path / "out" / "data.clean.json"
    assert report["clean"] == [str(clean)]
    errors = capsys.readouterr().err
    assert "error DATA-076: 4 of 7 samples cannot be used: 1 DATA-001, 2 DATA-002, 1 DATA-004" in errors
    assert "samples:" not in errors  # the bar, which only a terminal gets
    preprocess = source(load_extract_data(tmp_path / "mm_data.json")).clip
    kept = load_samples([DataSource(folder, clean)])
    assert [sample.id for sample in kept] == ["good.mp4", "fine.mp4", "well.mp4"]
    assert all(load_clip(sample, preprocess, 1234).num_frames == 9 for sample in kept), "extraction takes all of them"


def test_videos_that_decord_does_not_read_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Asked for decord, PyAV reads what decord is not proven to read, and that is told."""
    pytest.importorskip("decord")
    folder = tmp_path / "set"
    write_data_set(folder, [{"path": f"{name}.mp4", "cap": name} for name in ("one", "two")], num_frames=20)
    write_numbered(folder / "three.ts")
    rows = [{"path": name, "cap": "x"} for name in ("one.mp4", "two.mp4", "three.ts")]
    (folder / "data.json").write_text(json.dumps(rows))
    file = data_json(tmp_path, folder / "data.json", folder)
    for more in ([], ["--quick"]):
        code, report = check(file, tmp_path / "out", *more)
        assert (code, report["not_with_decord"]) == (0, 0)
    capsys.readouterr()
    values = json.loads(file.read_text())
    values["dataset_param"]["preprocess_parameters"]["video_reader_type"] = "decord"
    file.write_text(json.dumps(values))
    for more in ([], ["--quick"]):
        code, report = check(file, tmp_path / "out", *more)
        assert (code, report["not_with_decord"]) == (0, 1)
        assert "1 of 3 videos: read with PyAV and not with decord" in capsys.readouterr().out


def test_the_clean_list_is_clean(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(data_json(tmp_path, folder / "data.json", folder), tmp_path / "out")
    again = data_json(tmp_path, tmp_path / "out" / "data.clean.json", folder)
    assert run(doctor.main, ["data", "--mm-data", str(again)]) == 0
    assert capsys.readouterr().out.startswith("3 samples, all of them can be used (")


def test_quick_leaves_the_frames_undecoded(folder: Path, tmp_path: Path) -> None:
    """All but the first ones, where headers prove how many there are."""
    file = write_clip(folder / "scratched.mp4", num_frames=40, gop=40)
    with av.open(str(file)) as container:
        late = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size][30:]
    place, size = max(late, key=lambda packet: packet[1])
    content = bytearray(file.read_bytes())
    content[place + size // 3 : place + size] = bytes(size - size // 3)
    file.write_bytes(content)
    _, report = check(data_json(tmp_path, folder / "data.json", folder), tmp_path / "out", "--quick")
    assert {row["sample"].removesuffix(".mp4") for row in report["bad_samples"]} == set(BAD) - {"scratched"}


def test_without_output_everything_is_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(doctor.main, ["data", "--mm-data", str(data_json(tmp_path, folder / "data.json", folder))]) == 65
    told = [line.split(":")[0] for line in capsys.readouterr().err.splitlines() if line.startswith("error ")]
    assert told == ["error DATA-076", *(f"error {error}" for error in BAD.values())]


KEPT = [
    '{ "path":"good.mp4" ,"cap": "caf\\u00e9, \\u2028 [1,2] \\"{\\""}',
    '{"path": "fine.mp4",\n   "cap": "é\u2028"}',
]
LEFT = ['{"path": "empty.mp4", "cap": ""}', '{"cap": "no path"}']


def test_rows_of_an_array_stay_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    rows = [KEPT[0], LEFT[0], KEPT[1], LEFT[1]]
    annotation = folder / "rows.json"
    annotation.write_text("\ufeff [" + " ,\r\n".join(rows) + "\n] \n", newline="")
    code, report = check(data_json(tmp_path, annotation, folder), tmp_path / "out")
    assert code == 65 and [row["error"] for row in report["bad_samples"]] == ["DATA-002", "DATA-061"]
    assert [row["sample"] for row in report["bad_samples"]] == ["empty.mp4", None]
    content = (tmp_path / "out" / "rows.clean.json").read_bytes().decode()
    assert content == "[\n" + ",\n".join(KEPT) + "\n]\n"
    assert json.loads(content) == [json.loads(row) for row in KEPT]


def test_lines_stay_byte_for_byte_with_their_ends(folder: Path, tmp_path: Path) -> None:
    kept = [KEPT[0] + "\r\n", KEPT[1].replace("\n   ", "") + "\n", '\t{"path": "well.mp4", "cap": ""}']
    annotation = folder / "rows.jsonl"
    annotation.write_text(
        kept[0] + LEFT[0] + "\r\n\r\n" + '{"path": "short.mp4", "fps": Infinity}\n' + kept[1] + kept[2], newline=""
    )
    code, report = check(data_json(tmp_path, annotation, folder), tmp_path / "out")
    assert code == 65 and [row["error"] for row in report["bad_samples"]] == ["DATA-002", "DATA-060"]
    assert (tmp_path / "out" / "rows.clean.jsonl").read_bytes().decode() == "".join(kept) + "\n"


def test_two_data_sets(folder: Path, tmp_path: Path) -> None:
    write_data_set(tmp_path / "other", [{"path": "a.mp4", "cap": "a"}, {"path": "b.mp4", "cap": "b"}], num_frames=9)
    (tmp_path / "other" / "b.mp4").write_bytes(b"no video")
    (tmp_path / "list.txt").write_text(f"{folder},data.json\n{tmp_path / 'other'},data.json\n")
    _, report = check(data_json(tmp_path, tmp_path / "list.txt", None), tmp_path / "out", "--num-workers", "1")
    assert report["bad_samples"][-1]["sample"] == "1:b.mp4" and report["bad_samples"][-1]["data_set"] == 1
    assert [Path(path).name for path in report["clean"]] == ["0-data.clean.json", "1-data.clean.json"]
    assert json.loads((tmp_path / "out" / "1-data.clean.json").read_text()) == [{"path": "a.mp4", "cap": "a"}]


def test_nothing_is_left(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "data.json").write_text(json.dumps([{"path": "empty.mp4", "cap": ""}]))
    code, report = check(data_json(tmp_path, folder / "data.json", folder), tmp_path / "out")
    assert code == 65 and report["clean"] == [] and "no sample is left" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.json"]


def test_a_list_that_cannot_be_read_at_all(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "data.json").write_text('[{"path": "good.mp4", "cap": "a"},]')
    assert run(doctor.main, ["data", "--mm-data", str(data_json(tmp_path, folder / "data.json", folder))]) == 65
    assert "DATA-060" in capsys.readouterr().err


def test_features(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = Path(shutil.copytree(demo, tmp_path / "home"))
    for path in (home / "configs").rglob("*"):
        if path.is_file():
            path.write_text(path.read_text().replace(str(demo), str(home)))
    words = ["--mm-model", str(home / "configs" / "pretrain_model.json")]
    data = home / "configs" / "feature_data.json"
    assert run(doctor_data.main, ["--mm-data", str(data), *words]) == 0
    assert "16 samples, all of them can be used" in capsys.readouterr().out
    as_files(home / "features")
    assert run(doctor_data.main, ["--mm-data", str(data), *words]) == 0
    assert "16 samples, all of them can be used" in capsys.readouterr().out
    empty = home / "features" / "features" / "empty_prompt.safetensors"
    content = empty.read_bytes()
    empty.write_bytes(content[:-1])
    loaded = json.loads(data.read_text())
    loaded["dataset_param"]["preprocess_parameters"]["cfg"] = 0.1
    data.write_text(json.dumps(loaded))
    assert run(doctor_data.main, ["--mm-data", str(data), *words]) == 65
    assert "error DATA-011: " in capsys.readouterr().err
    empty.write_bytes(content)
    files = sorted((home / "features" / "features").glob("0*"))
    files[3].write_bytes(files[3].read_bytes()[:-7])
    files[5].unlink()
    before = (home / "features" / "data.jsonl").read_text().splitlines(keepends=True)
    code, report = check(data, tmp_path / "out", *words)
    assert code == 65 and report["kind"] == "features" and report["by_error"] == {"DATA-011": 2}
    bad = {row["row"] for row in report["bad_samples"]}
    assert {Path(row["file"]).name for row in report["bad_samples"]} == {files[3].name, files[5].name}
    clean = tmp_path / "out" / "data.clean.jsonl"
    expected = [line for number, line in enumerate(before, start=1) if number not in bad]
    assert clean.read_text().splitlines(keepends=True) == expected
    loaded["dataset_param"]["basic_parameters"] = {"data_path": str(clean), "data_folder": str(home / "features")}
    data.write_text(json.dumps(loaded))
    wan = load(PretrainModel, home / "configs" / "pretrain_model.json").predictor.wan()
    dataset = open_features(features(load_train_data(data).dataset_param), wan)
    assert len(dataset) == 14 and all(dataset[index]["latents"].isfinite().all() for index in range(14))


def test_words_that_do_not_fit(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    features = data_json(tmp_path, tmp_path / "data.txt", None, "sorafeatured")
    assert run(doctor.main, ["data", "--mm-data", str(features), "--quick"]) == 64
    told = capsys.readouterr().err
    assert "error CFG-111: " in told and "error CFG-112: " in told
    videos = data_json(tmp_path, folder / "data.json", folder)
    listed = source(load_extract_data(videos))
    assert data_sources(listed.path, listed.folder)
    model = tmp_path / "model.json"
    part = {"from_pretrained": "x", "dtype": "fp32"}
    model.write_text(json.dumps({"task": "i2v", "ae": part, "text_encoder": part}))
    assert load_extract_model(model).task == "i2v"
    assert run(doctor.main, ["data", "--mm-data", str(videos), "--mm-model", str(model)]) == 64
    assert "error CFG-074: " in capsys.readouterr().err


def test_columns_of_the_task_are_checked_where_it_is_known(folder: Path, tmp_path: Path) -> None:
    rows = json.loads((folder / "data.json").read_text())
    with_numbers = [row | ({"motion_bucket_id": 50} if number else {}) for number, row in enumerate(rows)]
    (folder / "data.json").write_text(json.dumps(with_numbers))
    videos, model = data_json(tmp_path, folder / "data.json", folder), tmp_path / "model.json"
    part = {"from_pretrained": "x", "dtype": "fp32"}
    _, without = check(videos, tmp_path / "plain", "--quick")
    model.write_text(json.dumps({"task": "speedcontrol", "ae": part, "text_encoder": part}))
    _, report = check(videos, tmp_path / "out", "--quick", "--mm-model", str(model))
    found = {row["row"]: row["reason"] for row in report["bad_samples"]}
    assert found.keys() == {row["row"] for row in without["bad_samples"]} | {1}
    assert "lacks motion_bucket_id; the task takes a number from 0 to 100" in found[1]
