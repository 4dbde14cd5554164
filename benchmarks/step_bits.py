"""The bits of three training steps of many layouts, to hold a change of the code against the version before.

    python benchmarks/step_bits.py --out before.json        on the version before
    python benchmarks/step_bits.py --compare before.json    on the version after: exit code 1 where a bit differs

Trains the embedded default on the CPU by the command line, as a user does. Written are each step's loss and gradient
norm (`float.hex`) and the hash of every weight file, of the checkpoint and of what is converted from it. Bits depend on
the processor and on torch, so that both versions must run on one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PYTHON = [sys.executable, str(ROOT / "mm" / "isolated.py")]
STEPS = 3
LORA = ("--lora-r", "4", "--lora-alpha", "4", "--lora-target-modules", "q", "k", "v", "o", "ffn.0", "ffn.2")
DISTOPT = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
TP2 = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
CP2 = ("--context-parallel-size", "2")
PP2 = ("--pipeline-model-parallel-size", "2")
ZERO = ("--layerzero", "--layerzero-config", "{zero}")
KEEP = ("--recompute-granularity", "selective")
FULL = ("--recompute-granularity", "full", "--recompute-method")
USP = ("--context-parallel-size", "4", "--context-parallel-algo", "hybrid_cp_algo", "--ulysses-degree-in-cp", "2")


def of_images(task: str) -> tuple[str, ...]:
    """The words that name a task's features, model and weights."""
    files = ("--mm-data", f"{{{task}}}/feature_data.json", "--mm-model", f"{{{task}}}/pretrain_model.json")
    return (*files, "--load", f"{{{task}_weights}}")


LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "one, bf16": (1, ("--bf16",)),
    "one, recomputed, average": (1, (*FULL, "block", "--recompute-num-layers", "2", "--ema-decay", "0.9")),
    "one, offload": (1, ("--mm-model", "{offload}", *KEEP)),
    "one, cosine": (1, ("--lr-decay-style", "cosine", "--lr-warmup-iters", "2", "--adam-beta2", "0.9")),
    "dp2, distributed optimizer": (2, DISTOPT),
    "tp2": (2, TP2),
    "cp2 ulysses": (2, CP2),
    "cp2 ring": (2, (*CP2, "--context-parallel-algo", "megatron_cp_algo")),
    "cp4 usp": (4, USP),
    "pp2": (2, PP2),
    "pp2 vp2, kept attention": (2, (*PP2, "--virtual-pipeline-model-parallel-size", "2", *KEEP)),
    "tp2 cp2, bf16": (4, (*TP2, *CP2, "--bf16")),
    "tp2 pp2, distributed optimizer": (4, (*TP2, *PP2, "--use-distributed-optimizer")),
    "zero2": (2, ZERO),
    "cp2 zero2, recomputed": (4, (*CP2, *ZERO, *FULL, "uniform", "--recompute-num-layers", "1")),
    "pp2 zero2": (4, (*PP2, *ZERO)),
    "lora": (1, LORA),
    "lora, int8 base, pp2": (2, (*LORA, "--lora-base-dtype", "int8", *PP2)),
    "lora, tp2": (2, (*LORA, *TP2)),
    "lora, zero2": (2, (*LORA, *ZERO)),
    "i2v, cp2": (2, (*of_images("i2v"), *CP2)),
    "flf2v, pp2": (2, (*of_images("flf2v"), *PP2)),
    "from MindSpeed-MM's files": (1, ("--load", "{of mm}")),
    "from native files, tp2": (2, (*TP2, "--load", "{of native}")),
}
"""Processes, and words of `mm train`; a word in braces is one of `places`."""


