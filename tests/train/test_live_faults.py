"""`mm train --live` when something goes wrong: kills, damage, full disks, and words that make no sense."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from feature_samples import write_clip
from live_stores import write_extraction, write_feature_data, write_media
from test_live_training import counts, flags
from training_runs import bits, run, words

from mm.cli import data as data_command
from mm.cli import doctor as doctor_command
from mm.cli import run as run_command
from mm.cli import train as train_command
from mm.data.store.shard import INDEX
from mm.data.store.table import read_table_header
from mm.errors import ConfigError, DataError, MMError
from mm.extract.live.parts import kept_bytes
from mm.train.callbacks.base import Callback, Every, StepDone
from mm.train.records import Record


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_media(tmp_path_factory.mktemp("set"), videos=6, images=2)


@pytest.fixture(scope="module")
def expected(demo: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """Losses from a store that was extracted before."""
    folder = tmp_path_factory.mktemp("before")
    run_command.main([str(write_extraction(demo, table, folder / "store"))])
    return bits(run(demo, folder / "run", **flags(demo, folder / "store")))


def parts_of(store: Path) -> list[Path]:
    return sorted(store.glob("former/[!.]*"))


@pytest.mark.nightly
def test_a_killed_training_leaves_whole_parts_and_the_next_one_goes_on(
    demo: Path, table: Path, expected: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    store, save = tmp_path / "store", tmp_path / "run"
    live = write_extraction(demo, table, store)
    told = flags(demo, store, live=[live], live_budget="300kB")  # parts of 75 kB, some three samples each
    command = [sys.executable, "-m", "mm.cli.train", *words(demo, save, **{**told, "train_iters": 10**6})]
    process = subprocess.Popen(command, env=dict(os.environ), stderr=subprocess.DEVNULL)
    until = time.monotonic() + 240
    while not (list(store.glob("former/.tmp-live-*/body.bin")) and len(parts_of(store)) > 1):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole = sum(int(read_table_header(part / INDEX, "shard index", "").about["samples"]) for part in parts_of(store))
    assert whole > 0
    assert bits(run(demo, tmp_path / "next", **told)) == expected
    rows = counts(tmp_path / "next")
    assert sum(row[0] for row in rows) == 16 - sum(row[2] for row in rows) and sum(row[2] for row in rows) >= whole
    assert not list(store.glob("former/.tmp-*")) and kept_bytes(store) <= 300_000


def test_the_budget_ends_keeping_and_not_the_training(
    demo: Path, table: Path, expected: list[tuple[Any, ...]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, save = tmp_path / "store", tmp_path / "run"
    live = write_extraction(demo, table, store)
    assert bits(run(demo, save, **flags(demo, store, live=[live], live_budget="120kB"))) == expected
    rows, size = counts(save), kept_bytes(store)
    kept = sum(row[1] for row in rows)
    assert 0 < kept < 8 and 0 < size <= 120_000
    assert sum(row[0] for row in rows) == 8 + (8 - kept) and sum(row[2] for row in rows) == kept
    assert sum("the budget is used up" in record.message for record in caplog.records) == 1


def test_a_disk_that_refuses_ends_keeping_and_not_the_training(
    demo: Path, table: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing can be written where parts go."""
    found = []
    for name in ("refused", "free"):
        store = tmp_path / name
        live = write_extraction(demo, table, store)
        if name == "refused":
            store.mkdir()
            (store / "former").write_text("a file stands there")
        told = flags(demo, store, live=[live]) | {"mm_data": write_feature_data(demo, store)}
        found.append(bits(run(demo, tmp_path / f"run {name}", **told)))
    assert found[0] == found[1]
    assert [row[1] for row in counts(tmp_path / "run refused")] == [0] * 4
    assert sum("no more features are kept" in record.message for record in caplog.records) == 1


