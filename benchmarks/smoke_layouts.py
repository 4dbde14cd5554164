"""Steps of a smoke run on two devices: layouts against one device; by `mm doctor parity`."""

from __future__ import annotations

import json
import os
import re
import subprocess

from smoke_step import ROOT, Found, Place, found, require, skipped

from mm.isolated import command_of

MODEL = ROOT / "examples" / "wan2.1" / "1.3b" / "t2v"
BLOCKS = 4


def two_devices(place: Place) -> Found:
    """How many devices there are."""
    from mm.device.backend import select

    backend, count = select(place.kind), _devices(place)  # type: ignore[arg-type]
    if count == 1:
        return skipped(f"needs two devices, and one is here ({backend.name()})")
    return found(f"2 processes over {backend.collective} on {backend.name()}", collective=backend.collective)


def ulysses(place: Place) -> Found:
    """Heads exchanged for tokens."""
    return _parity(place, "--context-parallel-size", "2", "--context-parallel-algo", "ulysses_cp_algo")


def ring(place: Place) -> Found:
    """Keys and values travel."""
    return _parity(place, "--context-parallel-size", "2", "--context-parallel-algo", "megatron_cp_algo")


def tensor(place: Place) -> Found:
    """Split linears, tokens cut outside of them."""
    return _parity(place, "--tensor-model-parallel-size", "2", "--sequence-parallel")


def pipeline(place: Place) -> Found:
    """Two stages of two chunks each: the two ranks are each other's neighbour on both sides."""
    return _parity(place, "--pipeline-model-parallel-size", "2", "--virtual-pipeline-model-parallel-size", "2",
                   "--global-batch-size", "4")  # fmt: skip


def layer_zero(place: Place) -> Found:
    """Parameters sharded by FSDP2."""
    zero = place.folder / "zero2.yaml"
    zero.write_text("zero3_size: 2\n")
    return _parity(place, "--layerzero", "--layerzero-config", str(zero))


def _parity(place: Place, *flags: str) -> Found:
    """`mm doctor parity` on two processes, of a model of few blocks with 1.3B's heads; everything is fp32."""
    if _devices(place) == 1:
        return skipped("needs two devices")
    model = json.loads((MODEL / "pretrain_model.json").read_text())
    model["predictor"] |= {"num_layers": BLOCKS}
    model["predictor"].pop("dtype", None)
    model["predictor"].pop("pipeline_num_layers", None)
    file = place.folder / "model.json"
    file.write_text(json.dumps(model))
    launch = ["mm.cli.launch", "--standalone", "--nproc_per_node", "2", "-m", "mm.cli.doctor", "parity"]
    words = ["--mm-data", str(MODEL / "feature_data.json"), "--mm-model", str(file), "--init-from-scratch",
             "--lr", "1e-3", "--train-iters", "1", *flags]  # fmt: skip
    words += ["--device", _kind(place)]
    threads = os.environ.get("OMP_NUM_THREADS", "4")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads}
    done = subprocess.run(
        [*command_of(launch[0]), *launch[1:], *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout, done.stderr)
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    require(done.returncode == 0, last)
    errors = dict(re.findall(r"^(loss|gradients|gradient norm|weights) +(\S+)", done.stdout, re.MULTILINE))
    require(len(errors) == 4, "the table of errors is missing")
    return found(", ".join(f"{name} {error}" for name, error in errors.items()), **errors)


def _devices(place: Place) -> int:
    """Devices for two processes; the CPU has enough."""
    import torch

    kind = _kind(place)
    return 2 if kind == "cpu" else int(getattr(torch, kind).device_count())


def _kind(place: Place) -> str:
    from mm.device.backend import select

    return select(place.kind).kind  # type: ignore[arg-type]
