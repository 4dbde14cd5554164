"""Live stores: features that are made one by one, when they are asked for, are those that extraction makes."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from live_stores import write_extraction, write_media
from store_content import content, is_finished
from torch import Tensor

from mm.cli import run as run_command
from mm.config.model import WanConfig
from mm.config.run.extraction import ExtractionRun
from mm.config.run.file import load_run, of_kind
from mm.data.clips import load_clip
from mm.data.dataset import FeatureDataset
from mm.data.open_store import SampleTensors
from mm.data.place import ClipPlace, FeaturePlace
from mm.dialects.mindspeed.files import read_pretrain_model
from mm.dialects.mindspeed.reading import Reading
from mm.extract.live.opening import LiveStores, prepare
from mm.extract.live.parts import kept_bytes
from mm.extract.live.store import LiveStore
from mm.look.alone import open_alone

CPU = torch.device("cpu")


def extraction(file: Path) -> ExtractionRun:
    return of_kind(load_run(file), ExtractionRun)


def the_store(stores: LiveStores, budget: int | None = None) -> LiveStore:
    """The one live store, with encoders."""
    (store,) = stores.by_folder.values()
    stores.can_make(CPU, budget)
    return store


def make(store: LiveStore, row: int, model: WanConfig) -> SampleTensors:
    place = store.place(row)
    assert isinstance(place, ClipPlace)
    return store.make(place, load_clip(place.sample, place.clip, place.seed, place.draw), model)


def model_of(demo: Path, task: str = "t2v") -> WanConfig:
    below = "" if task == "t2v" else f"{task}/"
    reading = Reading()
    predictor = read_pretrain_model(str(demo / "configs" / f"{below}pretrain_model.json"), reading).predictor
    assert not reading.problems
    return predictor.wan()


def tensors(sample: SampleTensors) -> dict[str, Tensor]:
    return {"latents": sample["latents"], "prompt": sample["prompt"], **sample["features"]}


def assert_equal(found: SampleTensors, expected: SampleTensors) -> None:
    one, other = tensors(found), tensors(expected)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


@pytest.mark.parametrize(("task", "images"), [("t2v", 2), ("i2v", 0)])
def test_features_and_the_finished_store_are_those_of_an_extraction(
    demo: Path, tmp_path: Path, task: str, images: int
) -> None:
    """Of two draws, made in any order; the store that is filled is finished by copying, byte for byte."""
    table = write_media(tmp_path / "set", videos=4, images=images)
    values: dict[str, Any] = {"extraction__draws": 2, "extraction__shard_rows": 2}
    before, live = (write_extraction(demo, table, tmp_path / name, task, **values) for name in ("a", "b"))
    run_command.main([str(before)])
    expected = open_alone(tmp_path / "a")
    run = extraction(live)
    assert prepare(run) == 0
    with LiveStores([run]) as stores:
        store, rows = the_store(stores), list(range(len(expected)))
        found = FeatureDataset([store], expected.model)
        assert (len(found), found.draws, found.shapes()) == (len(expected), 2, expected.shapes())
        assert found.identity() == expected.identity()
        for row in rows:
            assert found.name(row) == expected.name(row)
            assert found.latent_shape(row) == expected.latent_shape(row)
            assert found.text_tokens(row) == expected.text_tokens(row)
        for draw in range(2):
            ours, theirs = found.of_draw(draw), expected.of_draw(draw)
            assert ours.buckets() == theirs.buckets()
            for shape, count in theirs.buckets().items():
                assert [ours.in_bucket(shape, k) for k in range(count)] == [
                    theirs.in_bucket(shape, k) for k in range(count)
                ]
        random.Random(1).shuffle(rows)
        for row in rows:
            assert_equal(make(store, row, expected.model), expected[row])
        assert (stores.made.encoded, stores.made.kept) == (len(rows), len(rows))
    for row in rows:
        assert_equal(found[row], expected[row])  # from the parts, which are shards
    stores.finish(CPU, None)
    assert is_finished(tmp_path / "b") and stores.made.encoded == len(rows)
    plan = {name: value for name, value in content(tmp_path / "a").items() if "plan/" not in name}
    assert {name: value for name, value in content(tmp_path / "b").items() if "plan/" not in name} == plan


@pytest.fixture
def live(demo: Path, tmp_path: Path) -> ExtractionRun:
    table = write_media(tmp_path / "set", videos=6)
    return extraction(write_extraction(demo, table, tmp_path / "store"))


def test_the_budget_is_kept_to_on_the_disk(
    demo: Path, live: ExtractionRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is beyond it is made each time, which is said once."""
    prepare(live)
    budget = 150_000
    with LiveStores([live]) as stores:
        store = the_store(stores, budget)
        model = model_of(demo)
        for _ in range(2):
            for row in range(len(store)):
                if isinstance(store.place(row), ClipPlace):
                    make(store, row, model)
        encoded, kept = stores.made.encoded, stores.made.kept
    assert 0 < kept < len(store) and encoded == len(store) + (len(store) - kept)
    assert 0 < kept_bytes(tmp_path / "store") <= budget
    assert sum("the budget is used up" in record.message for record in caplog.records) == 1
    assert sum(isinstance(store.place(row), FeaturePlace) for row in range(len(store))) == kept