def test_a_damaged_part_is_made_again(
    demo: Path, table: Path, expected: list[tuple[Any, ...]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, save = tmp_path / "store", tmp_path / "run"
    live = write_extraction(demo, table, store)
    run(demo, save, **flags(demo, store, live=[live], train_iters=1))
    body = max((part / "body.bin" for part in parts_of(store)), key=lambda path: path.stat().st_size)
    content = bytearray(body.read_bytes())
    for place in (len(content) // 3, len(content) // 2):
        content[place] ^= 1
    body.write_bytes(content)
    found = run(demo, save, **flags(demo, store, live=[live], num_workers=1))
    assert bits(found) == expected
    assert 1 <= sum(row[0] for row in counts(save)[2:]) <= 2
    assert any("is made again: DATA-153" in record.message for record in caplog.records)


class Removal(Callback):
    """Removes or replaces all videos after the first step."""

    every = Every(1)

    def __init__(self, folder: Path, *, replace: bool = False) -> None:
        self._folder, self._replace = folder, replace

    def after_step(self, done: StepDone) -> Sequence[Record]:
        for video in self._folder.glob("*.mp4"):
            video.unlink()
            if self._replace:
                write_clip(video, num_frames=20, height=64, width=64)
        return []


def test_videos_that_are_replaced_while_a_training_runs(demo: Path, tmp_path: Path) -> None:
    table = write_media(tmp_path / "set", videos=4)
    live = write_extraction(demo, table, tmp_path / "store")
    told = flags(demo, tmp_path / "store", live=[live], global_batch_size=2, train_iters=2)
    with pytest.raises(DataError, match=r"DATA-240: .*\.mp4 is another file than when"):
        train_command.main(words(demo, None, **told), callbacks=[Removal(tmp_path / "set", replace=True)])


def test_videos_that_go_while_a_training_runs(demo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An error, or the next sample in their place: here those that are kept."""
    for policy in ("fail", "skip:max=60%"):
        folder = tmp_path / policy[:4]
        table = write_media(folder / "set", videos=4)
        live = write_extraction(demo, table, folder / "store")
        told = flags(demo, folder / "store", live=[live], global_batch_size=2, train_iters=2, on_bad_sample=policy)
        command = words(demo, folder / "run", **told)
        if policy == "fail":
            with pytest.raises(DataError, match=r"DATA-001: .*\.mp4"):
                train_command.main(command, callbacks=[Removal(folder / "set")])
            continue
        train_command.main(command, callbacks=[Removal(folder / "set")])
        assert counts(folder / "run") == [(2, 2, 0), (0, 0, 2)]
        assert sum("is replaced by" in record.message for record in caplog.records) == 2


def test_words_that_make_no_sense(demo: Path, table: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    live = write_extraction(demo, table, store)
    told = flags(demo, store)

    def problems(**more: Any) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            run(demo, tmp_path / "run", **{**told, **more})
        return [str(problem) for problem in caught.value.problems]

    def changed(name: str, **values: Any) -> Path:
        return write_extraction(demo, table, tmp_path / name, **values)

    (found,) = problems(live=[changed("other")])
    assert found.startswith(f"CFG-241: output.path in {tmp_path}/other.yaml is {tmp_path}/other, and dataset_param.")
    (found,) = problems(live=[live, live])
    assert "CFG-241" in found and "which write to one store" in found
    (found,) = problems(live=[changed("store", encoders__image={"from_pretrained": "x"})])
    assert found.startswith("CFG-074")
    (found,) = problems(live=[changed("store", extraction__task="speedcontrol")])
    assert found.startswith("CFG-242") and "speedcontrol, and the model is t2v" in found
    (found,) = problems(live=[changed("store", extraction__shard_of="1/2")])
    assert found.startswith("CFG-243")
    assert problems(live=[tmp_path / "nowhere.yaml"])[0].startswith("CFG-001")
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({"training": {"steps": 1}}))
    assert problems(live=[tmp_path / "train.yaml"])[0].startswith("CFG-194")
    write_extraction(demo, table, store)
    assert problems(live=[live], live_budget="20")[0].startswith("CFG-244: --live-budget is '20', and no size.")
    assert "less than" in problems(live=[live], live_budget="1kB")[0]
    assert problems(live_budget="1GB")[0].startswith("CFG-245: --live-budget has no effect without --live.")
    assert not store.exists()


def test_a_store_of_another_recipe(demo: Path, table: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    run_command.main([str(write_extraction(demo, table, store))])
    other = write_extraction(demo, table, store, extraction__seed=4)
    with pytest.raises(DataError, match=r"DATA-014: .*seed is 3, expected 4"):
        run(demo, tmp_path / "run", **flags(demo, store, live=[other]))


def test_rows_that_changed_are_made_again_and_no_other(demo: Path, tmp_path: Path) -> None:
    """A resumed run is told that its data changed, and goes on with what is kept where it may."""
    table = write_media(tmp_path / "set", videos=4)
    store, save = tmp_path / "store", tmp_path / "run"
    live = write_extraction(demo, table, store)
    told = flags(demo, store, live=[live], train_iters=1)
    run(demo, save, **told)
    rows = json.loads(table.read_text())
    rows[1]["text"] = "a green square"
    table.write_text(json.dumps(rows))
    with pytest.raises(MMError, match="CFG-160"):
        run(demo, save, **{**told, "train_iters": 2})
    run(demo, save, **{**told, "train_iters": 2}, resume_changed=["data"])
    assert counts(save)[1] == (1, 1, 3)


def test_status_tells_what_trainings_keep(
    demo: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    live = write_extraction(demo, table, store)
    run(demo, None, **flags(demo, store, live=[live], train_iters=1))
    capsys.readouterr()
    data_command.main(["status", str(store)])
    told = capsys.readouterr().out
    assert "not finished" in told and "4 samples are kept to be copied: made by trainings (--live)" in told
    data_command.main(["status", str(store), "--json-output"])
    assert json.loads(capsys.readouterr().out)["extraction"]["kept"] == 4


@pytest.mark.nightly
def test_the_doctor_counts_encoders_where_they_stand(
    demo: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the first rank of a replica, in their precision; elsewhere and without --live there are none."""
    store = tmp_path / "store"
    live = write_extraction(demo, table, store)
    weights = demo / "weights" / "Wan2.1-T2V-Tiny-Diffusers"
    size = sum(
        len(path.read_bytes()) - 8 - int.from_bytes(path.read_bytes()[:8], "little")
        for folder in ("vae", "text_encoder")
        for path in (weights / folder).glob("*.safetensors")
    )
    told = words(demo, None, **flags(demo, store, live=[live], context_parallel_size=2))
    peaks = []
    for rank, more in ((0, told), (1, told), (0, words(demo, None, **flags(demo, store, context_parallel_size=2)))):
        capsys.readouterr()
        doctor_command.main([*more, "--dry-run", "--world-size", "2", "--rank", str(rank), "--json-output"])
        peaks.append(json.loads(capsys.readouterr().out))
    assert [report["peak"].get("encoders") for report in peaks] == [size, None, None]
    assert all(report["peak_bytes"] == sum(report["peak"].values()) for report in peaks)
    doctor_command.main(words(demo, None, **flags(demo, store, live=[live])))
    assert f"those of {store} are made by the run" in " ".join(capsys.readouterr().out.split())
    assert not store.exists()
    resumed = {**flags(demo, store, live=[live]), "train_iters": 1}
    run(demo, tmp_path / "run", **resumed)
    doctor_command.main(words(demo, tmp_path / "run", **{**resumed, "train_iters": 2}))
    assert "goes on from" in " ".join(capsys.readouterr().out.split())
