"""Several processes on one store: claims, kills, takeovers, two that finish at once; always the same bytes."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from extraction_runs import made, run, words
from feature_samples import write_data_set, write_encoders, write_extraction_files
from programs import Forked, command
from store_content import content, is_finished, listed, shards_of

from mm.cli import data as data_command
from mm.cli import extract as extract_command
from mm.config.bad_samples import FAIL
from mm.data.files import make_folder
from mm.data.recipe import load_recipe
from mm.data.store import writer
from mm.data.store.shard import shard_folder
from mm.errors import DataError, DataWriteError
from mm.extract.claims import LEASE_S, Claims, Owner, read_claim
from mm.extract.plan import Plan, open_plan
from mm.extract.store import finish

NUM_ROWS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, twelve clips and a finished store `alone` of them."""
    home = tmp_path_factory.mktemp("place")
    write_encoders(home / "weights")
    rows = [{"path": f"{row}.mp4", "cap": "a red circle" if row % 2 else ""} for row in range(NUM_ROWS)]
    write_data_set(home / "set", rows, num_frames=9)
    run(files_of(home, home / "alone"))
    return home


def files_of(place: Path, store: Path) -> dict[str, Path]:
    folder = place / f"files of {store.name} {store.parent.name}"
    return write_extraction_files(folder, place / "weights", place / "set" / "data.json", place / "set", store)


Starter = Callable[..., Forked]


@pytest.fixture
def start() -> Iterator[Starter]:
    """Starts a worker on a store, which ends with the test."""
    started: list[Forked] = []

    def start(place: Path, store: Path, *flags: str) -> Forked:
        told = [*words(files_of(place, store)), "--seed", "3", *flags, "--device", "cpu"]
        started.append(command(extract_command.main, told))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def stopped_after(shards: int, process: Forked, store: Path) -> None:
    """Wait until a worker has made that many shards, and stop it where it is."""
    until = time.monotonic() + 100
    while made(store) < shards and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)


def test_workers_come_one_is_killed_and_the_others_take_over(place: Path, tmp_path: Path, start: Starter) -> None:
    """Of two processes one is stopped in the middle of a shard, killed, and another one comes."""
    store = tmp_path / "store"
    first = start(place, store)
    stopped_after(2, first, store)
    assert not is_finished(store)
    claimed = {path.name for path in (store / "work" / "claims").iterdir() if path.name.isdigit()}
    mine = {name for name in claimed if not (store / "shards" / name).exists()}
    assert mine, "it holds what it works on"
    second = start(place, store)
    assert second.wait() == 0
    assert not is_finished(store) and made(store) == NUM_ROWS - len(mine), "it waits for nobody"
    first.kill()
    first.wait()
    third = start(place, store)
    assert third.wait() == 0
    assert content(store) == content(place / "alone")


def test_a_worker_that_was_thought_dead_does_no_harm(place: Path, tmp_path: Path, start: Starter) -> None:
    """Its lease ends while it is stopped; another one makes its shards, finishes, and then it goes on."""
    store = tmp_path / "store"
    first = start(place, store)
    stopped_after(2, first, store)
    claims = store / "work" / "claims"
    long_ago = time.time() - LEASE_S - 60
    for claim in claims.iterdir():
        os.utime(claim, (long_ago, long_ago))
    assert run(files_of(place, store)).listed == NUM_ROWS
    before = content(store)
    first.send_signal(signal.SIGCONT)
    assert first.wait() == 0
    assert content(store) == before == content(place / "alone")


@pytest.mark.parametrize("parts", [pytest.param(3, marks=pytest.mark.nightly), 2])
def test_parts_at_once_give_the_same_bytes(parts: int, place: Path, tmp_path: Path, start: Starter) -> None:
    store = tmp_path / "store"
    started = [start(place, store, "--shard-of", f"{part}/{parts}") for part in range(1, parts + 1)]
    assert [process.wait() for process in started] == [0] * parts
    assert content(store) == content(place / "alone")


