"""Steps of a smoke run that are commands of the program, on the embedded default: extraction, training, generation."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smoke_step import ROOT, Found, Place, found, require

from mm.isolated import command_of

WEIGHTS, IMAGE_WEIGHTS = (
    "weights/Wan2.1-T2V-Tiny-Diffusers/transformer",
    "weights/Wan2.1-I2V-Tiny-Diffusers/transformer",
)
FEATURE_BOUND, FRAME_BOUND = 5e-3, 3.0
"""Largest error over largest value of features in fp32; mean difference of frames, of 255 steps, after all of a run."""
STEPS, SAVE_EVERY = 60, 10


def features(place: Place) -> Found:
    """Write the embedded default and extract its features, of text to video and of image to video."""
    demo = _demo(place)
    _command("demo", "--out", demo)
    for task in ("", "i2v"):
        _extract(demo / "configs" / task, place)
    listed = json.loads((demo / "features" / "manifest.json").read_text())["samples"]
    return found(f"{listed} samples", samples=listed)


def kill_and_resume(place: Place) -> Found:
    """A deterministic run, and one that is killed between its background saves and goes on: equal bits everywhere."""
    launch = ["mm.cli.launch", "--nproc_per_node", "1", "-m", "mm.cli.train"]
    more = {"train_iters": STEPS, "save_interval": SAVE_EVERY, "async_save": True, "deterministic_mode": True,
            "keep_latest": 2, "bf16": True}  # fmt: skip
    whole, killed = place.folder / "whole", place.folder / "killed"
    _module(*launch, *_words(place, whole, **more))
    command = [*command_of(launch[0]), *launch[1:], *_words(place, killed, **more)]
    with subprocess.Popen(command, cwd=ROOT, env=_environment()) as job:
        while not list(killed.glob("iter_*")) and job.poll() is None:
            time.sleep(0.01)
        rank = _train_process(job.pid)
        require(job.poll() is None and rank is not None, "the run ended before it was killed")
        os.kill(rank or 0, signal.SIGKILL)
        ended = job.wait()
    require(ended != 0, "a killed run ended with 0")
    before = len(_metrics(killed))
    require(before < STEPS, "the run ended before it was killed")
    _module(*launch, *_words(place, killed, **more))
    bits = [[(row["step"], row["loss_hex"], row["grad_norm_hex"]) for row in _metrics(run)] for run in (whole, killed)]
    require(len(bits[0]) == STEPS, f"{len(bits[0])} of {STEPS} steps")
    differing = [row[0] for row, other in zip(*bits, strict=True) if row != other]
    require(not differing, f"the steps {differing[:5]} differ")
    return found(f"killed after {before} of {STEPS} steps (exit code {ended}); all steps equal bit for bit",
                 killed_after=before, exit_code=ended)  # fmt: skip


def layer_zero(place: Place) -> Found:
    """Parameters sharded by FSDP2, on one rank."""
    zero = place.folder / "zero.yaml"
    zero.write_text("zero3_size: 1\n")
    return _steps(place, "zero", layerzero=True, layerzero_config=zero, bf16=True)


def compiled(place: Place) -> Found:
    """Blocks compiled by torch."""
    return _steps(place, "compiled", compile_blocks=True, bf16=True)


def offload(place: Place) -> Found:
    """Kept attention waits in page-locked host memory."""
    model = json.loads((_demo(place) / "configs" / "pretrain_model.json").read_text())
    model["predictor"]["attention_async_offload"] = True
    model["predictor"].pop("dtype", None)
    (place.folder / "offload.json").write_text(json.dumps(model))
    return _steps(
        place, "offload", mm_model=place.folder / "offload.json", recompute_granularity="selective", bf16=True
    )


def lora_bf16(place: Place) -> Found:
    """Adapters on a frozen base in bf16."""
    return _lora(place, "lora")


def lora_int8(place: Place) -> Found:
    """Adapters on a frozen base in 8 bits."""
    return _lora(place, "lora8", lora_base_dtype="int8")


def fp32(place: Place) -> Found:
    """Everything in fp32, on the device and on the CPU: the same losses."""
    _steps(place, "fp32", bf16=None)
    _steps(place, "fp32 on the CPU", bf16=None, device="cpu")
    here, there = ([row["loss"] for row in _metrics(place.folder / run)] for run in ("fp32", "fp32 on the CPU"))
    worst = max(abs(a - b) / b for a, b in zip(here, there, strict=True))
    require(worst < 1e-3, f"losses {here}, on the CPU {there}")
    return found(f"losses within {worst:.1e} of the CPU's", losses=here, of_cpu=there)


def i2v(place: Place) -> Found:
    """A model of images."""
    configs, demo = _demo(place) / "configs" / "i2v", _demo(place)
    return _steps(place, "i2v", mm_data=configs / "feature_data.json", mm_model=_without_dtype(place, configs, "i2v"),
                  load=demo / IMAGE_WEIGHTS, bf16=True)  # fmt: skip


def extraction_on_cpu(place: Place) -> Found:
    """The features of the device beside those of the CPU, tensor by tensor."""
    demo = _demo(place)
    tools = json.loads((demo / "configs" / "tools.json").read_text())
    of_cpu = tools["sorafeature"]["save_path"] = str(place.folder / "features of the CPU")
    (place.folder / "tools.json").write_text(json.dumps(tools))
    _extract(demo / "configs", place, kind="cpu", tools=place.folder / "tools.json")
    here, there = _tensors(demo / "features"), _tensors(Path(of_cpu))
    require(bool(here) and here.keys() == there.keys(), "the stores hold other samples, or none")
    worst = 0.0
    for sample, ours in here.items():
        for name, tensor in ours.items():
            expected = there[sample][name].double()
            error = (tensor.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
            worst = max(worst, float(error))
    require(worst <= FEATURE_BOUND, f"features differ from the CPU's by {worst:.1e}")
    return found(f"{len(here)} samples, largest error {worst:.1e}", files=len(here), error=worst)


def _tensors(store: Path) -> dict[str, dict[str, Any]]:
    """Tensors of a store's samples, by their ids."""
    from safetensors.torch import load

    from mm.data.recipe import load_recipe
    from mm.data.store.blobs import read_blob
    from mm.data.store.opened import open_shards

    opened = open_shards(store, load_recipe(store).key)
    found = {}
    for row in range(len(opened)):
        sample, prompt = (load(bytes(read_blob(blob, str(blob)))) for blob in opened.blobs_of(row))
        found[opened.name(row)] = {**sample, **prompt}
    return found


