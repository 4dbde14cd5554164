"""Saving in the background: values of the moment it was asked for, the same files, and nothing lost to a kill."""

import multiprocessing
import os
import random
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_store import assert_holds, names, pieces_for

from mm.checkpoint import background
from mm.checkpoint.background import BackgroundSaver, copy_bytes
from mm.checkpoint.comm import ProcessGroupComm, SingleProcess
from mm.checkpoint.fault import SAVE_POINTS
from mm.checkpoint.store import Piece, find_latest, pieces_of_flat_range, save, whole_piece, writing
from mm.errors import CheckpointError

AFTER_COMMIT = SAVE_POINTS[SAVE_POINTS.index("save.committed") :]


def saver(root: Path) -> BackgroundSaver:
    return BackgroundSaver(root, SingleProcess())


def test_values_are_those_of_the_moment(tmp_path, monkeypatch):
    """The loop changes everything while the thread is held up; the checkpoint has what was there before."""
    go_on = threading.Event()

    def held_up(*arguments, **others):
        assert go_on.wait(20)
        return save(*arguments, **others)

    monkeypatch.setattr(background, "save", held_up)
    pieces = pieces_for(1)
    with writing(tmp_path), saver(tmp_path) as saves:
        saves.start(1, pieces, {"step": 1})
        for piece in pieces:
            piece.tensor.fill_(7)
        changed = time.monotonic()
        assert find_latest(tmp_path) is None
        saves.check()  # nothing has failed, nothing is waited for
        go_on.set()
    (times,) = saves.times
    assert times.called <= times.copied < changed < times.committed
    assert_holds(find_latest(tmp_path), 1)


def test_one_after_the_other_and_in_the_same_memory(tmp_path):
    asked = []

    def host_memory(num_bytes):
        asked.append(num_bytes)
        return torch.full((num_bytes,), 255, dtype=torch.uint8)  # NaN, where nothing was copied to

    with writing(tmp_path), BackgroundSaver(tmp_path, SingleProcess(), host_memory) as saves:
        for step in (1, 2, 3):
            saves.start(step, pieces_for(step), {}, keep_latest=2)
        saves.start(4, pieces_for(4), {}, keep_latest=2)
    assert asked == [copy_bytes(pieces_for(1))]
    assert names(tmp_path) == ["iter_0000003", "iter_0000004", "latest_checkpointed_iteration.txt"]
    assert_holds(find_latest(tmp_path), 4)


def test_the_memory_is_the_bytes_of_the_tensors(tmp_path):
    """In whole pages of 4096, where the next power of two for each tensor would be a half more."""
    sizes = [1, 1024, 1025, 3000, 5000, 24_000, 40_000]
    pieces = [whole_piece(f"w{size}", torch.full((size,), float(size))) for size in sizes]
    pieces.append(whole_piece("half", torch.ones(2049, dtype=torch.bfloat16)))
    pages = [1, 1, 2, 3, 5, 24, 40, 2]
    asked, memories = [], []

    def host_memory(num_bytes):
        asked.append(num_bytes)
        memories.append(torch.empty(num_bytes, dtype=torch.uint8))
        return memories[-1]

    with writing(tmp_path), BackgroundSaver(tmp_path, SingleProcess(), host_memory) as saves:
        saves.start(1, pieces, {})
        saves.finish()
        saves.start(2, pieces[:3], {})  # of another layout: other memory
    assert asked == [4096 * sum(pages), 4096 * 4]
    starts = [(copy.tensor.data_ptr() - memories[1].data_ptr()) / 4096 for copy in saves._copies]
    assert starts == [0, 1, 2]


def test_a_rank_that_saves_nothing_has_no_memory(tmp_path):
    with writing(tmp_path), BackgroundSaver(tmp_path, SingleProcess(), lambda size: pytest.fail(str(size))) as saves:
        assert saves._copied([]) == []


@pytest.mark.parametrize("ask", ["check", "finish", "start", "leave"])
def test_a_failure_reaches_the_loop(tmp_path, ask):
    save(tmp_path, 1, pieces_for(1), {})
    saves = saver(tmp_path)
    saves.start(2, [whole_piece("w", torch.tensor([1.0, float("nan")]))], {})
    assert saves._thread is not None
    saves._thread.join()
    with pytest.raises(CheckpointError, match="CKPT-016"):
        {
            "check": saves.check,
            "finish": saves.finish,
            "start": lambda: saves.start(3, pieces_for(3), {}),
            "leave": lambda: saves.__exit__(None, None, None),
        }[ask]()
    assert_holds(find_latest(tmp_path), 1)
    assert names(tmp_path) == ["iter_0000001", "latest_checkpointed_iteration.txt"]
    saves.start(4, pieces_for(4), {})  # told once; the next one is a new attempt
    saves.finish()
    assert_holds(find_latest(tmp_path), 4)


def test_a_run_that_ends_by_an_error_does_not_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(background, "save", lambda *arguments: time.sleep(5))
    started = time.monotonic()
    with pytest.raises(KeyError), saver(tmp_path) as saves:
        saves.start(1, pieces_for(1), {})
        raise KeyError
    assert time.monotonic() - started < 3


# --- kills