def test_a_claim_of_another_machine_holds_until_its_lease_ends(place: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    run(files_of(place, store), shard_of="1/2")
    claims = store / "work" / "claims"
    claims.mkdir(parents=True, exist_ok=True)
    elsewhere = replace(Owner.this_process(), host="elsewhere", machine="another", pid=1)
    (claims / "00000001").write_text(json.dumps({**asdict(elsewhere), "since": time.time()}))
    report = run(files_of(place, store))
    assert report.listed == 0 and report.encoded == NUM_ROWS // 2 - 1 and not is_finished(store)
    os.utime(claims / "00000001", (1, 1))
    assert run(files_of(place, store)).listed == NUM_ROWS
    assert content(store) == content(place / "alone")


def test_of_two_that_find_a_stale_claim_one_takes_it(tmp_path: Path) -> None:
    dead = replace(Owner.this_process(), began=1.0)
    (tmp_path / "7").write_text(json.dumps({**asdict(dead), "since": 1.0}))
    with Claims(tmp_path) as first, Claims(tmp_path) as second:
        assert first.take("7") and not second.take("7") and not first.take("7")
        assert not first.is_lost("7")
        found = read_claim(tmp_path / "7")
        assert found is not None and found.owner == first.owner
        first.give_back("7")
        assert second.take("7") and not first.take("7")
    assert list(tmp_path.iterdir()) == []


def test_claims_of_many_processes_exclude_each_other(tmp_path: Path) -> None:
    """Eight processes take and give back one claim; no two have it at a time."""
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=_count, args=(tmp_path,)) for _ in range(8)]
    (tmp_path / "count").write_text("0")
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert (tmp_path / "count").read_text() == "80"


def _count(folder: Path) -> None:
    with Claims(folder / "claims") as claims:
        for _ in range(10):
            with claims.waiting_for("counter", 50):
                number = int((folder / "count").read_text())
                time.sleep(0.001)
                (folder / "count").write_text(str(number + 1))


def test_waiting_for_a_plan_ends(tmp_path: Path) -> None:
    with Claims(tmp_path) as first, Claims(tmp_path) as second:
        assert first.take("plan")
        with pytest.raises(DataError, match="DATA-191: process"), second.waiting_for("plan", 0.3):
            pass