def call(*words: str) -> None:
    """Run a command of the project; what it printed is shown only if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*PYTHON, *words], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stdout}{done.stderr}")


def convert(form: str, source: str, target: Path) -> None:
    """Convert weights as the converter does."""
    call("mm.cli.convert", "--mode", f"convert_to_{form}", "--source-path", source, "--target-path", str(target))


def places(home: Path) -> dict[str, str]:
    """Make what the layouts' words name.

    Returns:
        Paths by the names that stand in braces.
    """
    demo, configs = home / "demo", home / "demo" / "configs"
    call("mm.cli.demo", "--out", str(demo))
    found = {
        "data": configs / "feature_data.json",
        "model": configs / "pretrain_model.json",
        "zero": home / "zero.yaml",
    }
    for task in ("t2v", "i2v", "flf2v"):
        folder = configs if task == "t2v" else configs / task
        files = {"--mm-data": "data.json", "--mm-model": "model_wan.json", "--mm-tool": "tools.json"}
        call("mm.cli.extract", *(word for flag, name in files.items() for word in (flag, str(folder / name))))
        found[task] = folder
        found[f"{task}_weights"] = demo / "weights" / f"Wan2.1-{task.upper()}-Tiny-Diffusers" / "transformer"
    for form in ("mm", "native"):
        found[f"of {form}"] = home / f"of {form}"
        convert(form, str(found["t2v_weights"]), found[f"of {form}"])
    found["zero"].write_text("zero3_size: 2\n")
    model = json.loads(found["model"].read_text())
    model["predictor"]["attention_async_offload"] = True
    found["offload"] = home / "offload.json"
    found["offload"].write_text(json.dumps(model))
    del model["predictor"]["dtype"], model["predictor"]["attention_async_offload"]
    found["any precision"] = home / "any precision.json"  # so that --bf16 alone decides
    found["any precision"].write_text(json.dumps(model))
    return {name: str(path) for name, path in found.items()}


def train(number: int, words: tuple[str, ...], save: Path, places: dict[str, str]) -> dict[str, Any]:
    """Three steps of one layout.

    Returns:
        The steps' losses and norms, and the hashes of what lies in the checkpoint's folder.
    """
    flags = {
        "--mm-data": "{data}", "--mm-model": "{any precision}" if "--bf16" in words else "{model}",
        "--load-base-model" if "--lora-r" in words else "--load": "{t2v_weights}", "--save": str(save),
        "--train-iters": str(STEPS), "--micro-batch-size": "2", "--global-batch-size": "8", "--lr": "1e-3",
        "--num-workers": "0", "--device": "cpu",
    }  # fmt: skip
    command = [word for flag, value in flags.items() if flag not in words for word in (flag, value)]
    start = ["mm.cli.launch", "--nproc_per_node", str(number), "-m"] if number > 1 else []
    call(*start, "mm.cli.train", "--no-progress-bar", *(word.format(**places) for word in (*command, *words)))
    rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return {
        "loss_hex": [row["loss_hex"] for row in rows],
        "grad_norm_hex": [row["grad_norm_hex"] for row in rows],
        "files": hashes(save / f"iter_{STEPS:07d}"),
    }


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every weight file in a folder, by its path there; without the metadata, in which paths may stand."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes() if path.suffix in (".safetensors", ".pt") else b""
        if path.suffix == ".safetensors":
            size = int.from_bytes(content[:8], "little")
            header = json.loads(content[8 : 8 + size])
            header.pop("__metadata__", None)
            content = json.dumps(header).encode() + content[8 + size :]
        if content:
            found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


def record(home: Path, only: str | None) -> dict[str, Any]:
    """All layouts, and what is converted from the first one's checkpoint."""
    made = places(home)
    found: dict[str, Any] = {}
    for name, (number, words) in LAYOUTS.items():
        if only is None or only in name:
            found[name] = train(number, words, home / "runs" / name.replace(" ", "_").replace(",", ""), made)
            print(f"{name}: {' '.join(found[name]['loss_hex'])}", flush=True)
    if only is None:
        for form in ("hf", "native", "mm"):
            convert(form, str(home / "runs" / "one"), home / f"to {form}")
            found[f"converted to {form}"] = {"files": hashes(home / f"to {form}")}
    return found


def main() -> None:
    """Record, write, compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", help="write the bits as JSON")
    parser.add_argument("--compare", help="JSON of the version before")
    parser.add_argument("--only", help="layouts with this in their name")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = record(Path(folder), arguments.only)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(found, indent=1) + "\n")
    if arguments.compare:
        before = json.loads(Path(arguments.compare).read_text())
        other = [name for name, bits in found.items() if bits != before.get(name)]
        missing = [name for name in before if name not in found and arguments.only is None]
        print(
            f"{len(found) - len(other)} of {len(found)} as before", *(f"other bits: {name}" for name in other), sep="\n"
        )
        sys.exit(1 if other or missing else 0)


if __name__ == "__main__":
    main()