def generation_on_cpu(place: Place) -> Found:
    """Clips of the device beside those of the CPU, as frames before they are encoded."""
    demo = _demo(place)
    prompts = place.folder / "prompts.txt"
    prompts.write_text("\n".join((demo / "prompts.txt").read_text().splitlines()[:2]) + "\n")
    ours, theirs = (_clips(place, prompts, kind) for kind in (_kind(place), "cpu"))
    require(len(ours) == len(theirs) == 2, f"{len(ours)} and {len(theirs)} clips of 2")
    mean = max(float((a.float() - b.float()).abs().mean()) for a, b in zip(ours, theirs, strict=True))
    require(mean <= FRAME_BOUND, f"frames differ from the CPU's by {mean:.2f} of 255 on average")
    return found(f"2 clips, mean difference {mean:.3f} of 255", mean_difference=mean)


def _clips(place: Place, prompts: Path, kind: str) -> list[Any]:
    from mm.cli import generate
    from mm.generate import run

    frames: list[Any] = []
    demo, clips = _demo(place), Path(tempfile.mkdtemp(prefix=f"clips of {kind}-", dir=place.folder))
    write: Any = vars(run)["write_clip"]

    def keep(path: Path, clip: Any, *rest: Any) -> None:
        frames.append(clip)
        write(path, clip, *rest)

    vars(run)["write_clip"] = keep
    try:
        with _inside(demo):
            generate.main(_as_words({
                "mm_model": demo / "configs" / "inference_model.json", "load": demo / WEIGHTS, "prompt": prompts,
                "save_path": clips, "device": kind, "no_progress_bar": True,
            }))  # fmt: skip
    finally:
        vars(run)["write_clip"] = write
    return frames


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _lora(place: Place, name: str, **more: Any) -> Found:
    return _steps(place, name, bf16=True, load=None, load_base_model=_demo(place) / WEIGHTS, lora_r=4, lora_alpha=4,
                  lora_target_modules=["q", "k", "v", "o"], **more)  # fmt: skip


def _steps(place: Place, name: str, **more: Any) -> Found:
    """Three steps of `mm train` in this process."""
    from mm.cli import train

    train.main(_words(place, place.folder / name, train_iters=3, **more))
    losses = [row["loss"] for row in _metrics(place.folder / name)]
    require(len(losses) == 3 and all(map(math.isfinite, losses)), f"losses {losses}")
    return found(f"losses {', '.join(f'{loss:.4f}' for loss in losses)}", losses=losses)


def _words(place: Place, save: Path, **flags: Any) -> list[str]:
    demo = _demo(place)
    require((demo / "features" / "manifest.json").exists(), 'there are no features: "data and features" failed')
    return _as_words({
        "mm_data": demo / "configs" / "feature_data.json", "mm_model": _without_dtype(place, demo / "configs", "t2v"),
        "load": demo / WEIGHTS, "save": save, "micro_batch_size": 4, "lr": 1e-3, "num_workers": 0,
        "no_progress_bar": True, "device": _kind(place), **flags,
    })  # fmt: skip


def _as_words(flags: dict[str, Any]) -> list[str]:
    from mm.config.flags import as_words

    return as_words(flags)


def _without_dtype(place: Place, configs: Path, name: str) -> Path:
    """pretrain_model.json without a precision of its own, so that --bf16 alone decides."""
    model = json.loads((configs / "pretrain_model.json").read_text())
    model["predictor"].pop("dtype", None)
    file = place.folder / f"{name}.json"
    file.write_text(json.dumps(model))
    return file


def _kind(place: Place) -> str:
    from mm.device.backend import select

    return select(place.kind).kind  # type: ignore[arg-type]


def _demo(place: Place) -> Path:
    return place.folder / "demo"


def _extract(configs: Path, place: Place, kind: str | None = None, tools: Path | None = None) -> None:
    _command("extract", "--mm-data", configs / "data.json", "--mm-model", configs / "model_wan.json", "--mm-tool",
             tools or configs / "tools.json", "--device", kind or _kind(place))  # fmt: skip


def _command(name: str, *words: object) -> None:
    """Run a command in this process, which has torch already."""
    importlib.import_module(f"mm.cli.{name}").main(list(map(str, words)))


def _module(name: str, *words: str) -> None:
    """Run a module as the scripts do; what it prints is in the log."""
    done = subprocess.run([*command_of(name), *words], cwd=ROOT, env=_environment(), check=False)
    require(done.returncode == 0, f"{name} ended with {done.returncode}; see its log")


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4")}


def _train_process(launcher: int) -> int | None:
    import psutil

    for child in psutil.Process(launcher).children(recursive=True):
        command = " ".join(child.cmdline())
        if "mm.cli.train" in command and "mm.cli.launch" not in command:
            return int(child.pid)
    return None


def _metrics(save: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
