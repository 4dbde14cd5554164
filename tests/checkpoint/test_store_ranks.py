"""Saving as several ranks and loading as other ones, bit by bit: in threads, and in gloo processes."""

import json
import random
import threading
from datetime import timedelta
from math import prod
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_store import names

from mm.checkpoint.boxes import Box
from mm.checkpoint.comm import ProcessGroupComm, on_every_rank, on_rank_zero
from mm.checkpoint.directory import _LEFTOVER
from mm.checkpoint.store import (
    Piece,
    find_latest,
    load,
    pieces_of_flat_range,
    read_manifest,
    save,
    whole_piece,
    writing,
)
from mm.errors import CheckpointError, DataError

SHAPES = {"a": (7, 5), "b": (13,), "c": (2, 3, 4), "d": (), "e": (1, 1, 6), "f": (40, 3)}


class ThreadComm:
    """One rank among threads; what passes between them goes through JSON, as between processes."""

    def __init__(self, rank, shared):
        self.rank = rank
        self.world_size = shared["barrier"].parties
        self.shared = shared

    def all_gather_object(self, obj):
        self.shared["slots"][self.rank] = json.dumps(obj, allow_nan=False)
        self.barrier()
        result = [json.loads(text) for text in self.shared["slots"]]
        self.barrier()
        return result

    def broadcast_object(self, obj):
        return self.all_gather_object(obj)[0]

    def barrier(self):
        self.shared["barrier"].wait(timeout=20)


def as_ranks(world_size, work):
    """Run `work(comm)` on every rank; returns each rank's result or exception."""
    shared = {"barrier": threading.Barrier(world_size), "slots": [None] * world_size}
    results = [None] * world_size

    def run(rank):
        try:
            results[rank] = work(ThreadComm(rank, shared))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}


def buffer_split(rng, world_size):
    """What the distributed optimizer does: all tensors in one flat buffer, cut anywhere. A rank's ranges by key."""
    total = sum(prod(shape) for shape in SHAPES.values())
    cuts = [0, *sorted(rng.randint(0, total) for _ in range(world_size - 1)), total]
    ranks = [{} for _ in range(world_size)]
    position = 0
    for key, shape in SHAPES.items():
        end = position + prod(shape)
        for rank in range(world_size):
            start, stop = max(position, cuts[rank]), min(end, cuts[rank + 1])
            if start < stop:
                ranks[rank][key] = (start - position, stop - position)
        position = end
    return ranks


def pieces_of(ranges, values):
    return [
        piece
        for key, (start, stop) in ranges.items()
        for piece in pieces_of_flat_range(key, SHAPES[key], start, values[key].reshape(-1)[start:stop])
    ]


@pytest.mark.parametrize("seed", range(12))
def test_any_split_loads_as_any_other(tmp_path, seed):
    rng = random.Random(seed)
    values = tensors(seed)
    saving = buffer_split(rng, rng.choice([2, 3, 4]))
    paths = as_ranks(
        len(saving), lambda comm: save(tmp_path, 1, pieces_of(saving[comm.rank], values), {"step": 1}, comm)
    )
    assert paths == [tmp_path / "iter_0000001"] * len(saving)
    assert read_manifest(paths[0]).world_size == len(saving)

    loading = buffer_split(rng, rng.choice([1, 2, 3, 4]))
    found = {key: torch.full(shape, float("nan")) for key, shape in SHAPES.items()}
    outcome = as_ranks(len(loading), lambda comm: load(paths[0], pieces_of(loading[comm.rank], found), comm))
    assert outcome == [None] * len(loading)
    assert all(torch.equal(found[key], values[key]) for key in SHAPES)


def test_tensor_parallel_boxes_load_as_flat_ranges(tmp_path):
    value = torch.randn(6, 4)

    def save_columns(comm):
        box = Box((0, 2 * comm.rank), (6, 2))
        return save(tmp_path, 1, [Piece("w", (6, 4), box, value[box.slices])], {}, comm)

    path = as_ranks(2, save_columns)[0]
    flat = torch.zeros(11)
    load(path, pieces_of_flat_range("w", (6, 4), 5, flat))
    assert torch.equal(flat, value.reshape(-1)[5:16])


def test_an_error_of_one_rank_is_the_error_of_all_and_leaves_nothing(tmp_path):
    def work(comm):
        value = torch.ones(4) if comm.rank != 1 else torch.tensor([1, float("nan"), 1, 1])
        save(tmp_path, 1, [Piece("w", (12,), Box((4 * comm.rank,), (4,)), value)], {}, comm)

    errors = as_ranks(3, work)
    assert [error.id for error in errors] == ["CKPT-016"] * 3
    assert len({str(error) for error in errors}) == 1
    assert names(tmp_path) == []


