import hashlib
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from test_feature_store import MODEL, feature, feature_set, write_store

from mm.data.dataset import FeatureDataset, open_features
from mm.data.loader import FeatureBatch, feature_batches
from mm.data.sampler import BatchPlan, MicroBatchSampler, epoch_order, sample_at
from mm.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> FeatureDataset:
    store = write_store(tmp_path_factory.mktemp("store") / "s", 10)
    return open_features(feature_set(store), MODEL)


def take(dataset: FeatureDataset, count: int, plan: BatchPlan | None = None, **options: Any) -> list[FeatureBatch]:
    options = {"text_len": 512, "seed": 5, **options}
    return list(islice(feature_batches(dataset, plan or BatchPlan(4, 2), **options), count))


def drawn(batches: list[FeatureBatch]) -> list[tuple[str, int]]:
    return [pair for batch in batches for pair in zip(batch["sample"], batch["draw"], strict=True)]


def test_each_epoch_has_every_sample_once_in_an_order_of_its_own() -> None:
    orders = [epoch_order(epoch, 50, seed=3) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2] and orders[0] != epoch_order(0, 50, seed=4)
    assert epoch_order(1, 5, seed=3, shuffle=False) == [0, 1, 2, 3, 4]
    assert [sample_at(p, 50, 3) for p in (0, 49, 50, 149)] == [
        (orders[0][0], 0),
        (orders[0][49], 0),
        (orders[1][0], 1),
        (orders[2][49], 2),
    ]


