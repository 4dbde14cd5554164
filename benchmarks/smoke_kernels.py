"""Steps of a smoke run that call the program's parts: kernels, a step's waits for its device, its memory."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smoke_step import ROOT, Found, Place, found, require, skipped

ATTENTION_BOUND, OPERATOR_BOUND = 2**-7, 2**-8  # of bf16: largest error over largest value, as in tests/ops
CHUNKS = 8
MEMORY_BOUND = 0.1  # of the peak; the dry run says what it leaves out


def environment(place: Place) -> Found:
    """Python, the packages of setup.py, the device and its driver."""
    required = (ROOT / "setup.py").read_text().partition("install_requires")[2].partition("]")[0]
    listed = re.findall(r'^ *"([A-Za-z0-9_-]+)', required, re.MULTILINE)
    versions = {}
    for name in listed:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = ""
    missing = [name for name, version in versions.items() if not version]
    require(importlib.util.find_spec("torch") is not None, f"missing: {', '.join(missing)}")
    import torch

    backend = _backend(place)
    require(float(torch.ones(3, device=backend.device).sum()) == 3, f"{backend.name()} cannot add up")
    figures: dict[str, Any] = {
        "python": sys.version.split()[0], "packages": versions, "device": backend.name(), "processors": os.cpu_count(),
        "toolkit": torch.version.cuda, "driver": _driver() if backend.kind == "cuda" else None,
    }  # fmt: skip
    require(not set(missing) - {"decord"}, f"missing: {', '.join(missing)}")
    return found(f"{backend.name()}, Python {figures['python']}, torch {versions['torch']}, driver {figures['driver']}",
                 **figures)  # fmt: skip


def triton_launch(place: Place) -> Found:
    """The first kernel, which Triton compiles with the machine's C compiler."""
    backend = _backend(place)
    if backend.kind != "cuda":
        return skipped("needs CUDA")
    from accel_bench import normal, relative

    from mm.ops.elementwise.dispatch import operators_of
    from mm.ops.elementwise.operators import Operators

    x, y = (normal((1, 64, 128), key, backend.device) for key in "xy")
    gate = normal((1, 1, 128), "gate", backend.device)
    started, chosen = time.monotonic(), operators_of(x)
    error = relative(chosen.gated_residual(x, y, gate), Operators().gated_residual(x, y, gate))
    name, seconds = type(chosen).__name__, time.monotonic() - started
    require(name == "TritonOperators", f"the operators are {name}: Triton does not work here; see its log")
    require(error < 1e-5, f"a kernel differs from torch by {error:.1e}")
    return found(f"{name}, {seconds:.1f} s", error=error, seconds=seconds)


