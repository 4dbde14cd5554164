"""`--draws K`: each sample encoded K times, with another start, caption and shape; the first is that of no draws."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from extraction_runs import opened, run
from feature_samples import write_data_set, write_extraction_files
from store_content import content, listed, shards_of
from test_skipping import BAD, MOST, write_bad_data_set

from mm.data.dataset import FeatureDataset
from mm.data.recipe import load_recipe
from mm.data.store.catalog import read_manifest
from mm.errors import DataError
from mm.extract.progress import extraction_progress
from mm.extract.run import ExtractReport

ROWS: list[dict[str, Any]] = [
    {"path": f"{row}.mp4", "cap": ["a red circle", "a blue square", "circle", "square"]} for row in range(6)
]
DRAWS = 3


@pytest.fixture
def files(tmp_path: Path, weights: Path) -> dict[str, Path]:
    annotation = write_data_set(tmp_path / "set", ROWS, num_frames=30)
    return write_extraction_files(tmp_path, weights, annotation, tmp_path / "set", tmp_path / "store")


def tensors(dataset: FeatureDataset, draw: int) -> list[torch.Tensor]:
    rows = dataset.of_draw(draw)
    return [dataset[rows.member(k)]["latents"] for k in range(len(rows))]


def test_the_first_draw_is_that_of_a_store_without_draws(files: dict[str, Path], tmp_path: Path, weights: Path) -> None:
    assert run(files, draws=DRAWS, shard_rows=2) == ExtractReport(listed=18, encoded=6, reused=0)
    store = tmp_path / "store"
    one = write_extraction_files(
        tmp_path / "o", weights, tmp_path / "set/data.json", tmp_path / "set", tmp_path / "one"
    )
    run(one, shard_rows=2)
    alone, all_draws = shards_of(tmp_path / "one"), shards_of(store)
    assert {name: all_draws[name] for name in alone} == alone and len(all_draws) == DRAWS * len(alone)
    assert load_recipe(store) == load_recipe(tmp_path / "one")
    assert read_manifest(store).draws == DRAWS and read_manifest(tmp_path / "one").draws == 1


def test_draws_differ_and_each_opens_as_a_data_set(files: dict[str, Path], tmp_path: Path) -> None:
    run(files, draws=DRAWS, shard_rows=4)
    dataset = opened(tmp_path / "store", tmp_path)
    assert dataset.draws == DRAWS
    rows = listed(tmp_path / "store")
    starts, captions = ([[row[key] for row in rows[6 * d : 6 * d + 6]] for d in range(DRAWS)] for key in KEYS)
    assert len({tuple(one) for one in starts}) == DRAWS and len({tuple(one) for one in captions}) == DRAWS
    found = [tensors(dataset, draw) for draw in range(DRAWS)]
    for draw in range(DRAWS):
        one = dataset.of_draw(draw)
        assert [dataset.name(one.member(k)) for k in range(len(one))] == [row["path"] for row in ROWS]
        assert one.buckets() == {(16, 3, 4, 6): 6}
        assert [one.in_bucket((16, 3, 4, 6), k) for k in range(6)] == [6 * draw + k for k in range(6)]
        for index, start in enumerate(starts[draw]):
            same = [other for other in range(DRAWS) if starts[other][index] == start]
            assert all(torch.equal(found[draw][index], found[other][index]) for other in same)
    assert all(map(torch.equal, tensors(dataset, DRAWS), found[0])), "they begin again"
    assert not all(map(torch.equal, found[0], found[1]))
    assert len(dataset.empty_prompt()) > 0


KEYS = ("start_frame_idx", "cap")


def test_more_draws_keep_those_that_are_there(files: dict[str, Path], tmp_path: Path) -> None:
    run(files, draws=2, shard_rows=2)
    before = shards_of(tmp_path / "store")
    assert run(files, draws=2, shard_rows=2) == ExtractReport(listed=12, encoded=0, reused=6)
    assert run(files, draws=DRAWS, shard_rows=2).encoded == 6
    after = shards_of(tmp_path / "store")
    assert {name: after[name] for name in before} == before
    assert opened(tmp_path / "store", tmp_path).draws == DRAWS
    run(files, shard_rows=2, overwrite=True)
    assert opened(tmp_path / "store", tmp_path).draws == 1
    assert shards_of(tmp_path / "store") == {name: before[name] for name in before if name[7:15] < "00000003"}


def test_fewer_draws_drop_none_unless_they_may(files: dict[str, Path], tmp_path: Path) -> None:
    """A forgotten flag is no wish to remove what was made."""
    run(files, draws=2, shard_rows=2)
    before = content(tmp_path / "store")
    with pytest.raises(DataError, match=r"DATA-192: .* has 2 draws of each sample, and 1 are asked for.* --draws 2;"):
        run(files, shard_rows=2)
    assert content(tmp_path / "store") == before
    assert run(files, shard_rows=2, overwrite=True).listed == 6


def test_a_clip_that_is_left_out_is_left_out_of_every_draw(tmp_path: Path, weights: Path) -> None:
    annotation = write_bad_data_set(tmp_path / "set")
    files = write_extraction_files(tmp_path, weights, annotation, tmp_path / "set", tmp_path / "store")
    report = run(files, on_bad_sample=MOST, draws=2)
    assert (report.listed, report.skipped) == (6, len(BAD))
    dataset = opened(tmp_path / "store", tmp_path)
    draws = [dataset.of_draw(draw) for draw in range(2)]
    names = [[dataset.name(one.member(k)) for k in range(len(one))] for one in draws]
    assert names == [["good.mp4", "fine.mp4", "well.mp4"]] * 2


def test_parts_make_the_same_draws(files: dict[str, Path], tmp_path: Path, weights: Path) -> None:
    run(files, draws=2)
    other = write_extraction_files(
        tmp_path / "o", weights, tmp_path / "set/data.json", tmp_path / "set", tmp_path / "p"
    )
    for part in (3, 1, 2):
        run(other, draws=2, shard_of=f"{part}/3")
    assert content(tmp_path / "p") == content(tmp_path / "store")


def test_the_rate_is_that_of_the_draws_that_were_added(files: dict[str, Path], tmp_path: Path) -> None:
    """The shards of the first draw are an hour older than the plan; those of the second came 10 s after each other."""
    store = tmp_path / "store"
    run(files, shard_rows=2)
    run(files, draws=2, shard_rows=2)
    (store / "manifest.json").unlink()
    planned = int(time.time()) - 100
    os.utime(store / "plan" / "plan.bin", (planned, planned))
    for shard in range(6):
        at = planned + 10 * (shard - 2) if shard >= 3 else planned - 3600 + shard
        os.utime(store / "shards" / f"{shard:08d}" / "index.bin", (at, at))
    progress = extraction_progress(store)
    assert progress is not None and (progress.done, progress.rows_done, progress.left_s) == (3, 6, 0.0)
    assert progress.rate == 4 / 20 and 90 <= progress.elapsed_s < 90 + 600
    os.utime(store / "plan" / "plan.bin")  # planned anew: nothing of this work is done
    progress = extraction_progress(store)
    assert progress is not None and (progress.rate, progress.left_s, progress.elapsed_s) == (None, None, 0.0)