def test_an_unexpected_error_of_one_rank_does_not_leave_the_others_waiting():
    def work(comm):
        return on_every_rank(comm, lambda: 1 // (comm.rank - 1))

    errors = as_ranks(3, work)
    assert [type(error) for error in errors] == [CheckpointError, ZeroDivisionError, CheckpointError]
    assert errors[0].id == "CKPT-033"
    assert "Rank 1" in str(errors[0])

    def fail():
        raise DataError("DATA-001", "found", "fix")

    errors = as_ranks(2, lambda comm: on_rank_zero(comm, fail))
    assert [(type(e), str(e)) for e in errors] == [(DataError, "DATA-001: found Fix: fix")] * 2


def test_replicas_and_gaps_between_ranks_are_refused(tmp_path):
    for second in (Box((0,), (4,)), Box((5,), (3,))):
        boxes = [Box((0,), (4,)), second]

        def work(comm, boxes=boxes):
            box = boxes[comm.rank]
            save(tmp_path, 1, [Piece("w", (8,), box, torch.ones(box.sizes))], {}, comm)

        assert [error.id for error in as_ranks(2, work)] == ["CKPT-014"] * 2
    assert names(tmp_path) == []


def test_a_rank_without_pieces_and_keys_that_only_one_rank_wants(tmp_path):
    values = tensors(1)
    as_ranks(3, lambda comm: save(tmp_path, 1, pieces_whole(values, "abc" if comm.rank else "def", comm), {}, comm))
    found = {key: torch.zeros(shape) for key, shape in SHAPES.items()}
    keys = ["abcde", "f", ""]
    outcome = as_ranks(
        3, lambda c: load(find_latest(tmp_path, comm=c), [whole_piece(k, found[k]) for k in keys[c.rank]], c)
    )
    assert outcome == [None] * 3
    assert all(torch.equal(found[key], values[key]) for key in SHAPES)
    keys = ["abcd", "f", ""]  # nobody wants e: all ranks say so
    outcome = as_ranks(
        3, lambda c: load(find_latest(tmp_path, comm=c), [whole_piece(k, found[k]) for k in keys[c.rank]], c)
    )
    assert [error.id for error in outcome] == ["CKPT-011"] * 3
    assert "0 missing, 1 unexpected" in str(outcome[2])


def pieces_whole(values, keys, comm):
    return [whole_piece(key, values[key]) for key in keys] if comm.rank < 2 else []


def test_hashes_are_shared_among_the_ranks(tmp_path):
    values = tensors(2)
    split = buffer_split(random.Random(2), 4)
    for step in (1, 2):
        as_ranks(4, lambda comm, step=step: save(tmp_path, step, pieces_of(split[comm.rank], values), {}, comm))
    shard = tmp_path / "iter_0000002" / "shard-00003-of-00004.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    for world_size in (1, 2, 3):
        full = as_ranks(world_size, lambda comm: find_latest(tmp_path, verify="full", comm=comm))
        assert full == [tmp_path / "iter_0000001"] * world_size
    assert as_ranks(2, lambda comm: find_latest(tmp_path, comm=comm)) == [tmp_path / "iter_0000002"] * 2


def test_a_lock_held_elsewhere_stops_every_rank(tmp_path):
    def work(comm):
        with writing(tmp_path, comm):
            comm.barrier()

    with writing(tmp_path):
        # The same process holds it; for the ranks it is another job all the same.
        errors = as_ranks(2, work)
    assert [error.id for error in errors] == ["CKPT-034"] * 2
    assert as_ranks(2, work) == [None, None]
    assert names(tmp_path) == []


def gloo_rank(folder):
    """One process of the test below; an assertion that fails here fails the test."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    comm = ProcessGroupComm()
    assert comm.all_gather_object({"rank": rank, "text": "é" * rank}) == [
        {"rank": r, "text": "é" * r} for r in range(world_size)
    ]
    assert comm.broadcast_object([None, "rank", rank]) == [None, "rank", 0]
    values = tensors(3)
    checkpoints = Path(folder)
    with writing(checkpoints, comm):
        split = buffer_split(random.Random(4), world_size)
        path = save(checkpoints, 5, pieces_of(split[rank], values), {"step": 5}, comm)
    pair = ProcessGroupComm(dist.new_group([1, 2]))
    if rank in (1, 2):  # another world, whose first rank is not global rank 0
        assert (pair.rank, pair.world_size) == (rank - 1, 2)
        assert pair.broadcast_object(rank) == 1
        found = {key: torch.zeros(shape) for key, shape in SHAPES.items()}
        ranges = buffer_split(random.Random(9), 2)[pair.rank]
        load(find_latest(checkpoints, verify="full", comm=pair), pieces_of(ranges, found), pair)
        assert path == checkpoints / "iter_0000005"
        for key, (start, stop) in ranges.items():
            assert torch.equal(found[key].reshape(-1)[start:stop], values[key].reshape(-1)[start:stop])
    comm.barrier()
    dist.destroy_process_group()


def test_gloo_processes(tmp_path):
    run_ranks(3, gloo_rank, str(tmp_path))
    whole_tensors = {key: torch.zeros(shape) for key, shape in SHAPES.items()}
    load(tmp_path / "iter_0000005", [whole_piece(k, t) for k, t in whole_tensors.items()])
    assert all(torch.equal(whole_tensors[key], value) for key, value in tensors(3).items())


def test_only_our_own_leftovers_are_swept(tmp_path):
    for name in (".tmp-iter_0000001-0123456789ab", ".trash-iter_0000001-0123456789ab"):
        assert _LEFTOVER.fullmatch(name)
        (tmp_path / name).mkdir()
    for name in (".tmp-mine", "tmp-iter_0000001-0123456789ab", ".trash-2020", ".replaced-iter_0000001-0123456789ab"):
        (tmp_path / name).mkdir()
    with writing(tmp_path):
        pass
    assert names(tmp_path) == sorted(
        [".tmp-mine", "tmp-iter_0000001-0123456789ab", ".trash-2020", ".replaced-iter_0000001-0123456789ab"]
    )