def device_tests(place: Place) -> Found:
    """tests/ops on this device, without those that read a vendor's wheel; on the CPU those of attention."""
    if importlib.util.find_spec("pytest") is None:
        return skipped("needs pytest")
    tests = "tests/ops/test_lse_attention.py" if _backend(place).kind == "cpu" else "tests/ops"
    command = [sys.executable, "-m", "pytest", tests, "-q", "-m", "not nightly", "-p", "no:cacheprovider",
               "--ignore", "tests/ops/test_npu_calls.py"]  # fmt: skip
    if importlib.util.find_spec("pytest_timeout") is None:
        command += ["-o", "timeout=", "-W", "ignore::pytest.PytestConfigWarning"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    lines = [line for line in done.stdout.splitlines() if re.search(r"\d+ (passed|failed|error)", line)]
    require(done.returncode == 0, lines[-1] if lines else f"pytest ended with {done.returncode}")
    return found(lines[-1].strip("= "))


def attention_480p(place: Place) -> Found:
    """Self attention of 1.3B."""
    return _attention(place, tokens=32_760, heads=12)


def attention_720p(place: Place) -> Found:
    """Self attention of 14B on one of eight ranks of Ulysses."""
    return _attention(place, tokens=75_600, heads=5)


def elementwise(place: Place) -> Found:
    """The elementwise operators at 14B's width on all tokens of 720p, in both directions, against plain fp32."""
    from accel_parts import HEAD_DIM, TINY_GRID, operators

    with _bench(place) as bench:
        from accel_bench import relative

        grid, width = (TINY_GRID, HEAD_DIM) if bench.tiny else ((21, 45, 80), 5120)
        errors = {}
        for operator in operators(bench, width, grid):
            errors[operator.name] = max(map(relative, operator.run(), operator.plain()))
            bench.free()
        wrong = {name: error for name, error in errors.items() if not error <= OPERATOR_BOUND}
        require(not wrong, f"differ from fp32: {wrong}")
        return found(f"{grid[0] * grid[1] * grid[2]} x {width}: largest error {max(errors.values()):.1e}", **errors)


def waits(place: Place) -> Found:
    """How often the host waits for the device in a training step: once."""
    from accel_steps import TINY, engine_step
    from modes import MODES

    with _bench(place) as bench:
        step = engine_step(bench, TINY, MODES["full"])
        for _ in range(2):  # kernels are compiled, AdamW makes its state
            step()
        count = _waits_on_device(step) if bench.backend.kind == "cuda" else _reads_on_cpu(step)
        require(count == 1, f"a step waits {count} times for its device")
        return found(
            "1" if bench.backend.kind == "cuda" else "1 (reads on the host, as a CPU counts them)", waits=count
        )


def predicted_memory(place: Place) -> Found:
    """An uncut step of 1.3B at 480p, full recomputation, and what the dry run predicts for it."""
    import torch
    from accel_steps import SETTINGS, SMALL_MODEL, TINY, engine_step
    from modes import MODES

    from mm.config.layout import Layout
    from mm.doctor.dry_run import DryRunJob, dry_run
    from mm.parallel.apply import DataParallelOptions

    mode = MODES["full"]
    with _bench(place) as bench:
        work = TINY if bench.tiny else SMALL_MODEL
        require(SETTINGS.fused, "the benchmarks' optimizer is not the training's")
        step = engine_step(bench, work, mode)
        for _ in range(2):
            bench.reset_memory()
            step()
        bench.backend.synchronize()
        peak = None if bench.tiny else bench.memory()["GB allocated"] * 1e9
    options = DataParallelOptions(use_distributed_optimizer=True)
    job = DryRunJob(work.wan, Layout(), options, None, torch.bfloat16, work.latent, 1, 1, mode.recompute)
    predicted = dry_run(job, 0).peak_bytes
    if peak is None:
        return found(f"{predicted / 2**30:.3f} GiB predicted for the tiny model; a CPU has no peak of its own")
    require(abs(peak / predicted - 1) <= MEMORY_BOUND,
            f"{peak / 2**30:.2f} GiB, predicted {predicted / 2**30:.2f}")  # fmt: skip
    return found(f"{peak / 2**30:.2f} GiB, predicted {predicted / 2**30:.2f}", peak=peak, predicted=predicted)


def _backend(place: Place) -> Any:
    from mm.device.backend import select

    return select(place.kind)  # type: ignore[arg-type]


@contextmanager
def _bench(place: Place) -> Iterator[Any]:
    """The benchmarks' device, tiny on the CPU."""
    from accel_bench import Bench

    from mm.config.layout import Layout
    from mm.config.place import process_place
    from mm.parallel.mesh import build_mesh
    from mm.supervise.job import Job

    backend = _backend(place)
    with (
        Job(process_place(), backend.collective, backend.device, 2),
        build_mesh(Layout(), 2, backend.kind) as mesh,
    ):
        yield Bench(backend, mesh, backend.kind == "cpu")


def _attention(place: Place, tokens: int, heads: int) -> Found:
    """Key chunks merged, a backward by chunks from the whole log-sum-exp, few keys, other strides; against one call."""
    import torch
    from accel_bench import normal, relative

    from mm.ops.attention.api import attention_backward, attention_name, attention_with_lse
    from mm.parallel.ring import merge_attention

    backend = _backend(place)
    device, dtype = backend.device, torch.bfloat16
    if backend.kind == "cpu":
        tokens, heads = 264, 2
    q, k, v, grad = (normal((1, tokens, heads, 128), key, device, dtype) for key in ("q", "k", "v", "gradient"))
    out, lse = attention_with_lse(q, k, v)
    whole = attention_backward(grad, q, k, v, out, lse)
    errors = {}

    merged, merged_lse = torch.zeros_like(q, dtype=torch.float32), torch.full_like(lse, float("-inf"))
    dq, parts = torch.zeros_like(q, dtype=torch.float32), []
    for keys, values in zip(k.chunk(CHUNKS, 1), v.chunk(CHUNKS, 1), strict=True):
        merged, merged_lse = merge_attention(merged, merged_lse, *attention_with_lse(q, keys, values))
        step = attention_backward(grad, q, keys, values, out, lse)
        dq += step[0]
        parts.append(step[1:])
    errors["chunks merged"] = max(relative(merged, out), relative(merged_lse, lse))
    dk, dv = (torch.cat(gradients, 1) for gradients in zip(*parts, strict=True))
    errors["backward by chunks"] = max(map(relative, (dq, dk, dv), whole))

    for few in (257, 512):  # image tokens and text of cross attention
        keys, values = (normal((1, few, heads, 128), f"{key}{few}", device, dtype) for key in "kv")
        errors[f"{few} keys"] = _against_fp32(q[:, ::61], keys, values, grad[:, ::61])

    # as a view of one product for q, k, v, and with tokens inside heads
    def view(x: Any) -> Any:
        return torch.stack((x, x), 3)[..., 0, :]

    def turned(x: Any) -> Any:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    apart, heads_first = (view(q), view(k), view(v)), (turned(q), turned(k), turned(v))
    for name, inputs, given in (("stacked", apart, grad), ("heads first", heads_first, turned(grad))):
        again = attention_with_lse(*inputs)
        back = attention_backward(given, *inputs, *again)
        errors[f"strides: {name}"] = max(map(relative, (*again, *back), (out, lse, *whole)))
    wrong = {name: error for name, error in errors.items() if not error <= ATTENTION_BOUND}
    require(not wrong, f"{attention_name(device, dtype, 128, tokens)} differs: {wrong}")
    name = attention_name(device, dtype, 128, tokens)
    return found(f"{name}, {tokens:,} x {heads}: largest error {max(errors.values()):.1e}", attention=name, **errors)


def _against_fp32(q: Any, k: Any, v: Any, grad: Any) -> float:
    from accel_bench import relative

    from mm.ops.attention.api import (
        attention_backward,
        attention_with_lse,
        plain_attention_backward,
        plain_attention_with_lse,
    )

    forward = attention_with_lse(q, k, v)
    wide = q.float(), k.float(), v.float()
    plain = plain_attention_with_lse(*wide)
    back = attention_backward(grad, q, k, v, *forward), plain_attention_backward(grad.float(), *wide, *plain)
    return max(map(relative, (*forward, *back[0]), (*plain, *back[1])))


def _waits_on_device(step: Callable[[], object]) -> int:
    import torch

    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    told = [warning for warning in told if "synchronizing CUDA operation" in str(warning.message)]
    for warning in told:
        print(warnings.formatwarning(warning.message, warning.category, warning.filename, warning.lineno))
    return len(told)


def _reads_on_cpu(step: Callable[[], object]) -> int:
    sys.path.append(str(ROOT / "tests" / "train"))
    from host_reads import CountHostReads

    with CountHostReads() as counted:
        step()
    print(counted.reads)
    return len(counted.reads)


def _driver() -> str | None:
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        versions = Path("/proc/driver/nvidia/version")
        return versions.read_text().splitlines()[0] if versions.exists() else None
    return done.stdout.strip().splitlines()[0]