@pytest.fixture(scope="module")
def processes():
    """Children are forked from a server that has imported everything, so each costs milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mm.checkpoint.background", "test_background"])
    return context


def pieces_of_rank(value: int, rank: int, world_size: int) -> list[Piece]:
    """This rank's part of the tensors, of which no box is whole."""
    pieces = []
    for piece in pieces_for(value):
        flat = piece.tensor.reshape(-1)
        width = -(-len(flat) // world_size)
        part = flat[rank * width : (rank + 1) * width]
        pieces += pieces_of_flat_range(piece.key, piece.global_shape, min(rank * width, len(flat)), part)
    return pieces


def save_as_rank(root: str, rank: int, world_size: int, port: int, setting: str, in_background: bool) -> None:
    """One rank that saves step 2; with a setting it dies on the way."""
    os.environ["MM_FAULT"] = setting
    folder, comm = Path(root), SingleProcess()
    if world_size > 1:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        limit = timedelta(seconds=15)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
        comm = ProcessGroupComm()
    pieces = pieces_of_rank(2, rank, world_size)
    if rank:  # the lock is rank 0's
        save_in(folder, comm, pieces, in_background)
    else:
        with writing(folder):
            save_in(folder, comm, pieces, in_background)


def save_in(folder: Path, comm, pieces: list[Piece], in_background: bool) -> None:
    if not in_background:
        save(folder, 2, pieces, {}, comm, keep_latest=1)
        return
    with BackgroundSaver(folder, comm) as saves:
        saves.start(2, pieces, {}, 1)


FEW = (
    "save.start",
    "save.shard_half_written",
    "save.before_rename",
    "save.committed",
    "save.tracker_drafted",
    "save.marked",
)


@pytest.mark.parametrize("in_background", [False, True], ids=["in the loop", "in the background"])
@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("point", [p if p in FEW else pytest.param(p, marks=pytest.mark.nightly) for p in SAVE_POINTS])
def test_a_kill_loses_no_committed_checkpoint(tmp_path, processes, point, world_size, in_background):
    """Rank 0 dies at the point, and the launcher then kills the others, as here the test does."""
    save(tmp_path, 1, pieces_for(1), {}, keep_latest=1)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [
        processes.Process(
            target=save_as_rank,
            args=(str(tmp_path), rank, world_size, store.port, f"{point}:1:kill9" if rank == 0 else "", in_background),
        )
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    ranks[0].join(30)
    assert ranks[0].exitcode == -signal.SIGKILL  # so the point was reached
    for rank in ranks[1:]:
        rank.kill()
        rank.join()
    expected = 2 if point in AFTER_COMMIT else 1
    assert find_latest(tmp_path).name == f"iter_000000{expected}"
    assert_holds(find_latest(tmp_path), expected)
    with writing(tmp_path):
        assert not [name for name in names(tmp_path) if name.startswith((".tmp", ".trash"))]
        save(tmp_path, 3, pieces_for(3), {}, keep_latest=1)
    assert names(tmp_path) == ["iter_0000003", "latest_checkpointed_iteration.txt"]


def save_for_ever(root: str, first: int, in_background: bool, told) -> None:
    """Save step after step, and tell each that is committed."""
    folder = Path(root)
    with writing(folder), saver(folder) as saves:
        for step in range(first, first + 10_000):
            if in_background:
                saves.start(step, pieces_for(step), {}, 2)
                saves.finish()
            else:
                save(folder, step, pieces_for(step), {}, keep_latest=2)
            told.send(step)


@pytest.mark.parametrize("in_background", [False, True], ids=["in the loop", "in the background"])
@pytest.mark.parametrize("kills", [6, pytest.param(100, marks=pytest.mark.nightly)])
def test_random_kills_lose_nothing(tmp_path, processes, kills, in_background):
    """After each kill the newest checkpoint is whole and no older than the last one that was told."""
    chance = random.Random(kills + in_background)
    last = 0
    for _ in range(kills):
        receiver, sender = processes.Pipe(duplex=False)
        child = processes.Process(target=save_for_ever, args=(str(tmp_path), last + 1, in_background, sender))
        child.start()
        told = receiver.recv() if receiver.poll(20) else 0  # it works
        time.sleep(chance.uniform(0, 0.05))
        child.kill()
        child.join()
        sender.close()
        while receiver.poll(0):
            try:
                told = receiver.recv()
            except EOFError:
                break
        found = find_latest(tmp_path)
        assert found is not None
        step = int(found.name.removeprefix("iter_"))
        assert told <= step <= told + 1
        assert_holds(found, step)
        last = step
    assert last >= kills


def groups_do_not_meet(root: str) -> list[str]:
    """Four ranks save over a group of their own, while the loop's group is busy all the time."""
    rank, world_size = int(os.environ["RANK"]), 4
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    try:
        saving = ProcessGroupComm(dist.new_group(backend="gloo"))
        folder = Path(root)
        with BackgroundSaver(folder, saving) as saves:
            for step in (1, 2, 3):
                saves.start(step, pieces_of_rank(step, rank, world_size), {}, 2)
                for round_number in range(50):
                    value = torch.tensor([float(rank + round_number)])
                    dist.all_reduce(value)
                    assert value.item() == 6 + 4 * round_number
        return names(folder)
    finally:
        dist.destroy_process_group()


def test_messages_of_saving_and_of_training_do_not_meet(tmp_path):
    with writing(tmp_path):
        found = run_ranks(4, groups_do_not_meet, str(tmp_path))
    assert "iter_0000003" in found[0]
    assert_holds(find_latest(tmp_path), 3)
