"""Opening stores of shards of 10^5, 10^6 and 10^7 samples and reading the first batch: time and memory.

    python benchmarks/data_scale.py [--samples 100000 1000000 10000000] [--folder FOLDER] [--json FILE]

Indexes, catalog and manifest are real; bodies are sparse files of the right sizes (os.truncate) in which only the
samples of the batch are written. A sample is a clip of one of six shapes, 81 frames of 480p the largest, with a caption
of its own. Each store is opened in a fresh process that has imported what training imports; what is measured is what
comes on top of that. The folder needs 0.3 kB a sample, and is emptied at the end.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402  (the path above)
import torch  # noqa: E402

from mm.config.model import WanConfig  # noqa: E402
from mm.data.dataset import FeatureDataset  # noqa: E402
from mm.data.features import Feature, Origin, serialised, text_hash  # noqa: E402
from mm.data.recipe import Recipe, save_recipe  # noqa: E402
from mm.data.store.catalog import finish_store  # noqa: E402
from mm.data.store.checksum import checksum_of  # noqa: E402
from mm.data.store.opened import open_shards  # noqa: E402
from mm.data.store.shard import BODY, INDEX, KIND, PROMPT, SAMPLE, shard_folder  # noqa: E402
from mm.data.store.table import write_table  # noqa: E402
from mm.data.store.writer import order_by_shape, prompt_blob, prompt_key  # noqa: E402

SAMPLES_OF_SHARD = 512
BATCH = 8
MODEL = WanConfig(hidden_size=1536, ffn_dim=8960, num_heads=12, num_layers=30)
SHAPES = [(16, frames, *size) for frames in (21, 9, 5) for size in ((60, 104), (30, 52))]
RECIPE = Recipe(
    vae="v", text_encoder="t", tokenizer="k", height=480, width=832, num_frames=81, min_num_frames=17,
    frame_interval=1, vae_dtype="bf16", text_dtype="bf16", tile_size=None, tile_stride=None, max_text_tokens=512,
    seed=0,
)  # fmt: skip


def batch(samples: int) -> list[int]:
    """The samples of the first batch."""
    return sorted(int(index) for index in np.random.default_rng(samples).choice(samples, BATCH, replace=False))


def blobs(index: int) -> tuple[bytes, bytes]:
    """A sample's and its caption's content."""
    caption = f"caption {index}"
    latents = torch.full(SHAPES[index % len(SHAPES)], 1.0, dtype=torch.bfloat16)
    origin = Origin(f"videos/{index:09d}.mp4", RECIPE.key, text_hash(caption), "v")
    prompt = torch.full((512, 4096), 1.0, dtype=torch.bfloat16)
    sample = serialised({"latents": latents}, origin, Feature(latents, prompt), "")
    return sample, prompt_blob(caption, prompt, 512, RECIPE.key)


def write_shard(store: Path, number: int, indexes: range, real: set[int], kinds: list[list[int]]) -> None:
    """One shard: its index, and a body in which only the samples in `real` are written; `kinds`: sizes by shape."""
    folder = shard_folder(store, number)
    folder.mkdir(parents=True)
    sizes = np.array([size for index in indexes for size in kinds[index % len(SHAPES)]], np.uint64)
    ends = np.cumsum((sizes + 63) // 64 * 64)
    offsets = np.concatenate([[0], ends[:-1]]).astype(np.uint64)
    names = "".join(f"videos/{index:09d}.mp4" for index in indexes).encode()
    samples, prompts = np.zeros(len(indexes), SAMPLE), np.zeros(len(indexes), PROMPT)
    keys = np.array([list(prompt_key(f"caption {index}")) for index in indexes], np.uint8)
    for records, first in ((samples, 0), (prompts, 1)):
        records["offset"], records["length"] = offsets[first::2], sizes[first::2]
    samples["shape"] = [SHAPES[index % len(SHAPES)] for index in indexes]
    samples["text_tokens"] = prompts["tokens"] = 512
    samples["prompt_shard"], samples["prompt_key"], prompts["key"] = number, keys, keys
    samples["name_length"] = len(names) // len(indexes)
    samples["name_offset"] = np.arange(len(indexes)) * (len(names) // len(indexes))
    with open(folder / BODY, "wb") as body:
        for place, index in enumerate(indexes):
            if index in real:
                for content, records in zip(blobs(index), (samples, prompts), strict=True):
                    body.seek(int(records["offset"][place]))
                    body.write(content)
                    records["digest"][place] = list(checksum_of([content]).value)
        body.truncate(int(ends[-1]))
    order, counts = order_by_shape(samples["shape"])
    prompts = prompts[np.argsort(keys.view("S16").reshape(-1))]
    about = {
        "recipe": RECIPE.key, "samples": len(indexes), "body_bytes": int(ends[-1]), "identity": f"{number:032x}",
        "shapes": [[*shape, count] for shape, count in counts.items()],
    }  # fmt: skip
    columns = {"samples": samples, "prompts": prompts, "names": np.frombuffer(names, np.uint8), "order": order}
    write_table(folder / INDEX, KIND, about, columns)


def write_store(store: Path, samples: int) -> float:
    """Write a store; returns the seconds that finishing it took."""
    store.mkdir()
    save_recipe(store, RECIPE)
    real = set(batch(samples))
    kinds = [list(map(len, blobs(kind))) for kind in range(len(SHAPES))]
    starts = range(0, samples, SAMPLES_OF_SHARD)
    for number, first in enumerate(starts):
        write_shard(store, number, range(first, min(samples, first + SAMPLES_OF_SHARD)), real, kinds)
    began = time.perf_counter()
    finish_store(store, len(starts), RECIPE.key)
    return time.perf_counter() - began


def resident(most: bool = False) -> int:
    """Bytes of this process in memory, mapped files included; at most so far (getrusage tells the parent's, too)."""
    name = "VmHWM:" if most else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def measure(store: Path) -> dict[str, float]:
    """Open a store and read the first batch, in this process, which has done nothing else."""
    before, began = resident(), time.perf_counter()
    data = FeatureDataset([open_shards(store, RECIPE.key)], MODEL)
    opened, memory = time.perf_counter() - began, resident() - before
    for index in batch(len(data)):
        item = data[index]
        if data.name(index) != f"videos/{index:09d}.mp4" or item["latents"].shape != SHAPES[index % len(SHAPES)]:
            raise SystemExit(f"sample {index} is not what was written")
    del item
    total, most = time.perf_counter() - began, resident(most=True) - before
    began = time.perf_counter()
    drawn = np.random.default_rng(0).integers(0, 2**62, 1000)
    rows, buckets = data.of_draw(0), list(data.buckets().items())
    for number in drawn.tolist():
        shape, count = buckets[number % len(buckets)]
        if data.latent_shape(rows.in_bucket(shape, number % count)) != shape:
            raise SystemExit("a bucket holds a sample of another shape")
    per_draw = (time.perf_counter() - began) / len(drawn)
    return {
        "open_s": opened,
        "batch_s": total,
        "open_mb": memory / 1e6,
        "batch_mb": most / 1e6,
        "draw_ms": per_draw * 1e3,
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.measure:
        print(json.dumps(measure(flags.measure)))
        return
    home = Path(tempfile.mkdtemp(prefix="data_scale-", dir=flags.folder))
    rows: list[dict[str, float]] = []
    try:
        for samples in flags.samples:
            finish = write_store(home / "store", samples)
            command = [sys.executable, __file__, "--measure", str(home / "store")]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append({"samples": samples, "finish_s": finish, **json.loads(done.stdout)})
            shutil.rmtree(home / "store")
    finally:
        shutil.rmtree(home, ignore_errors=True)
    print("| " + " | ".join(rows[0]) + " |\n" + "| --- " * len(rows[0]) + "|")
    for row in rows:
        print(
            "| "
            + " | ".join(f"{value:.3g}" if isinstance(value, float) else f"{value:,}" for value in row.values())
            + " |"
        )
    for before, after in itertools.pairwise(rows):
        growth = {name: after[name] / max(before[name], 1e-3) for name in ("samples", "open_s", "open_mb", "draw_ms")}
        print("growth: " + ", ".join(f"{name} x {factor:.2g}" for name, factor in growth.items()))
    if flags.json:
        flags.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