def test_two_finish_at_once(place: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(place / "alone", tmp_path / "store"))
    before = content(store)
    (store / "manifest.json").unlink()
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=_finish, args=(store,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert content(store) == before


def _plan(store: Path) -> Plan:
    plan = open_plan(store)
    assert plan is not None
    return plan


def _finish(store: Path) -> None:
    assert finish(store, _plan(store), FAIL) is not None


def test_a_shard_of_other_rows_finishes_no_store(place: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(place / "alone", tmp_path / "store"))
    (store / "manifest.json").unlink()
    shutil.rmtree(shard_folder(store, 3))
    shutil.copytree(shard_folder(store, 5), shard_folder(store, 3))
    assert finish(store, _plan(store), FAIL) is None
    assert not is_finished(store)
    assert run(files_of(place, store)).encoded == 1
    assert content(store) == content(place / "alone")


def test_status_tells_who_works_and_what_is_left(
    place: Path, tmp_path: Path, start: Starter, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    first = start(place, store)
    stopped_after(3, first, store)
    before = content(store)

    def status() -> dict[str, Any]:
        capsys.readouterr()
        data_command.main(["status", str(store), "--json-output"])
        return dict(json.loads(capsys.readouterr().out)["extraction"])

    told = status()
    running = [one["run"] for one in told["running"]]
    assert told["runs"] == told["rows"] == NUM_ROWS and told["done"] == told["rows_done"] == made(store)
    assert running and told["to_do"] == NUM_ROWS - told["done"] - len(running)
    assert {one["pid"] for one in told["running"]} == {first.pid}
    assert not any(one["is_expired"] for one in told["running"])
    assert told["rate"] > 0 and told["left_s"] == pytest.approx((NUM_ROWS - told["done"]) / told["rate"])
    first.kill()
    first.wait()
    told = status()
    assert (
        all(one["is_expired"] for one in told["running"])
        and told["to_do"] + len(told["running"]) == NUM_ROWS - told["done"]
    )
    data_command.main(["status", str(store)])
    said = capsys.readouterr().out
    assert f"{told['done']} of {NUM_ROWS} shards done, 0 running, {len(running)} left by a worker" in said
    assert f"process {first.pid} of " in said and "which is gone" in said and "sample/s" in said
    assert content(store) == before, "it writes nothing"
    run(files_of(place, store))
    data_command.main(["status", str(store)])
    assert "extraction" not in capsys.readouterr().out


def test_a_failure_is_told_until_the_shard_is_made(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "place"
    shutil.copytree(place / "set", home / "set")
    (home / "weights").symlink_to(place / "weights")
    good = (home / "set" / "4.mp4").read_bytes()
    (home / "set" / "4.mp4").write_bytes(good[:500])
    with pytest.raises(DataError, match="DATA-002"):
        run(files_of(home, tmp_path / "store"))
    data_command.main(["status", str(tmp_path / "store")])
    said = capsys.readouterr().out
    assert "4 of 12 shards done, 0 running, 0 left by a worker, 1 failed, 8 to do" in said
    assert "shard 4: failed on " in said and "DATA-002: " in said and "4.mp4" in said
    (home / "set" / "4.mp4").write_bytes(good)
    run(files_of(home, tmp_path / "store"))
    assert shards_of(tmp_path / "store") == shards_of(place / "alone")


def test_repair_makes_damaged_shards_again_and_keeps_their_whole_samples(place: Path, tmp_path: Path) -> None:
    files = files_of(place, tmp_path / "store")
    store = tmp_path / "store"
    assert run(files, shard_rows=4).encoded == NUM_ROWS
    assert sorted(os.listdir(store / "shards")) == ["00000000", "00000001", "00000002"]
    before = content(store)
    body = shard_folder(store, 1) / "body.bin"
    flipped = bytearray(body.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    body.write_bytes(flipped)
    with pytest.raises(DataError, match=r"DATA-157: .*1 shards are damaged"):
        data_command.main(["repair", str(store)])
    assert not is_finished(store)
    assert run(files, shard_rows=4).encoded == 1, "of its four samples one is damaged"
    assert content(store) == before
    body.unlink()
    with pytest.raises(DataError, match="DATA-157"):
        data_command.main(["repair", str(store)])
    assert run(files, shard_rows=4).encoded == 4
    assert content(store) == before
    assert run(files, shard_rows=6).encoded == 0, "another cut of the rows copies all samples"
    assert [row["sample"] for row in listed(store)] == [f"{row}.mp4" for row in range(NUM_ROWS)]
    assert load_recipe(store) == load_recipe(place / "alone")


def test_captions_are_stored_once_a_shard_and_the_empty_one_once(place: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    run(files_of(place, store), shard_rows=4)
    bodies = [(shard_folder(store, number) / "body.bin").read_bytes() for number in range(3)]
    assert [body.count(b'"prompt_mask"') for body in bodies] == [2, 1, 1]


def test_rows_that_change_while_a_worker_works_stop_it(place: Path, tmp_path: Path, start: Starter) -> None:
    home = tmp_path / "place"
    shutil.copytree(place / "set", home / "set")
    (home / "weights").symlink_to(place / "weights")
    store = tmp_path / "store"
    first = start(home, store)
    stopped_after(2, first, store)
    table = home / "set" / "data.json"
    table.write_text(json.dumps([{**row, "cap": "blue"} for row in json.loads(table.read_text())]))
    run(files_of(home, store))
    first.send_signal(signal.SIGCONT)
    assert first.wait() == 65
    first.wait()
    run(files_of(home, store))
    assert is_finished(store) and {row["cap"] for row in listed(store)} == {"blue"}


def test_a_folder_that_is_removed_before_a_worker_writes_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As who finishes a store does where a worker seems dead: a failure to write, which the worker then passes over."""

    def removed(folder: Path, name: str) -> None:
        make_folder(folder, name)
        shutil.rmtree(folder)

    monkeypatch.setattr(writer, "make_folder", removed)
    with pytest.raises(DataWriteError, match="DATA-018"):
        writer.ShardWriter(tmp_path, 2, "recipe")
