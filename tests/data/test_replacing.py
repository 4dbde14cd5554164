"""Damaged features: replaced the same way on every layout and after every resume, or the end of the run."""

import os
import signal
import time
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from feature_stores import MODEL, feature_set, write_store
from orders import epoch_order

from mm.config.bad_samples import FAIL, OnBadSample, parse_on_bad_sample
from mm.data.dataset import FeatureDataset, open_features
from mm.data.loader import FeatureBatch, feature_batches
from mm.data.replacing import check_replaced, check_same_samples, replaced_in_step
from mm.data.sampler import BatchPlan
from mm.errors import ConfigError, DataError

SAMPLES, SEED, GLOBAL_BATCH = 12, 5, 6
HALF = parse_on_bad_sample("skip:max=50%")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_store(tmp_path / "s", SAMPLES)


def file_of(store: Path, index: int) -> Path:
    return next((store / "features").glob(f"{index}_mp4-*"))


def damage(store: Path, *indices: int) -> set[int]:
    for index in indices:
        file = file_of(store, index)
        file.write_bytes(file.read_bytes()[:-1])
    return set(indices)


def opened(store: Path) -> FeatureDataset:
    return open_features(feature_set(store), MODEL)


def take(store: Path, count: int, plan: BatchPlan, **options: Any) -> list[FeatureBatch]:
    options = {"text_len": 512, "seed": SEED, "on_bad_sample": HALF, **options}
    return list(islice(feature_batches(opened(store), plan, **options), count))


def expected_samples(bad: set[int], count: int) -> list[tuple[str, int]]:
    """By the rule as it is documented: a damaged sample gives way to the next whole one in its epoch's order."""
    found = []
    for position in range(count):
        epoch, place = divmod(position, SAMPLES)
        order = epoch_order(epoch, SAMPLES, SEED)
        while order[place] in bad:
            place = (place + 1) % SAMPLES
        found.append((f"videos/{order[place]}.mp4", epoch))
    return found


def walked(store: Path, dp_size: int, micro_batch_size: int, steps: int, **options: Any) -> list[tuple[str, int]]:
    """The (sample, epoch) at every position, gathered from all replicas of a layout."""
    per_step = GLOBAL_BATCH // (dp_size * micro_batch_size)
    replicas = [
        take(store, steps * per_step, BatchPlan(GLOBAL_BATCH, micro_batch_size, rank, dp_size), **options)
        for rank in range(dp_size)
    ]
    assert {len(batches) for batches in replicas} == {steps * per_step}, "every replica has as many batches"
    batches = [replicas[rank][number] for number in range(steps * per_step) for rank in range(dp_size)]
    return [pair for batch in batches for pair in zip(batch["sample"], batch["draw"], strict=True)]


@pytest.mark.parametrize(
    ("dp_size", "micro_batch_size", "num_workers"), [(1, 1, 0), (1, 6, 0), (2, 1, 0), (3, 2, 0), (2, 3, 0), (2, 1, 2)]
)
def test_every_layout_replaces_alike(dp_size: int, micro_batch_size: int, num_workers: int, store: Path) -> None:
    orders = [epoch_order(epoch, SAMPLES, SEED) for epoch in range(2)]
    bad = damage(store, orders[0][11], orders[0][0], orders[1][4], orders[1][5])  # at an end, and two in a row
    found = walked(store, dp_size, micro_batch_size, 6, num_workers=num_workers)
    assert found == expected_samples(bad, 36)
    assert found != expected_samples(set(), 36)


