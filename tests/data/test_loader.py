import hashlib
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from feature_stores import MODEL, feature, feature_set, write_store

from mm.config.run.data import Mixture, SourceShare
from mm.config.step import DataSettings
from mm.data.dataset import FeatureDataset, open_features
from mm.data.loader import FeatureBatch, feature_batches
from mm.data.planning import describe_plan
from mm.data.sampler import BatchPlan
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


TWO_SHAPES = ((16, 3, 8, 8), (16, 2, 8, 8))


def shapes(batches: list[FeatureBatch]) -> set[tuple[int, ...]]:
    return {tuple(batch["latents"].shape) for batch in batches}


def test_micro_batches_are_of_one_shape(tmp_path: Path) -> None:
    mixed = open_features(feature_set(write_store(tmp_path / "s", 5, shapes=TWO_SHAPES)), MODEL)
    batches = take(mixed, 50)
    assert shapes(batches) == {(2, 16, 3, 8, 8), (2, 16, 2, 8, 8)}
    assert set(Counter(drawn(batches)).values()) == {1}
    assert set(Counter(name for name, _ in drawn(batches)).values()) == {20}  # 100 samples are 20 epochs of 5
    assert shapes(take(mixed, 5, BatchPlan(1, 1))) == {(1, 16, 3, 8, 8), (1, 16, 2, 8, 8)}


def test_shapes_with_too_few_samples(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mixed = open_features(feature_set(write_store(tmp_path / "s", 5, shapes=TWO_SHAPES)), MODEL)
    with pytest.raises(DataError) as caught:
        take(mixed, 1, BatchPlan(3, 3))
    assert [problem.id for problem in caught.value.problems] == ["DATA-015"]
    found = "2 samples of the features have latents [16, 2, 8, 8], and a micro-batch takes 3 of one shape"
    assert found in str(caught.value)
    left = take(mixed, 20, BatchPlan(3, 3), min_bucket="drop")
    assert shapes(left) == {(3, 16, 3, 8, 8)} and f"left out: {found}" in caplog.text
    repeated = take(mixed, 20, BatchPlan(3, 3), min_bucket="repeat")
    assert shapes(repeated) == {(3, 16, 3, 8, 8), (3, 16, 2, 8, 8)}
    assert set(Counter(drawn(repeated)).values()) == {1}, "a sample that comes again has another draw"
    with pytest.raises(DataError, match="DATA-015"):
        take(mixed, 1, BatchPlan(4, 4), min_bucket="drop")


def test_samples_of_one_shape_may_be_fewer_than_a_micro_batch(tmp_path: Path) -> None:
    few = open_features(feature_set(write_store(tmp_path / "s", 3)), MODEL)
    assert set(Counter(drawn(take(few, 3, BatchPlan(4, 4)))).values()) == {1}


def test_stores_are_mixed_as_their_shares_say(tmp_path: Path) -> None:
    folders = [write_store(tmp_path / name, count) for name, count in (("a", 6), ("b", 3), ("c", 3))]
    listing = tmp_path / "features.txt"
    listing.write_text("".join(f"{folder}\n" for folder in folders))
    features = feature_set(folders[0]).model_copy(update={"path": str(listing), "folder": None})
    dataset = open_features(features, MODEL)
    faces = SourceShare(folder=str(folders[1]), repeats=2)
    images = SourceShare(folder=f"{folders[2]}/", weight=0.5, end_step=6)
    mixed = take(dataset, 40 * 2, mixture=Mixture(shares=(faces, images)))
    first = Counter(name[:2] for name, _ in drawn(mixed)[: 6 * 4])
    assert first == {"vi": 10, "1:": 10, "2:": 4}  # 6 : 6 : 1.5 of 12 groups of two, to a group
    assert not any(name.startswith("2:") for name, _ in drawn(mixed)[6 * 4 :])


def test_what_decides_the_order_is_told_by_store(tmp_path: Path) -> None:
    """Shares that are exchanged make another plan; the order in which they are written does not."""
    folders = [write_store(tmp_path / name, 4) for name in ("a", "b")]
    listing = tmp_path / "features.txt"
    listing.write_text("".join(f"{folder}\n" for folder in folders))
    features = feature_set(folders[0]).model_copy(update={"path": str(listing), "folder": None})
    dataset = open_features(features, MODEL)

    def told(*repeats: int, shuffle: bool = True, backwards: bool = False) -> str:
        shares = [SourceShare(folder=str(f), repeats=r) for f, r in zip(folders, repeats, strict=True)]
        mixture = Mixture(shares=tuple(shares[::-1] if backwards else shares))
        return describe_plan(dataset, mixture, BatchPlan(2, 2), shuffle=shuffle)

    mixed = "groups of 2; stores mixed, each in its own order"
    assert told(1, 2) == f"keyed bijections; {mixed}; store 1: as large as it is; store 2: repeats 2"
    assert told(1, 2) == told(1, 2, backwards=True)
    assert len({told(1, 2), told(2, 1), told(2, 2), told(1, 2, shuffle=False)}) == 4
    unrecorded = DataSettings(num_samples=8, identity="a", shuffle=False)
    assert unrecorded.order == describe_plan(dataset, Mixture(), BatchPlan(2, 2), shuffle=False)


@pytest.mark.parametrize(("names", "id"), [(["nowhere"], "CFG-203"), (["s", "s/../s"], "CFG-203"), (["s"], "CFG-204")])
def test_shares_that_make_no_sense(names: list[str], id: str, tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", 4)
    shares = tuple(SourceShare(folder=str(tmp_path / name), end_step=3) for name in names)
    with pytest.raises(ConfigError) as caught:
        take(open_features(feature_set(store), MODEL), 1, mixture=Mixture(shares=shares))
    assert caught.value.id == id
    if id == "CFG-204":
        assert "no store is open at step 3" in str(caught.value)


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
