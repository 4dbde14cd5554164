"""Clips that cannot be read: left out, counted and listed; the same whatever the number of processes and of starts."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from extraction_runs import edit, opened, run, words
from feature_samples import write_clip, write_data_set, write_extraction_files, write_sound
from store_content import content, is_finished, listed

from mm.cli import extract as command
from mm.config.bad_samples import FAIL, parse_on_bad_sample
from mm.errors import ConfigError, DataError
from mm.extract.run import ExtractReport

NAMES = ["good", "empty", "fine", "sound", "missing", "short", "announced", "well"]
BAD = {"empty": "DATA-002", "sound": "DATA-003", "missing": "DATA-001", "short": "DATA-004", "announced": "DATA-004"}
MOST = parse_on_bad_sample("skip:max=63%")  # of 8: 5.04


def write_bad_data_set(folder: Path) -> Path:
    """Eight rows, of which five cannot be used; returns data.json."""
    rows: list[dict[str, Any]] = [{"path": f"{name}.mp4", "cap": name} for name in NAMES]
    rows[6]["num_frames"] = 3
    annotation = write_data_set(folder, rows, num_frames=9)
    (folder / "empty.mp4").write_bytes(b"")
    write_sound(folder / "sound.mp4")
    (folder / "missing.mp4").unlink()
    write_clip(folder / "short.mp4", num_frames=4)
    return annotation


@pytest.fixture
def files(tmp_path: Path, weights: Path) -> dict[str, Path]:
    annotation = write_bad_data_set(tmp_path / "set")
    return write_extraction_files(tmp_path, weights, annotation, tmp_path / "set", tmp_path / "store")


def lines(store: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (store / name).read_text().splitlines()]


def test_bad_clips_are_left_out_listed_counted_and_told(
    files: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = tmp_path / "store"
    caplog.set_level(logging.INFO)
    assert run(files, on_bad_sample=MOST) == ExtractReport(listed=3, encoded=3, reused=0, skipped=5)
    assert [row["path"] for row in listed(store)] == ["good.mp4", "fine.mp4", "well.mp4"]
    skipped = lines(store, "skipped.jsonl")
    assert {row["sample"].removesuffix(".mp4"): row["error"] for row in skipped} == BAD
    assert [row["sample"] for row in skipped] == [f"{name}.mp4" for name in NAMES if name in BAD], "in their order"
    assert all(row["file"] == str(tmp_path / "set" / row["sample"]) and row["reason"] for row in skipped)
    assert "3 samples are listed" in caplog.text and "5 clips cannot be read and are left out" in caplog.text
    assert len(opened(store, tmp_path)) == 3, "training takes the store"
    assert not (store / "work").exists()


def test_a_second_start_gives_the_same_store(files: dict[str, Path], tmp_path: Path) -> None:
    run(files, on_bad_sample=MOST)
    before = content(tmp_path / "store")
    assert run(files, on_bad_sample=MOST) == ExtractReport(listed=3, encoded=0, reused=3, skipped=5)
    assert content(tmp_path / "store") == before


def test_two_processes_give_the_same_store(files: dict[str, Path], tmp_path: Path) -> None:
    """Each makes its part; who comes second finishes the store."""
    run(files, on_bad_sample=MOST)
    alone = content(tmp_path / "store")
    edit(files["mm_tool"], "sorafeature", "save_path", value=str(tmp_path / "shared"))
    reports = [run(files, on_bad_sample=MOST, shard_of=f"{part}/2") for part in (2, 1)]
    assert content(tmp_path / "shared") == alone
    assert [(report.listed, report.encoded) for report in reports] == [(0, 1), (3, 2)]
    assert [report.skipped for report in reports] == [3, 5], "of its part, then of the finished store"


def test_the_share_is_counted_over_all_processes(files: dict[str, Path], tmp_path: Path) -> None:
    """Neither part has more than four of the eight, both have five."""
    limit = parse_on_bad_sample("skip:max=62%")
    assert run(files, on_bad_sample=limit, shard_of="1/2").skipped == 2
    with pytest.raises(DataError) as caught:
        run(files, on_bad_sample=limit, shard_of="2/2")
    first, *others = caught.value.problems
    assert first.id == "DATA-073" and "5 of 8 clips cannot be read; skip:max=62% allows 4." in first.message
    assert sorted(problem.id for problem in others) == sorted(BAD.values())
    assert run(files, on_bad_sample=MOST).listed == 3, "the next start goes on"


def test_a_video_that_was_replaced_is_taken_in(files: dict[str, Path], tmp_path: Path) -> None:
    run(files, on_bad_sample=MOST)
    write_clip(tmp_path / "set" / "sound.mp4", num_frames=9)
    assert run(files, on_bad_sample=MOST) == ExtractReport(listed=4, encoded=1, reused=3, skipped=4)
    assert "sound.mp4" not in (tmp_path / "store" / "skipped.jsonl").read_text()


def test_nothing_is_skipped_any_more(files: dict[str, Path], tmp_path: Path) -> None:
    run(files, on_bad_sample=MOST)
    (tmp_path / "set" / "data.json").write_text(json.dumps([{"path": "good.mp4", "cap": "good"}]))
    assert run(files).listed == 1
    assert not (tmp_path / "store" / "skipped.jsonl").exists()


def test_more_than_the_share_is_an_error_with_the_counts(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        run(files, on_bad_sample=parse_on_bad_sample("skip:max=62%"))
    first, *others = caught.value.problems
    assert first.id == "DATA-073" and "5 of 8 clips cannot be read; skip:max=62% allows 4." in first.message
    assert sorted(problem.id for problem in others) == sorted(BAD.values())
    assert not is_finished(tmp_path / "store") and not (tmp_path / "store" / "skipped.jsonl").exists()
    assert run(files, on_bad_sample=MOST).listed == 3, "the next start goes on"


def test_the_default_stops(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        run(files, on_bad_sample=FAIL)
    assert caught.value.id == "DATA-001" and len(caught.value.problems) == 1, "what is known without reading, first"


def test_rows_that_are_wrong_stop_in_any_case(files: dict[str, Path], tmp_path: Path) -> None:
    rows = json.loads((tmp_path / "set" / "data.json").read_text())
    (tmp_path / "set" / "data.json").write_text(json.dumps([*rows, {"path": "../x.mp4", "cap": ""}, {"path": "y"}]))
    with pytest.raises(DataError) as caught:
        run(files, on_bad_sample=MOST)
    assert [problem.id for problem in caught.value.problems] == ["DATA-063", "DATA-062"]
    assert not (tmp_path / "store").exists()


def test_the_flag(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="CFG-110"):
        command.main([*words(files), "--on-bad-sample", "skip"])
    command.main([*words(files), "--on-bad-sample", "skip:max=90%", "--device", "cpu"])
    assert len(lines(tmp_path / "store", "skipped.jsonl")) == 5
