"""Reading of features by training's loader: shards beside one file a sample, and from object storage on loopback.

    python benchmarks/data_reading.py [--samples 24] [--rounds 16] [--workers 0 2] [--folder FOLDER] [--json FILE]

A sample is a clip of 49 frames of 480p in bfloat16 with a caption of 128 tokens, 3.7 MB, one a micro-batch. The same
samples lie as files, as shards of 64 MB, and in a bucket of moto's S3 server on loopback, which is one Python process:
what it gives is no figure of S3, but of what this program costs beside a real HTTP server. Each round reads one epoch
from every place, in turns that rotate, so that what else the machine does meets all alike; the first micro-batch, with
which readers start, is not counted. Ratios are of samples a second to those of files in the same round, medians of the
rounds. All is in the page cache.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402  (the path above)
from object_storage import BUCKET, s3_server  # noqa: E402
from results import Result, arguments, publish  # noqa: E402

from mm.config.model import WanConfig  # noqa: E402
from mm.config.run.data import FeatureSet  # noqa: E402
from mm.config.storage import Storage, location_of  # noqa: E402
from mm.data.dataset import open_features  # noqa: E402
from mm.data.features import FEATURES, Feature, Origin, feature_name, text_hash, write_feature  # noqa: E402
from mm.data.listing import FeatureRow, write_listing  # noqa: E402
from mm.data.loader import feature_batches  # noqa: E402
from mm.data.recipe import Recipe, save_recipe  # noqa: E402
from mm.data.sampler import BatchPlan  # noqa: E402
from mm.data.store.copying import copy_store  # noqa: E402
from mm.data.store.repack import repack  # noqa: E402

MODEL = WanConfig(hidden_size=1536, ffn_dim=8960, num_heads=12, num_layers=30)
SHAPE, TOKENS = (16, 13, 60, 104), 128
RECIPE = Recipe(
    vae="v", text_encoder="t", tokenizer="k", height=480, width=832, num_frames=49, min_num_frames=None,
    frame_interval=1, vae_dtype="bf16", text_dtype="bf16", tile_size=None, tile_stride=None, max_text_tokens=512,
    seed=0,
)  # fmt: skip


def write_files(store: Path, num_samples: int) -> int:
    """A store of one file a sample; returns the bytes of a sample."""
    (store / FEATURES).mkdir(parents=True)
    save_recipe(store, RECIPE)
    numbers, rows = torch.Generator().manual_seed(0), []
    for index in range(num_samples):
        sample, caption = f"videos/{index:06d}.mp4", f"caption {index}"
        latents = torch.randn(SHAPE, generator=numbers).bfloat16()
        prompt = torch.randn(TOKENS, MODEL.text_dim, generator=numbers).bfloat16()
        origin = Origin(sample, RECIPE.key, text_hash(caption), "v")
        write_feature(store / FEATURES / feature_name(sample), Feature(latents, prompt), origin, 512)
        rows.append(FeatureRow(
            sample=sample, file=f"{FEATURES}/{feature_name(sample)}", path=sample, cap=caption, start_frame_idx=0,
            sample_num_frames=49, sample_size="49x480x832", latent_shape=SHAPE, text_tokens=TOKENS, video="v",
        ))  # fmt: skip
    write_listing(store, rows)
    return (store / rows[0].file).stat().st_size


def epoch(features: FeatureSet, workers: int, seed: int) -> float:
    """Samples a second of an epoch."""
    data = open_features(features, MODEL)
    with closing(feature_batches(data, BatchPlan(1, 1), text_len=512, seed=seed, num_workers=workers)) as batches:
        next(batches)
        began = time.perf_counter()
        for _ in range(len(data) - 1):
            next(batches)
        return (len(data) - 1) / (time.perf_counter() - began)


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--folder", type=Path, default=None)


def main() -> None:
    """Write the samples, read them, print the ratios."""
    given = arguments(__doc__, add)
    shapes = {"samples": given.samples, "latents": list(SHAPE), "tokens": TOKENS, "rounds": given.rounds}
    result = Result("data_reading", "cpu", shapes)
    with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
        home = Path(temporary)
        size = write_files(home / "files", given.samples)
        repack(home / "files", home / "shards", 64 * 10**6, lambda *_: None)
        with s3_server(home) as s3:
            os.environ.update(s3.environment)
            cold, warm = Storage(cache=str(home / "cold")), Storage(cache=str(home / "warm"))
            address = f"s3://{BUCKET}/store"
            copy_store(home / "shards", location_of(address, cold), lambda *_: None)
            places = {
                "files": FeatureSet(path=str(home / "files" / "data.jsonl"), folder=str(home / "files")),
                "shards": FeatureSet(path="data.jsonl", folder=str(home / "shards")),
                "S3, nothing in the cache": FeatureSet(path=address, storage=cold),
                "S3, all in the cache": FeatureSet(path=address, storage=warm),
            }
            for workers in given.workers:
                result.rows += measure(places, workers, given.rounds, size, home / "cold")
    publish([result], given.json)


def measure(places: dict[str, FeatureSet], workers: int, rounds: int, size: int, cold: Path) -> list[dict[str, object]]:
    """Rows of the table for one number of readers."""
    names = list(places)
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-1, rounds):  # the first round fills caches, and is not counted
        for name in names[number % len(names) :] + names[: number % len(names)]:
            shutil.rmtree(cold, ignore_errors=True)
            speed = epoch(places[name], workers, seed=number + 1)
            if number >= 0:
                found[name].append(speed)
    rows: list[dict[str, object]] = []
    for name in names:
        ratios = sorted(one / files for one, files in zip(found[name], found["files"], strict=True))
        speed = statistics.median(found[name])
        rows.append({"place": name, "workers": workers, "samples/s": round(speed, 1),
                     "MB/s": round(speed * size / 10**6), "by files": round(statistics.median(ratios), 2),
                     "lowest": round(ratios[0], 2), "highest": round(ratios[-1], 2)})  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