@pytest.mark.parametrize(("dp_size", "micro_batch_size"), [(1, 1), (1, 4), (2, 2), (4, 3), (12, 1), (1, 12), (3, 2)])
def test_a_global_batch_is_the_same_samples_whatever_the_layout(dp_size: int, micro_batch_size: int) -> None:
    steps = 5
    expected = [[sample_at(step * 12 + i, 7, 1) for i in range(12)] for step in range(steps)]
    replicas = []
    for rank in range(dp_size):
        plan = BatchPlan(12, micro_batch_size, rank, dp_size)
        sampler = iter(MicroBatchSampler(plan, num_samples=7, seed=1, consumed_samples=0, shuffle=True))
        replicas.append([[next(sampler) for _ in range(plan.num_micro_batches)] for _ in range(steps)])
    for step in range(steps):
        found = [pair for m in range(12 // (dp_size * micro_batch_size)) for r in replicas for pair in r[step][m]]
        assert found == expected[step]


@pytest.mark.parametrize("consumed", [4, 8, 12, 40])
def test_resuming_goes_on_where_it_stopped(consumed: int, dataset: FeatureDataset) -> None:
    whole = take(dataset, 40)
    rest = take(dataset, 40 - consumed // 2, consumed_samples=consumed)
    assert drawn(rest) == drawn(whole)[consumed:]
    for a, b in zip(whole[consumed // 2 :], rest, strict=True):
        assert torch.equal(a["latents"], b["latents"]) and torch.equal(a["text"], b["text"])


def test_a_batch_is_the_samples_stacked_and_padded(dataset: FeatureDataset) -> None:
    (batch,) = take(dataset, 1, shuffle=False)
    assert batch["latents"].shape == (2, 16, 3, 8, 8) and batch["text"].shape == (2, 512, 8)
    assert batch["sample"] == ["videos/0.mp4", "videos/1.mp4"] and batch["draw"] == [0, 0]
    for row in range(2):
        written = feature(row, tokens=1 + row)
        assert written.latents is not None
        assert torch.equal(batch["latents"][row], written.latents)
        assert torch.equal(batch["text"][row, : 1 + row], written.prompt)
        assert not batch["text"][row, 1 + row :].any()


def test_workers_give_the_same_batches(dataset: FeatureDataset) -> None:
    here, there = take(dataset, 12, caption_dropout=0.5), take(dataset, 12, caption_dropout=0.5, num_workers=2)
    assert drawn(here) == drawn(there)
    assert all(torch.equal(a["text"], b["text"]) for a, b in zip(here, there, strict=True))


def test_caption_dropout_depends_on_sample_and_epoch_alone(dataset: FeatureDataset) -> None:
    def dropped(plan: BatchPlan, count: int) -> dict[tuple[str, int], bool]:
        batches = take(dataset, count, plan, caption_dropout=0.25)
        rows = [row for batch in batches for row in batch["text"]]
        return {who: bool((row[0] == 7).all()) for who, row in zip(drawn(batches), rows, strict=True)}

    alone = dropped(BatchPlan(10, 1), 400)
    assert len(alone) == 400
    assert 70 <= sum(alone.values()) <= 130  # 100 expected, three and a half deviations of 8.7
    by_epoch = [{name for (name, epoch), gone in alone.items() if gone and epoch == e} for e in range(40)]
    assert len(set(map(frozenset, by_epoch))) > 20
    other = dropped(BatchPlan(10, 5), 80)
    assert other == alone
    assert not any(dropped_without for dropped_without in take_without_dropout(dataset))


def take_without_dropout(dataset: FeatureDataset) -> list[bool]:
    return [bool((row[0] == 7).all()) for batch in take(dataset, 20) for row in batch["text"]]


def test_all_captions_dropped(dataset: FeatureDataset) -> None:
    for batch in take(dataset, 5, caption_dropout=1.0):
        assert (batch["text"][:, 0] == 7).all() and not batch["text"][:, 1:].any()


def test_shapes_that_cannot_share_a_micro_batch(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", 5, shapes=((16, 3, 8, 8), (16, 2, 8, 8)))
    mixed = open_features(feature_set(store), MODEL)
    with pytest.raises(DataError) as caught:
        take(mixed, 1)
    assert caught.value.id == "DATA-015"
    assert "3 of [16, 3, 8, 8], 2 of [16, 2, 8, 8]" in str(caught.value)
    shapes = {tuple(batch["latents"].shape) for batch in take(mixed, 5, BatchPlan(1, 1))}
    assert shapes == {(1, 16, 3, 8, 8), (1, 16, 2, 8, 8)}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_sample_stops_with_its_own_error(num_workers: int, tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", 4)
    opened = open_features(feature_set(store), MODEL)
    victim = store / "features" / sorted(p.name for p in (store / "features").glob("2_mp4*"))[0]
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(DataError) as caught:
        take(opened, 8, BatchPlan(1, 1), num_workers=num_workers)
    assert caught.value.id == "DATA-011" and victim.name in str(caught.value)


def test_latents_that_are_not_as_listed(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", 1)
    text = (store / "data.jsonl").read_text()
    (store / "data.jsonl").write_text(text.replace("[16,3,8,8]", "[16,5,8,8]"))
    with pytest.raises(DataError, match="DATA-012"):
        take(open_features(feature_set(store), MODEL), 1, BatchPlan(1, 1))


def test_dropout_without_an_empty_prompt(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", 1)
    (store / "features" / "empty_prompt.safetensors").unlink()
    opened = open_features(feature_set(store), MODEL)
    assert take(opened, 1, BatchPlan(1, 1))
    with pytest.raises(DataError, match="DATA-016"):
        feature_batches(opened, BatchPlan(1, 1), text_len=512, seed=1, caption_dropout=1e-9)
    (store / "features" / "empty_prompt.safetensors").write_bytes(b"damaged")
    with pytest.raises(DataError, match="DATA-011"):
        feature_batches(opened, BatchPlan(1, 1), text_len=512, seed=1, caption_dropout=1e-9)


@pytest.mark.parametrize("plan", [(4, 3, 0, 1), (4, 1, 0, 3), (4, 1, 2, 2)])
def test_sizes_that_do_not_divide(plan: tuple[int, int, int, int]) -> None:
    with pytest.raises(ConfigError, match="CFG-021"):
        BatchPlan(*plan)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_noise_is_drawn_beside_reading_with_the_bits_of_its_key(dataset: FeatureDataset, num_workers: int) -> None:
    """Of the sample and the epoch, by the plain generator that the step would use."""
    batches = take(dataset, 7, with_noise=True, num_workers=num_workers)
    assert len({name for name, _ in drawn(batches)}) == 10  # and four of them twice
    for batch in batches:
        for noise, name, epoch in zip(batch["noise"], batch["sample"], batch["draw"], strict=True):
            digest = hashlib.sha256(f"5/noise/{name}/{epoch}".encode()).digest()
            keyed = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            assert torch.equal(noise, torch.randn(noise.shape, generator=keyed))
        assert batch["noise"].shape == batch["latents"].shape
        assert batch["noise"].dtype == torch.float32
    assert "noise" not in take(dataset, 1)[0]
