"""`mm train --live`: features that are made in the training process give the losses of features made before."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from live_stores import MODELS, write_extraction, write_feature_data, write_media
from store_content import is_finished
from training_runs import bits, run, run_on

from mm.cli import run as run_command


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_media(tmp_path_factory.mktemp("set"), videos=6, images=2)


@pytest.fixture(scope="module")
def extracted(demo: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that was extracted before, and its feature_data.json beside it."""
    store = tmp_path_factory.mktemp("before") / "store"
    run_command.main([str(write_extraction(demo, table, store))])
    return store


def flags(demo: Path, store: Path, **more: Any) -> dict[str, Any]:
    return {
        "mm_data": write_feature_data(demo, store, cfg=0.4),
        "micro_batch_size": 1,
        "global_batch_size": 4,
        "train_iters": 4,  # two epochs of eight samples
        **more,
    }


def counts(save: Path) -> list[tuple[int, int, int]]:
    rows = [json.loads(line) for line in (save / "live.jsonl").read_text().splitlines()]
    return [(row["encoded"], row["kept"], row["read"]) for row in rows]


def test_live_training_is_training_from_a_store(demo: Path, table: Path, extracted: Path, tmp_path: Path) -> None:
    """The second epoch reads what the first kept; the store is finished at the end, and read without --live."""
    expected = bits(run(demo, tmp_path / "before", **flags(demo, extracted)))
    for workers in (0, 2):
        store, save = tmp_path / f"store{workers}", tmp_path / f"run{workers}"
        live = write_extraction(demo, table, store)
        found = run(demo, save, **flags(demo, store, live=[live], num_workers=workers))
        assert bits(found) == expected
        assert counts(save) == [(4, 4, 0), (4, 4, 0), (0, 0, 4), (0, 0, 4)]
        assert is_finished(store) and not (store / "former").exists() and not (store / "work").exists()
        assert bits(run(demo, tmp_path / f"after{workers}", **flags(demo, store))) == expected
        again = run(demo, tmp_path / f"again{workers}", **flags(demo, store, live=[live]))
        assert bits(again) == expected and counts(tmp_path / f"again{workers}") == [(0, 0, 4)] * 4


LAYOUTS = {
    "dp": {},
    "cp": {"context_parallel_size": 2},
    "tp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp": {"pipeline_model_parallel_size": 2, "variable_seq_lengths": True},
    "packed": {"context_parallel_size": 2, "pack": 60},
}


@pytest.mark.nightly
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes(demo: Path, table: Path, extracted: Path, tmp_path: Path, layout: str) -> None:
    """One rank of a replica reads and encodes, and the others have what it has."""
    options = {**LAYOUTS[layout], "num_workers": 1}
    expected = run_on(2, demo, tmp_path / "before", **flags(demo, extracted, **options))
    live = write_extraction(demo, table, tmp_path / "store")
    found = run_on(2, demo, tmp_path / "run", **flags(demo, tmp_path / "store", live=[live], **options))
    assert bits(found) == bits(expected)
    rows = counts(tmp_path / "run")
    if layout == "dp":  # what another replica has not yet ended a part of is made twice
        assert [sum(row) - row[1] for row in rows] == [4] * 4 and 8 <= sum(row[0] for row in rows) <= 16
    else:
        assert rows == [(4, 4, 0), (4, 4, 0), (0, 0, 4), (0, 0, 4)]
    assert is_finished(tmp_path / "store")
    assert bits(run_on(2, demo, tmp_path / "after", **flags(demo, tmp_path / "store", **options))) == bits(expected)


@pytest.mark.nightly
def test_four_processes_of_two_replicas(demo: Path, table: Path, extracted: Path, tmp_path: Path) -> None:
    options = {**LAYOUTS["pp"], "num_workers": 2}
    expected = run_on(4, demo, tmp_path / "before", **flags(demo, extracted, **options))
    live = write_extraction(demo, table, tmp_path / "store")
    found = run_on(4, demo, tmp_path / "run", **flags(demo, tmp_path / "store", live=[live], **options))
    assert bits(found) == bits(expected)