@pytest.mark.parametrize("consumed", [6, 12, 18])
def test_a_resume_replaces_alike(consumed: int, store: Path) -> None:
    bad = damage(store, 2, 3, 7)
    batches = take(store, (36 - consumed) // 2, BatchPlan(GLOBAL_BATCH, 2), consumed_samples=consumed)
    found = [pair for batch in batches for pair in zip(batch["sample"], batch["draw"], strict=True)]
    assert found == expected_samples(bad, 36)[consumed:]


def test_what_was_replaced_is_told(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = damage(store, 2, 7)
    batches = take(store, 12, BatchPlan(1, 1))
    told = [name for batch in batches for name in batch.get("replaced", [])]
    assert sorted(told) == ["videos/2.mp4", "videos/7.mp4"]
    assert sum("replaced" in batch for batch in batches) == len(bad)
    assert "videos/2.mp4 is replaced by videos/" in caplog.text and "DATA-011" in caplog.text


def test_the_tensors_are_those_of_the_replacement(store: Path) -> None:
    damage(store, 2)
    dataset = opened(store)
    names = {dataset.name(index): index for index in range(len(dataset))}
    for batch in take(store, 12, BatchPlan(1, 1)):
        assert torch.equal(batch["latents"][0], dataset[names[batch["sample"][0]]]["latents"])


def test_fail_is_the_default(store: Path) -> None:
    damage(store, 2)
    with pytest.raises(DataError, match="DATA-011"):
        take(store, 12, BatchPlan(1, 1), on_bad_sample=FAIL)


def test_more_than_the_share_of_an_epoch_stops(store: Path) -> None:
    damage(store, 2, 5)
    enough, too_little = parse_on_bad_sample("skip:max=17%"), parse_on_bad_sample("skip:max=16%")
    assert (enough.allowed(SAMPLES), too_little.allowed(SAMPLES)) == (2, 1)
    assert len(take(store, 60, BatchPlan(1, 1), on_bad_sample=enough)) == 60, "the share is of every epoch"
    with pytest.raises(DataError, match=r"DATA-074: 2 of 12 samples in 1 epochs .* allows 1"):
        take(store, 12, BatchPlan(1, 1), on_bad_sample=too_little)


def test_nothing_whole_is_left(store: Path) -> None:
    damage(store, *range(SAMPLES))
    with pytest.raises(DataError, match="DATA-011"):
        take(store, 1, BatchPlan(1, 1))


def test_the_count_over_all_replicas() -> None:
    policy = parse_on_bad_sample("skip:max=1%")
    check_replaced(1, 1, 100, policy)
    check_replaced(1, 100, 100, policy)
    check_replaced(2, 101, 100, policy)
    with pytest.raises(DataError, match="DATA-074: 2 of 100 samples in 1 epochs"):
        check_replaced(2, 100, 100, policy)
    check_replaced(0, 100, 100, FAIL)


def test_ranks_of_a_replica_must_read_the_same() -> None:
    check_same_samples([(0, ["a", "b"]), (0, ["a", "b"]), (1, ["c", "d"]), (1, ["c", "d"])])
    with pytest.raises(DataError, match="DATA-075: Ranks of replica 1 read different samples: d and e"):
        check_same_samples([(0, ["a", "b"]), (1, ["c", "d"]), (0, ["a", "b"]), (1, ["c", "e"])])


def test_a_step_is_counted_once_for_each_replica() -> None:
    ranks = [(0, ["a", "b"], ["x"]), (0, ["a", "b"], ["x"]), (1, ["c", "d"], ["y", "z"]), (1, ["c", "d"], ["y", "z"])]
    everyone = [(rank, samples, len(replaced)) for rank, samples, replaced in ranks]
    for rank, samples, replaced in ranks:
        seen: list[object] = []

        def gather(mine: object, seen: list[object] = seen) -> list[Any]:
            seen.append(mine)
            return everyone

        assert replaced_in_step(rank, samples, replaced, gather) == 3
        assert seen == [(rank, samples, len(replaced))]
    everyone[3] = (1, ["c", "e"], 1)
    with pytest.raises(DataError, match="DATA-075"):
        replaced_in_step(0, ["a", "b"], ["x"], lambda mine: everyone)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_may_be_one_machines_fault_is_never_passed_over(num_workers: int, store: Path) -> None:
    file = file_of(store, 2)
    content = file.read_bytes()
    file.unlink()
    file.symlink_to(file)  # the system refuses to open it, as it does a file on a disk with errors
    with pytest.raises(DataError, match="DATA-072"):
        take(store, 12, BatchPlan(1, 1), num_workers=num_workers)
    file.unlink()
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"DATA-070: .*_mp4-.*\(videos/\d+\.mp4\): its reader gave nothing in 1e-06 s"):
        take(store, 12, BatchPlan(1, 1), num_workers=1, read_timeout=1e-6)


def test_a_pipe_is_refused_and_does_not_hang(store: Path) -> None:
    file = file_of(store, 2)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(DataError, match=r"DATA-011: .*no regular file"):
        take(store, 12, BatchPlan(1, 1), on_bad_sample=FAIL)


def test_a_reader_that_is_killed_loses_no_batch_and_gives_none_twice(store: Path) -> None:
    plan = BatchPlan(2, 2)
    whole = take(store, 10, plan)
    batches = feature_batches(opened(store), plan, text_len=512, seed=SEED, num_workers=2)
    found = []
    for number in range(10):
        found.append(next(batches))
        if number in (2, 6):
            family = psutil.Process().children(recursive=True)
            readers = [process for process in family if "forkserver" in " ".join(process.parent().cmdline())]
            assert len(readers) == 2
            for process in readers:
                os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.2)
    batches.close()
    assert [batch["sample"] for batch in found] == [batch["sample"] for batch in whole]
    assert all(torch.equal(a["latents"], b["latents"]) for a, b in zip(found, whole, strict=True))


@pytest.mark.parametrize(("text", "num_samples", "allowed"), [
    ("fail", 10**6, 0), ("skip:max=0.1%", 999, 0), ("skip:max=0.1%", 1000, 1), ("skip:max=0.1%", 10**6, 1000),
    ("skip:max=33.3%", 1000, 333), ("skip:max=99%", 100, 99),
])  # fmt: skip
def test_the_policy_counts_exactly(text: str, num_samples: int, allowed: int) -> None:
    policy = parse_on_bad_sample(text)
    assert policy.allowed(num_samples) == allowed and str(policy) == text


@pytest.mark.parametrize("text", [
    "", "skip", "skip:max=", "skip:max=0%", "skip:max=100%", "skip:max=0.1", "skip:max=-1%", "skip:max=1e-3%", "Fail",
    "skip:max=nan%", "skip: max=1%", "skip:max=1%\n",
])  # fmt: skip
def test_other_words_are_no_policy(text: str) -> None:
    with pytest.raises(ConfigError, match="CFG-110"):
        parse_on_bad_sample(text)


def test_the_default_stops_at_the_first() -> None:
    assert OnBadSample() == FAIL == parse_on_bad_sample("fail") and not FAIL.skips
