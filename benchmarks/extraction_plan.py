"""Cost of an extraction's start: the plan of tables of N rows, and what a worker then holds.

    python benchmarks/extraction_plan.py --rows 100000 1000000 10000000

writes a .jsonl of N rows (path, caption of 90 characters, num_frames), and measures in a new process, which has
imported what extraction imports: the first start, which writes the plan; a later start, which finds it; and reading
the rows of one shard. Of up to 100,000 rows the files are there, and are looked at. Memory is what the process has
resident at its highest, on top of what it had before. Seconds of computing stand beside those on the clock, which
other programs stretch.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAMES = ("rows", "table_mb", "first_s", "first_cpu_s", "first_mb", "later_s", "later_mb", "shard_ms", "plan_mb")


def write_rows(folder: Path, count: int, with_files: bool) -> Path:
    """A table of videos, a thousand to a folder; returns it."""
    path = folder / "rows.jsonl"
    with path.open("w") as file:
        for row in range(count):
            name = f"videos/{row // 1000:05d}/clip_{row:08d}.mp4"
            if with_files:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(b"%d" % row)
            caption = f"clip {row}: a person in a red coat walks through a park while leaves fall slowly to the ground"
            file.write(json.dumps({"path": name, "cap": caption, "num_frames": 121}) + "\n")
    return path


def measured(folder: Path) -> dict[str, float]:
    """Seconds and 10^6 bytes of a start in this process, and of reading one shard's rows."""
    import torch

    import mm.extract.run  # noqa: F401  what an extraction has imported before it starts
    from mm.config.bad_samples import FAIL
    from mm.config.data import DataSource
    from mm.data.recipe import Recipe
    from mm.data.sources.checking import RowReader
    from mm.extract.claims import Claims
    from mm.extract.planning import settle_plan

    torch.set_num_threads(1)
    recipe = Recipe.model_validate(json.loads((folder / "recipe.json").read_text()))
    run = extraction(folder)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    worked = time.process_time()
    reader = RowReader([DataSource(folder, folder / "rows.jsonl", "mindspeed")])
    store = folder / "store"
    store.mkdir(exist_ok=True)
    with Claims(folder / "claims") as claims:
        plan = settle_plan(run, store, recipe, reader, claims, FAIL)
    seconds, worked = time.perf_counter() - began, time.process_time() - worked
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6
    began = time.perf_counter()
    for row in plan.rows(plan.num_runs // 2):
        reader.check(row.source, row.number, reader.row_of(row.source, row.text, row.line), row.kind)
    shard_ms = (time.perf_counter() - began) * 1e3
    return {"s": seconds, "cpu_s": worked, "mb": memory, "shard_ms": shard_ms}


def extraction(folder: Path) -> Any:
    """An extraction of 81 frames at 480p; its encoders are not loaded."""
    from mm.config.run.extraction import ExtractionRun, ExtractionSections

    name = {"from_pretrained": "none"}
    values = {
        "extraction": {},
        "data": {"path": str(folder / "rows.jsonl"), "clip": {"num_frames": 81, "height": 480, "width": 832}},
        "encoders": {"vae": {**name, "precision": "bf16"}, "text": {**name, "precision": "bf16"}, "tokenizer": name},
        "output": {"path": str(folder / "store")},
    }
    from mm.config.run.origins import Origins

    return ExtractionRun.described(ExtractionSections.model_validate_json(json.dumps(values)), Origins())


def row_of(count: int, folder: Path) -> list[str]:
    """Measurements of one number of rows."""
    from mm.extract.draft import LOOKED_AT

    table = write_rows(folder, count, count <= LOOKED_AT)
    recipe = {
        "vae": "0" * 16, "text_encoder": "0" * 16, "tokenizer": "0" * 16, "num_frames": 81, "min_num_frames": None,
        "frame_interval": 1, "vae_dtype": "bf16", "text_dtype": "bf16", "tile_size": None, "tile_stride": None,
        "max_text_tokens": 512, "seed": 1234,
    }  # fmt: skip
    (folder / "recipe.json").write_text(json.dumps(recipe))
    starts = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, __file__, "--measure", str(folder)],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        starts.append(json.loads(done.stdout.splitlines()[-1]))
    first, later = starts
    plan = sum(path.stat().st_size for path in (folder / "store" / "plan").iterdir()) / 1e6
    numbers = [first["s"], first["cpu_s"], first["mb"], later["s"], later["mb"], later["shard_ms"], plan]
    return [f"{count:,}", f"{table.stat().st_size / 1e6:.0f}", *(f"{number:.1f}" for number in numbers)]


def main(argv: Sequence[str]) -> None:
    """Print a row for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.measure is not None:
        print(json.dumps(measured(options.measure)))
        return
    print("| " + " | ".join(NAMES) + " |\n|" + " --- |" * len(NAMES), flush=True)
    for count in options.rows:
        with tempfile.TemporaryDirectory(prefix="plan-") as folder:
            print("| " + " | ".join(row_of(count, Path(folder))) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