@pytest.mark.nightly
def test_a_run_goes_on_in_the_middle_of_an_epoch(demo: Path, table: Path, extracted: Path, tmp_path: Path) -> None:
    """Live, from the finished store, and from one that was extracted before: the samples are the same to a resume."""
    expected = bits(run(demo, tmp_path / "before", **flags(demo, extracted)))
    store = tmp_path / "store"
    live = write_extraction(demo, table, store)
    run(demo, tmp_path / "run", **flags(demo, store, live=[live], train_iters=1))
    assert len(list((store / "former").iterdir())) == 2  # the empty caption, and four samples
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    assert bits(run(demo, tmp_path / "run", **flags(demo, store, live=[live]))) == expected
    assert counts(tmp_path / "run") == [(4, 4, 0), (4, 4, 0), (0, 0, 4), (0, 0, 4)]
    assert bits(run(demo, tmp_path / "other", **flags(demo, extracted))) == expected


@pytest.mark.nightly
def test_a_draw_for_each_epoch(demo: Path, table: Path, tmp_path: Path) -> None:
    """Epoch e takes draw e of those that the extraction makes, and makes no other."""
    before, store = tmp_path / "before", tmp_path / "store"
    run_command.main([str(write_extraction(demo, table, before, extraction__draws=3))])
    expected = bits(run(demo, tmp_path / "a", **flags(demo, before)))
    live = write_extraction(demo, table, store, extraction__draws=3)
    assert bits(run(demo, tmp_path / "b", **flags(demo, store, live=[live]))) == expected
    assert counts(tmp_path / "b") == [(4, 4, 0)] * 4
    assert not is_finished(store), "the third draw is not made"
    run_command.main([str(live)])  # which copies the others
    assert bits(run(demo, tmp_path / "c", **flags(demo, store))) == expected


@pytest.mark.nightly
def test_images_condition_a_live_training(demo: Path, tmp_path: Path) -> None:
    """Image to video: the image encoder's features and the known frames, dropped captions among them."""
    table = write_media(tmp_path / "set", videos=4)
    before, store = tmp_path / "before", tmp_path / "store"
    model = {
        "mm_model": demo / "configs" / "i2v" / "pretrain_model.json",
        "load": demo / "weights" / MODELS["i2v"] / "transformer",
        "global_batch_size": 2,
        "train_iters": 3,
    }
    run_command.main([str(write_extraction(demo, table, before, "i2v"))])
    told = flags(demo, before, **model) | {"mm_data": write_feature_data(demo, before, "i2v", cfg=0.5)}
    expected = bits(run(demo, tmp_path / "a", **told))
    live = write_extraction(demo, table, store, "i2v")
    told["mm_data"] = write_feature_data(demo, store, "i2v", cfg=0.5)
    assert bits(run(demo, tmp_path / "b", **told, live=[live], num_workers=1)) == expected
    assert counts(tmp_path / "b") == [(2, 2, 0), (2, 2, 0), (0, 0, 2)]


@pytest.mark.nightly
def test_live_stores_and_others_are_mixed(demo: Path, tmp_path: Path) -> None:
    """Two live stores of one set of encoders, one of which is made whole, beside one that was extracted before."""
    stores, before = [], []
    for number in range(3):
        table = write_media(tmp_path / f"set{number}", videos=2 + number, images=number)
        for listed, name in ((stores, "store"), (before, "before")):
            listed.append(tmp_path / f"{name}{number}")
            write_extraction(demo, table, listed[-1])
    for store in [*before, stores[0]]:
        run_command.main([str(store.with_suffix(".yaml"))])
    live = [store.with_suffix(".yaml") for store in stores[1:]]

    def told(folders: list[Path]) -> dict[str, Any]:
        shares = [{"folder": str(folder), "weight": 1 + number} for number, folder in enumerate(folders)]
        options = flags(demo, folders[0], micro_batch_size=1)
        options["mm_data"] = write_feature_data(demo, folders[0], cfg=0.4, mixture={"shares": shares})
        folders[0].with_suffix(".txt").write_text("".join(f"{folder}\n" for folder in folders))
        return options

    expected = bits(run(demo, tmp_path / "a", **told(before)))
    assert bits(run(demo, tmp_path / "b", **told(stores), live=live, num_workers=1)) == expected
    assert sum(row[0] for row in counts(tmp_path / "b")) > 4
