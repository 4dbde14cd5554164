"""Ranks that were started differently, or not at all, are named on every rank before any process group exists."""

import datetime
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import free_port, run_ranks

import mm
from mm.config.place import ProcessPlace, process_place
from mm.errors import ConfigError
from mm.supervise.fingerprint import agree, differences, file_digests, fingerprint
from mm.supervise.job import Job, open_job_store
from mm.supervise.messages import Messages

FLAGS = {"lr": 1e-4, "seed": 1234, "save": "/shared/run", "layers": [4, 4]}
HOST = socket.gethostname()
SECRET = b"of this job"
SECONDS = datetime.timedelta(seconds=1)


def parts(**changed: Any) -> dict[str, str]:
    return fingerprint({"flags": {**FLAGS, **changed}})


def other_code() -> dict[str, str]:
    """The parts of a checkout where one file is another."""
    mine = parts()
    return {**mine, "code": json.dumps({**json.loads(mine["code"]), "mm/rng.py": "f" * 12})}


def outcome(store: Any, rank: int, world_size: int, mine: Mapping[str, str], seconds: float) -> str:
    """What one rank's `agree` says: the error's text, or "agreed"."""
    try:
        agree(Messages(store, SECRET), rank, world_size, mine, seconds * SECONDS)
    except ConfigError as error:
        return str(error)
    return "agreed"


