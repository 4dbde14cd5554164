"""`mm migrate shards`, `mm data status` and `mm data repair` on the features of the embedded default."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from store_content import stored
from training_runs import bits, run

from mm.cli import data, doctor_data, extract, migrate
from mm.config.flags import as_words
from mm.errors import ConfigError, DataError

SHARDS = 4


@pytest.fixture(scope="module")
def demo(demo_of_files: Path) -> Path:
    """Features of one file a sample."""
    return demo_of_files


def to_shards(demo: Path, target: Path, **flags: Any) -> None:
    size = sum(path.stat().st_size for path in (demo / "features" / "features").iterdir()) / 10**6 / SHARDS
    words = {"source": demo / "features", "target": target, "shard_megabytes": round(size, 3), **flags}
    migrate.main(["shards", *as_words(words)])


@pytest.fixture
def store(demo: Path, tmp_path: Path) -> Path:
    to_shards(demo, tmp_path / "shards")
    return tmp_path / "shards"


@pytest.fixture
def files(demo: Path, store: Path, tmp_path: Path) -> dict[str, Path]:
    """feature_data.json that names the shards as it named the old store, and the model."""
    content = json.loads((demo / "configs" / "feature_data.json").read_text())
    content["dataset_param"]["basic_parameters"] |= {"data_path": str(tmp_path / "list.txt")}
    content["dataset_param"]["basic_parameters"].pop("data_folder", None)
    (tmp_path / "list.txt").write_text(f"{store}\n")
    (tmp_path / "feature_data.json").write_text(json.dumps(content))
    return {"mm_data": tmp_path / "feature_data.json", "mm_model": demo / "configs" / "pretrain_model.json"}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damage(store: Path, number: int) -> None:
    body = store / "shards" / f"{number:08d}" / "body.bin"
    flipped = bytearray(body.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    body.write_bytes(flipped)


def test_training_from_shards_is_training_from_files(demo: Path, files: dict[str, Path], tmp_path: Path) -> None:
    shards = run(demo, tmp_path / "run", train_iters=6, num_workers=1, **files)
    assert bits(shards) == bits(run(demo, tmp_path / "old", train_iters=6, num_workers=1))


def test_training_finds_shards_where_the_files_were(demo: Path, tmp_path: Path) -> None:
    """The configuration stays as it is: it names the folder and its data.jsonl."""
    home = tmp_path / "home"
    shutil.copytree(demo / "configs", home / "configs")
    to_shards(demo, home / "features")
    text = (home / "configs" / "feature_data.json").read_text().replace(str(demo), str(home))
    (home / "configs" / "feature_data.json").write_text(text)
    rows = run(demo, tmp_path / "run", train_iters=2, mm_data=home / "configs" / "feature_data.json")
    assert bits(rows) == bits(run(demo, tmp_path / "old", train_iters=2))


def test_status(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    data.main(["status", str(store), "--json-output"])
    found = json.loads(capsys.readouterr().out)
    bodies = sum(path.stat().st_size for path in (store / "shards").glob("*/body.bin"))
    assert found["finished"] and found["samples"] == 16 == sum(shape[4] for shape in found["shapes"])
    assert found["body_bytes"] == bodies and found["missing"] == [] and found["unfinished"] == 0
    assert found["shards"] == len(list((store / "shards").iterdir())) > 1
    shutil.rmtree(store / "shards" / "00000001")
    (store / "shards" / ".tmp-00000001-0").mkdir()
    data.main(["status", str(store)])
    told = capsys.readouterr().out
    assert "not finished" in told and "1 shards are missing: 1\n" in told and "1 shards are being written" in told
    with pytest.raises(DataError, match="DATA-010"):
        data.main(["status", str(store / "shards")])


def test_repair_makes_the_damaged_shards_anew_and_no_other(
    demo: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = content(store)
    data.main(["repair", str(store)])
    assert f"{store}: all shards are whole" in capsys.readouterr().out
    damage(store, 1)
    shutil.rmtree(store / "shards" / "00000002")
    with pytest.raises(DataError) as caught:
        data.main(["repair", str(store), "--dry-run"])
    assert [problem.id for problem in caught.value.problems] == ["DATA-157", "DATA-153", "DATA-154"]
    assert (store / "manifest.json").exists() and (store / "shards" / "00000001").exists()
    with pytest.raises(DataError, match=r"DATA-157: .*2 shards are damaged or missing"):
        data.main(["repair", str(store)])
    kept = {path: path.stat().st_mtime_ns for path in (store / "shards").glob("*/*")}
    assert {path.parent.name for path in kept} == {path.name for path in (store / "shards").iterdir()}
    assert not (store / "manifest.json").exists() and "00000001" not in {path.parent.name for path in kept}
    to_shards(demo, store)
    assert content(store) == whole
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


def test_repair_of_a_manifest(demo: Path, store: Path) -> None:
    whole = content(store)
    for damaged in ("manifest.json", next(store.glob("catalog-*")).name):
        (store / damaged).write_bytes(whole[damaged][:-9] + b"123456789")
        with pytest.raises(DataError, match=r"DATA-157: .* 0 shards are damaged"):
            data.main(["repair", str(store)])
        to_shards(demo, store)
        assert content(store) == whole


def test_doctor_reads_every_sample_of_shards(
    files: dict[str, Path], store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor_data.main(as_words(files))
    assert "16 samples, all of them can be used" in capsys.readouterr().out
    damage(store, 1)
    (store / "shards" / "00000002" / "body.bin").unlink()
    lost = len((store / "shards" / "00000002" / "listing.jsonl").read_text().splitlines())
    with pytest.raises(DataError, match=r"DATA-076.*report\.json") as caught:
        doctor_data.main(as_words({**files, "output": tmp_path / "out"}))
    assert "no sample is left" not in str(caught.value)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["by_error"]["DATA-152"] == lost and report["by_error"]["DATA-153"] == 1
    assert report["samples"] == 16 and report["clean"] == []


def test_extraction_goes_on_in_a_store_that_was_taken_over(demo: Path, store: Path, tmp_path: Path) -> None:
    """It copies every sample; in a store of files it does not go on, and migrating to one of shards does not either."""
    tools = json.loads((demo / "configs" / "tools.json").read_text())
    configs = demo / "configs"
    words = {
        "mm_data": configs / "data.json",
        "mm_model": configs / "model_wan.json",
        "mm_tool": tmp_path / "tools.json",
    }
    before = stored(store)
    with pytest.raises(DataError, match="DATA-068"):
        migrate.main(as_words({"source": demo, "target": store, "num_frames": 9, "max_height": 64, "max_width": 64}))
    tools["sorafeature"]["save_path"] = str(store)
    (tmp_path / "tools.json").write_text(json.dumps(tools))
    extract.main(as_words({**words, "device": "cpu"}))
    after = stored(store)
    assert list(after) == list(before) and len(list((store / "shards").iterdir())) == 16
    assert all(torch.equal(after[name][key], value) for name in before for key, value in before[name].items())
    tools["sorafeature"]["save_path"] = str(demo / "features")
    (tmp_path / "tools.json").write_text(json.dumps(tools))
    files = content(demo / "features")
    for more in ({}, {"overwrite": True}):
        with pytest.raises(DataError, match=f"DATA-068: {demo / 'features'} is a store of one file a sample"):
            extract.main(as_words({**words, **more, "device": "cpu"}))
    assert content(demo / "features") == files


def test_words_that_are_no_job() -> None:
    for words in ([], ["status"], ["mend", "x"], ["status", "--json-output"]):
        with pytest.raises(ConfigError, match="CFG-006"):
            data.main(words)
