"""The tables of a page, and which of many frames, samples and counts are shown."""

import json
import math
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from pages import look, text, write_store
from PIL import Image

from mm.config.flags import as_words
from mm.look.pictures import principal_colours, shown
from mm.look.tables import in_bins, spread


def test_tables_by_hand(tmp_path: Path) -> None:
    """Three shapes: 6, 3 and 1 samples of 12, 4 and 16 tokens; costs by the formula of a block's operations."""
    shapes = [(16, 3, 4, 4)] * 6 + [(16, 1, 4, 4)] * 3 + [(16, 1, 8, 8)]
    captions = [f"caption {number}" for number in range(10)]
    store = write_store(tmp_path / "store", captions, shapes, height=None, width=None, shape={"rule": "max_pixels"})
    (store / "skipped.jsonl").write_text(
        json.dumps({"sample": "videos/bad.mp4", "file": "f", "error": "DATA-002", "reason": "<b>cut off</b>"}) + "\n"
    )
    out = tmp_path / "look.html"
    look(out, store, "--batches", 10)
    width, ffn, layers, context = 5120, 13824, 40, 32  # of Wan2.1 14B, with captions padded to the store's 32
    cost = {
        tokens: layers * (tokens * 2 * (6 * width**2 + 2 * width * ffn + 2 * context * width) + 4 * width * tokens**2)
        for tokens in (12, 4, 16)
    }
    total = 6 * cost[12] + 3 * cost[4] + cost[16]
    words = text(out)
    for size, samples, tokens in (("9 × 32 × 32", 6, 12), ("image, 32 × 32", 3, 4), ("image, 64 × 64", 1, 16)):
        operations = f"{cost[tokens] / 1e12:.3g} T" if cost[tokens] >= 1e12 else f"{cost[tokens] / 1e9:.3g} G"
        share = f"{samples * cost[tokens] / total:.1%}".replace("%", " %")
        row = f"{size} {samples} {tokens} {operations} {samples} {samples * 10}.0 % {share}"
        assert row in words
    assert "videos/bad.mp4 DATA-002 <b>cut off</b>" in words and "left 1 clips out" in words
    assert "Frames of all 10 samples 1 4 9 6" in words  # a histogram: four of one frame, six of nine
    assert "Tokens of captions of all 10 samples 1 2 2 2 3 2 4 2 5 2" in words


def test_small_buckets_and_the_mixture_are_told(tmp_path: Path) -> None:
    """Stores of 6 and 4 samples at weights 1 and 3 until step 60: a third and two thirds; one image has no partner."""
    first = write_store(tmp_path / "first", ["a"] * 7, [(16, 3, 8, 8)] * 6 + [(16, 1, 8, 8)])
    second = write_store(tmp_path / "second", ["b"] * 4, [(16, 3, 8, 8)] * 4)
    (tmp_path / "features.txt").write_text(f"{first}\n{second}\n")
    mixture = {"shares": [{"folder": str(second), "weight": 3.0, "end_step": 60}]}
    data = {
        "dataset_param": {
            "dataset_type": "t2v", "basic_parameters": {"data_path": str(tmp_path / "features.txt")},
            "preprocess_parameters": {"num_frames": 9, "max_height": 64, "max_width": 64},
        },
        "dataloader_param": {"mixture": mixture},
    }  # fmt: skip
    predictor = {"hidden_size": 48, "ffn_dim": 64, "num_heads": 4, "num_layers": 4, "text_dim": 64, "text_len": 32}
    (tmp_path / "data.json").write_text(json.dumps(data))
    (tmp_path / "model.json").write_text(json.dumps({"predictor": predictor, "diffusion": {"shift": 3.0}}))
    words = as_words(
        {
            "mm_data": tmp_path / "data.json", "mm_model": tmp_path / "model.json", "load": "weights", "lr": 1e-4,
            "train_iters": 90, "micro_batch_size": 2, "global_batch_size": 8, "world_size": 2, "batches": 12,
            "min_bucket": "drop",
        }
    )  # fmt: skip
    page = look(tmp_path / "look.html", *words)
    told = text(tmp_path / "look.html")
    # 60 steps of 4 micro-batches at 6 : 12, then 30 steps of the first store alone
    assert f"{first} 6 as large as it is 55.6 % 66.7" in told
    assert f"{second} 4 weight 3, until step 60 44.4 % 80" in told
    assert "1 shapes with 1 samples are left out: a micro-batch takes 2 of one shape" in told
    assert "the whole training, 90 steps" in told and "on 2 replicas" in told
    assert not [sample for sample in page.samples if sample["id"] == "videos/6.mp4"] and len(page.samples) == 24
    assert Counter(re.findall("computed by replica ([01])", told)) == {"0": 6, "1": 6}
    assert len(re.findall(f"from {re.escape(str(second))}", told)) > 3


def test_one_sample_and_two_hundred(tmp_path: Path) -> None:
    one = write_store(tmp_path / "one", ["a"], [(16, 1, 8, 8)])
    assert len(look(tmp_path / "one.html", one, "--batches", 1).samples) == 1
    many = write_store(tmp_path / "many", ["word " * 150] * 20, [(16, 3, 8, 8)] * 20)
    page = look(tmp_path / "many.html", many, "--batches", 20, "--micro-batch-size", 10)
    assert len(page.samples) == 200 and (tmp_path / "many.html").stat().st_size < 4 * 2**20
    draws = Counter(sample["id"] for sample in page.samples)
    assert set(draws.values()) == {10}  # ten passes over twenty samples
    assert Image.open(tmp_path / "many.png").size[1] < 20_000


def test_frames_that_are_shown() -> None:
    assert shown(81, 5) == [0, 20, 40, 60, 80] and shown(3, 5) == [0, 1, 2]
    assert shown(9, 1) == [0] and shown(1, 5) == [0] and shown(10, 3) == [0, 4, 9]


def test_some_of_many_samples() -> None:
    assert list(spread(10, 64, 8)) == list(range(10))
    found = list(spread(10**7, 4096, 64))
    assert len(found) == 4096 and found[0] == 0 and found[-1] == 10**7 - 1
    gaps = [later - earlier for earlier, later in pairwise(found) if later - earlier > 1]
    assert len(gaps) == 63 and max(gaps) - min(gaps) <= 1


def test_bins_hold_every_count() -> None:
    counts = Counter({1: 3, 5: 2, 512: 7})
    bins = in_bins(counts)
    assert sum(count for _, count in bins) == 12 and len(bins) <= 12
    assert bins[0] == ("1 to 43", 5) and bins[-1] == ("474 to 516", 7)
    assert in_bins(Counter({4: 2, 6: 1})) == [("4", 2), ("5", 0), ("6", 1)]


def test_false_colours_are_the_directions_of_most_difference() -> None:
    """Against numpy's singular values: a row's red is its place along the first direction."""
    rows = torch.randn(200, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 4.0, 2.0, *[0.1] * 13])
    centred = (rows - rows.mean(0)).double().numpy()
    _, sizes, vectors = np.linalg.svd(centred, full_matrices=False)
    found = principal_colours(rows).numpy().astype(float)
    for axis in range(3):
        place = centred @ vectors[axis]
        place *= np.sign(vectors[axis][np.abs(vectors[axis]).argmax()]) * math.sqrt(len(rows)) / sizes[axis]
        expected = np.clip(place / 5 + 0.5, 0, 1) * 255
        assert np.abs(found[:, axis] - expected).max() <= 1
