"""Stores with several draws of each sample: an epoch takes one draw, and the next epoch the next."""

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from feature_stores import MODEL, feature_set, write_store
from shard_stores import KEY, opened, write_shards

from mm.cli import data as data_command
from mm.config.run.data import Mixture, SourceShare
from mm.data.dataset import FeatureDataset, open_features
from mm.data.features import Feature
from mm.data.loader import feature_batches
from mm.data.planning import sampling_plan
from mm.data.sampler import BatchPlan
from mm.data.store.catalog import finish_store
from mm.look.samples import Drawing
from mm.look.tables import bucket_rows, source_rows

SHAPES = ((16, 1, 8, 8), (16, 2, 8, 8))
COUNT, DRAWS = 10, 3


def shape_of(sample: int, draw: int, *, one: bool) -> tuple[int, ...]:
    return SHAPES[0 if one else (sample + draw) % 3 == 0]


def write(store: Path, *, one: bool = False) -> Path:
    """Ten samples in two runs of rows, three draws of each: six shards; the latents say sample and draw."""

    def feature(sample: int, draw: int) -> Feature:
        latents = torch.full(shape_of(sample, draw, one=one), sample + draw / 8.0)
        return Feature(latents, torch.ones(2, 8), draw)

    shards = [
        [(f"s{sample}", f"{sample} {draw}", feature(sample, draw)) for sample in run]
        for draw in range(DRAWS)
        for run in (range(6), range(6, COUNT))
    ]
    write_shards(store, shards)
    finish_store(store, len(shards), KEY, DRAWS)
    return store


def taken(dataset: FeatureDataset, count: int, size: int = 1, **options: object) -> list[tuple[int, int, int]]:
    """Sample, draw of the store, and draw of the random numbers, of the first micro-batches."""
    batches = feature_batches(dataset, BatchPlan(size, size), text_len=512, seed=3, **options)  # type: ignore[arg-type]
    found = []
    for batch in islice(batches, count):
        for name, draw, latents in zip(batch["sample"], batch["draw"], batch["latents"], strict=True):
            value = float(latents.flatten()[0])
            assert name.endswith(f"s{int(value)}") and bool((latents == value).all())
            found.append((int(value), round(value % 1 * 8), draw))
    batches.close()
    return found


@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_has_one_draw_of_each_sample(one: bool, shuffle: bool, tmp_path: Path) -> None:
    found = taken(opened(write(tmp_path / "s", one=one)), 7 * COUNT, shuffle=shuffle)
    for epoch in range(7):
        part = found[epoch * COUNT : (epoch + 1) * COUNT]
        assert sorted(sample for sample, *_ in part) == list(range(COUNT))
        assert {(draw, number) for _, draw, number in part} == {(epoch % DRAWS, epoch)}
    if not shuffle:
        assert [sample for sample, *_ in found[:COUNT]] == list(range(COUNT))


def test_micro_batches_are_of_one_shape_and_draw(tmp_path: Path) -> None:
    """Of a draw 4 or 3 samples have one shape and the others another; those left over come with its next epoch."""
    found = taken(opened(write(tmp_path / "s")), 60, size=2)
    for pair in zip(found[::2], found[1::2], strict=True):
        assert len({draw for _, draw, _ in pair}) == 1
    assert set(Counter((sample, number) for sample, _, number in found).values()) == {1}
    assert all(number % DRAWS == draw for _, draw, number in found)
    assert set(Counter((sample, draw) for sample, draw, _ in found).values()) <= {3, 4, 5}  # 120 of 30 things


def test_stores_of_other_numbers_of_draws_begin_again(tmp_path: Path) -> None:
    """Three draws of one store and the one of another: each of the other comes in every epoch."""
    stores = [write(tmp_path / "a", one=True), write_store(tmp_path / "b", 4, shapes=((16, 1, 8, 8),))]
    (tmp_path / "features.txt").write_text("".join(f"{store}\n" for store in stores))
    features = feature_set(stores[0]).model_copy(update={"path": str(tmp_path / "features.txt"), "folder": None})
    dataset = open_features(features, MODEL)
    assert (len(dataset), dataset.draws, len(dataset.of_draw(1))) == (3 * COUNT + 4, DRAWS, COUNT + 4)
    for mixture in (Mixture(), Mixture(shares=(SourceShare(folder=str(stores[0])),))):
        plan = sampling_plan(dataset, BatchPlan(1, 1), mixture, 5, shuffle=True)
        names = Counter(dataset.name(plan.group(slot)[0].index) for slot in range(6 * (COUNT + 4)))
        if mixture.shares:  # shares hold in 4,096 micro-batches
            assert names.keys() == {dataset.name(index) for index in range(len(dataset))}
        else:
            assert set(names.values()) == {6} and len(names) == COUNT + 4


def test_the_page_counts_a_sample_once_whatever_its_draws(tmp_path: Path) -> None:
    """Two stores of ten and of four samples, both walked once an epoch."""
    stores = [write(tmp_path / "a"), write_store(tmp_path / "b", 4, shapes=((16, 1, 8, 8),))]
    (tmp_path / "features.txt").write_text("".join(f"{store}\n" for store in stores))
    features = feature_set(stores[0]).model_copy(update={"path": str(tmp_path / "features.txt"), "folder": None})
    dataset = open_features(features, MODEL)
    mixture = Mixture(shares=(SourceShare(folder=str(stores[0])),))
    drawing = Drawing(BatchPlan(1, 1), 5, mixture=mixture, steps=4096)
    plan = sampling_plan(dataset, drawing.batches, mixture, 5, shuffle=True)
    _, rows = source_rows(dataset, drawing, plan)
    assert [row.samples for row in rows] == [COUNT, 4]
    assert [row.passes for row in rows] == pytest.approx([4096 / 14] * 2, rel=1e-3)
    shares = [row.share_of_samples for row in bucket_rows(dataset, drawing, rows) if row.source == str(stores[0])]
    assert sum(shares) == pytest.approx(COUNT / 14, rel=1e-3)


def test_exports_say_which_draw_a_sample_is(tmp_path: Path) -> None:
    """Latents are sample + draw / 8; read by pyarrow and webdataset."""
    import pyarrow.parquet
    import webdataset

    store = write(tmp_path / "s", one=True)
    for to in ("parquet", "listing", "webdataset"):
        data_command.main(["export", str(store), str(tmp_path / to), "--to", to])
    rows = [
        row
        for file in sorted((tmp_path / "parquet").glob("0*.parquet"))
        for row in pyarrow.parquet.read_table(file).to_pylist()
    ]
    said = [(row["sample"], row["draw"]) for row in rows]
    assert said == [(f"s{sample}", draw) for draw in range(DRAWS) for sample in range(COUNT)]
    for row in rows:
        value = torch.frombuffer(bytearray(row["latents"]), dtype=torch.float32)[0]
        assert float(value) == int(row["sample"][1:]) + row["draw"] / 8
    listed = pyarrow.parquet.read_table(tmp_path / "listing" / "listing.parquet").to_pylist()
    assert [(row["sample"], row["draw"]) for row in listed] == said
    tars = sorted(map(str, (tmp_path / "webdataset").glob("*.tar")))
    shown = webdataset.WebDataset(tars, shardshuffle=False).decode()
    assert [(one["json"]["sample"], one["json"]["draw"]) for one in shown] == said