def on_threads(ranks: Mapping[int, Mapping[str, str]], world_size: int, seconds: float) -> dict[int, str]:
    """`agree` of the given ranks, each on a thread, over a store inside this process."""
    store = dist.HashStore()
    said: dict[int, str] = {}

    def one(rank: int, mine: Mapping[str, str]) -> None:
        said[rank] = outcome(store, rank, world_size, mine, seconds)

    threads = [threading.Thread(target=one, args=item) for item in ranks.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return said


def test_64_equal_ranks_agree() -> None:
    assert on_threads({rank: parts() for rank in range(64)}, 64, 60) == dict.fromkeys(range(64), "agreed")


def test_ranks_that_differ_are_named_on_each_of_64_ranks_with_both_values() -> None:
    ranks = {rank: parts() for rank in range(64)}
    ranks.update({rank: parts(lr=3e-4, layers=[4, 5]) for rank in range(8, 16)})
    ranks[63] = other_code()
    said = on_threads(ranks, 64, 60)
    assert len(said) == 64 and len(set(said.values())) == 1
    node, last = sorted(said[0].splitlines(), key=lambda line: "63" in line)
    assert node.startswith(f"CFG-090: Started differently from rank 0 ({HOST}): ranks 8 to 15 ({HOST}), with flags: ")
    assert "lr is 0.0003, on rank 0 0.0001" in node and "layers[1] is 5, on rank 0 4" in node
    assert "seed" not in node and "code" not in node
    assert f"rank 63 ({HOST}), with code: " in last
    mine = file_digests(Path(mm.__file__).parent)["mm/rng.py"]
    assert f'mm/rng.py is "ffffffffffff", on rank 0 "{mine}". Fix: ' in last


def test_a_rank_that_differs_is_told_by_ranks_that_equal_rank_0_when_rank_0_is_the_odd_one() -> None:
    said = on_threads({0: parts(seed=1), **{rank: parts() for rank in range(1, 4)}}, 4, 60)
    assert len(said) == 4 and len(set(said.values())) == 1
    assert "ranks 1 to 3" in said[0] and "seed is 1234, on rank 0 1" in said[0]


@pytest.mark.parametrize("missing", [[0], [3], [1, 2, 6]], ids=str)
def test_ranks_that_never_come_are_named_on_the_others(missing: list[int]) -> None:
    said = on_threads({rank: parts() for rank in range(8) if rank not in missing}, 8, 1)
    assert len(said) == 8 - len(missing) and len(set(said.values())) == 1
    named = {1: f"rank {missing[0]} of 8", 3: "ranks 1 to 2, 6 of 8"}[len(missing)]
    assert said[7].startswith(f"CFG-091: Within 1 s {named} did not come. There: ranks ")
    assert "NODE_RANK" in said[7] and "MASTER_PORT" in said[7]


def test_a_rank_that_comes_after_the_others_gave_up_does_not_wait() -> None:
    store = dist.HashStore()
    first = outcome(store, 0, 2, parts(), 1)
    assert first == outcome(store, 1, 2, parts(), 60)
    assert "rank 1 of 2 did not come" in first


class SlowReader:
    """A store whose answers come late: the last rank to learn why the job ends."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.knew_at = float("inf")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def get(self, key: str) -> bytes:
        time.sleep(0.2)
        if key == "verdict":
            self.knew_at = time.monotonic()
        return self.store.get(key)


def test_nobody_leaves_before_the_slowest_rank_knows_why() -> None:
    """The process that leaves may be the one that runs the store."""
    store, left = dist.HashStore(), {}

    def one(rank: int, its_store: Any) -> None:
        assert "CFG-090" in outcome(its_store, rank, 3, parts(lr=rank), 60)
        left[rank] = time.monotonic()

    slow = SlowReader(store)
    threads = [threading.Thread(target=one, args=(rank, slow if rank == 1 else store)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(left) == [0, 1, 2]
    assert min(left.values()) >= slow.knew_at


def test_nodes_that_count_the_ranks_differently_are_told_so() -> None:
    store = dist.HashStore()
    said: list[str] = []
    threads = [
        threading.Thread(target=lambda r=rank, w=world: said.append(outcome(store, r, w, parts(), 20)))
        for rank, world in [(0, 4), (1, 4), (2, 2), (3, 2)]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(said) == 4
    assert all("number of processes: it is 2, on rank 0 4" in text for text in said)


def test_json_is_compared_by_value_and_other_text_by_line() -> None:
    one = fingerprint({"model.json": '{"a": [1, {"b": 2}], "c": 3}', "zero.yaml": "x: 1\ny: 2\n"})
    same = fingerprint({"model.json": '{\n "c": 3, "a": [1, {"b": 2}]}', "zero.yaml": "x: 1\ny: 2"})
    other = fingerprint({"model.json": '{"a": [1, {"b": 7}]}', "zero.yaml": "x: 1\ny: 3\n"})
    assert one == same
    assert differences(other, one) == [
        "model.json: a[1].b is 7, on rank 0 2, c is absent, on rank 0 3",
        'zero.yaml: line 2 is "y: 3", on rank 0 "y: 2"',
    ]


def test_long_lists_and_values_are_cut_where_they_differ() -> None:
    [many] = differences(
        fingerprint({"flags": dict.fromkeys("abcde", 1)}), fingerprint({"flags": dict.fromkeys("abcde", 2)})
    )
    assert many == "flags: a is 1, on rank 0 2, b is 1, on rank 0 2, c is 1, on rank 0 2 and 2 more"
    path = "/a" * 200
    [long] = differences(
        fingerprint({"flags": {"p": path + "/x" + path}}), fingerprint({"flags": {"p": path + "/y" + path}})
    )
    assert "/x/" in long and "/y/" in long and len(long) < 320


def test_a_part_that_one_side_lacks_is_a_difference() -> None:
    assert differences(fingerprint({"flags": {"lr": 1}}), fingerprint({})) == ["flags: lr is 1, on rank 0 absent"]
    assert differences(fingerprint({}), fingerprint({"flags": {"lr": 1}})) == ["flags: lr is absent, on rank 0 1"]


def test_every_file_of_the_code_counts(tmp_path: Path) -> None:
    package = Path(mm.__file__).parent
    copy = tmp_path / "mm"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = file_digests(copy)
    assert before == file_digests(package) == json.loads(parts()["code"])
    with (copy / "train" / "loop.py").open("a") as file:
        file.write("\n")
    (copy / "rng.py").rename(copy / "random.py")
    after = file_digests(copy)
    assert {name for name in {**before, **after} if before.get(name) != after.get(name)} == {
        "mm/train/loop.py", "mm/rng.py", "mm/random.py",
    }  # fmt: skip


def test_a_store_that_cannot_be_reached_is_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    with pytest.raises(ConfigError, match=rf"^CFG-091: Rank 1 cannot reach the job's store at 127.0.0.1:{port}: .*\n?"):
        open_job_store(ProcessPlace(1, 2, 1), SECONDS)
    with socket.socket() as other:
        other.bind(("0.0.0.0", port))
        other.listen()
        with pytest.raises(ConfigError, match=r"^CFG-091: Rank 0 .*address already in use"):
            open_job_store(ProcessPlace(0, 2, 0), SECONDS)
    for wrong in ("", "abc", "70000"):
        monkeypatch.setenv("MASTER_PORT", wrong)
        with pytest.raises(ConfigError, match=r"^CFG-031"):
            open_job_store(ProcessPlace(0, 2, 0), SECONDS)


def test_a_job_of_one_process_needs_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its variables may say MASTER_PORT, as a shell that exports it for larger jobs has them all."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        with Job(ProcessPlace(0, 1, 0), "gloo", torch.device("cpu"), 1) as job:
            assert (job.rank, job.world_size) == (0, 1)


def four_ranks() -> dict[str, str]:
    """Every case on one rank of one start: starting processes is what costs."""
    where = process_place()
    store = open_job_store(where, 60 * SECONDS).of_start()

    def said(case: str, mine: Mapping[str, str], seconds: float = 60) -> str:
        return outcome(dist.PrefixStore(case, store), where.rank, where.world_size, mine, seconds)

    def join(**flags: Any) -> str:
        try:
            with Job(where, "gloo", torch.device("cpu"), 1, {"flags": flags}):
                total = torch.ones(1)
                dist.all_reduce(total)
                return f"sum {total.item():g}"
        except ConfigError as error:
            return f"{error} initialized={dist.is_initialized()}"

    odd = where.rank == 2
    found = {
        "equal": said("equal", parts()),
        "flag": said("flag", parts(lr=5e-4) if odd else parts()),
        "code": said("code", other_code() if odd else parts()),
        "missing": "stays away" if odd else said("missing", parts(), seconds=3),
        "first job": join(lr=1),
        "job that differs": join(lr=2 if odd else 1),
        "job after it": join(lr=3),
        "restarts": os.environ.setdefault("TORCHELASTIC_RESTART_COUNT", "1"),
        "restarted job": join(lr=3),
    }
    # Started without torchrun, rank 0 runs the store. It dies while the others wait for it: last, as it ends the job.
    if where.rank == 0:
        store.set("port of rank 0", str(free_port()))
    os.environ.update(MASTER_PORT=store.get("port of rank 0").decode(), TORCHELASTIC_USE_AGENT_STORE="False")
    found["job on a store of rank 0"] = join(lr=4)
    of_rank_0 = open_job_store(where, 60 * SECONDS).of_start()
    if where.rank:
        found["lost"] = outcome(of_rank_0, where.rank, where.world_size, parts(), 60)
    else:
        while of_rank_0.add("number come", 0) < 3:
            time.sleep(0.05)
    return found


def test_four_processes() -> None:
    ranks = run_ranks(4, four_ranks)
    for rank, found in enumerate(ranks):
        assert found["equal"] == "agreed"
        assert f"rank 2 ({HOST}), with flags: lr is 0.0005, on rank 0 0.0001." in found["flag"]
        assert f'rank 2 ({HOST}), with code: mm/rng.py is "ffffffffffff", on rank 0 ' in found["code"]
        if rank != 2:
            assert found["missing"].startswith(
                f"CFG-091: Within 3 s rank 2 of 4 did not come. There: ranks 0 to 1, 3 ({HOST})"
            )
        assert found["first job"] == found["job after it"] == found["restarted job"] == "sum 4"
        assert found["job on a store of rank 0"] == "sum 4"
        assert "CFG-090" in found["job that differs"] and "lr is 2, on rank 0 1" in found["job that differs"]
        assert found["job that differs"].endswith("initialized=False")
        if rank:
            assert found["lost"].startswith(f"CFG-091: Rank {rank} lost the job's store while joining: ")
