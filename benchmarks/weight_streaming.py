"""Weights that are copied ahead of the computation: `python benchmarks/weight_streaming.py`.

Bytes that each forward copies and that lie on the device, for all weights there, half and none of the blocks, and fp8,
beside the plan's formulas; the baseline copies each linear and norm when it is called, from plain memory, and drops it.
On an accelerator also the time of a forward, as a ratio of that with all weights on the device, of blocks of 14B at
480x832x81; `--blocks` changes their number. On the CPU shapes are tiny, and there are no times.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from results import Result, Target, arguments, publish
from torch import Tensor, nn

from mm.config.model import WAN_14B, WanConfig
from mm.device.backend import Backend, select
from mm.generate.weights import Fp8
from mm.lora.low_bit import quantised
from mm.lora.targets import linears_of
from mm.residency.hold import HeldWeights, WeightValues, block_sizes, hold_weights
from mm.residency.plan import WeightPlan, evenly
from mm.wan.model import WanModel, whole_shapes

TINY = WanConfig(text_dim=8, text_len=4, hidden_size=32, ffn_dim=48, num_heads=4, num_layers=8, freq_dim=16)
WARM_UP, REPETITIONS = 2, 5


def value_of(name: str) -> Tensor:
    """Small numbers, the same for each name's shape: only sizes matter."""
    return torch.full(SHAPES[name], 0.01)


SHAPES: dict[str, tuple[int, ...]] = {}


def held(wan: WanConfig, backend: Backend, num_copied: int, fp8: bool) -> tuple[WanModel, HeldWeights]:
    """A model of which so many blocks are copied."""
    with torch.device("meta"):
        model = WanModel(wan)
    model.to_precision(torch.bfloat16).requires_grad_(False)
    linears = linears_of(whole_shapes(wan))
    if fp8:
        Fp8("scaled", linears).prepare(model)
    read = quantised(value_of, linears, "fp8") if fp8 else value_of

    def write(name: str, target: Tensor) -> None:
        target.copy_(read(name))

    plan = WeightPlan(evenly(len(block_sizes(model)), num_copied))
    return model, hold_weights(model, plan, backend, WeightValues(write, write))


class OneByOne:
    """The baseline: each layer's weights come when it is called, in the order of its work, and go behind it."""

    def __init__(self, model: WanModel, device: torch.device) -> None:
        self.copied = 0
        for block in model.blocks_in_order():
            for layer in block.modules():
                own = dict(layer.named_parameters(recurse=False))
                if own:
                    waiting = {name: parameter.detach().cpu() for name, parameter in own.items()}
                    layer.register_forward_pre_hook(partial(self._come, waiting, device))
                    layer.register_forward_hook(partial(self._go, waiting))

    def _come(self, waiting: dict[str, Tensor], device: torch.device, layer: nn.Module, _: Any) -> None:
        for name, value in waiting.items():
            self.copied += value.nbytes
            layer._parameters[name] = nn.Parameter(value.to(device, copy=True), requires_grad=False)

    def _go(self, waiting: dict[str, Tensor], layer: nn.Module, *_: Any) -> None:
        for name, value in waiting.items():
            layer._parameters[name] = nn.Parameter(value, requires_grad=False)


def inputs(wan: WanConfig, frames: int, height: int, width: int, device: torch.device) -> dict[str, Tensor]:
    """One sample."""
    return {
        "latents": torch.zeros(1, wan.noise_channels, frames, height, width, device=device),
        "timestep": torch.full((1,), 500.0, device=device),
        "text": torch.zeros(1, wan.text_len, wan.text_dim, device=device),
    }


def seconds(run: Callable[[], object], backend: Backend) -> float | None:
    """Median of one forward; None on the CPU, where it runs once."""
    if backend.kind == "cpu":
        run()
        return None
    found = []
    for repetition in range(WARM_UP + REPETITIONS):
        backend.synchronize()
        start = time.perf_counter()
        run()
        backend.synchronize()
        found += [time.perf_counter() - start] if repetition >= WARM_UP else []
    return statistics.median(found)


def main() -> None:
    """Count, time, print."""
    options = arguments(__doc__, _add)
    backend = select(None)
    on_cpu = backend.kind == "cpu"
    wan = TINY if on_cpu else WanConfig.model_validate({**WAN_14B.model_dump(), "num_layers": options.blocks})
    SHAPES.update(whole_shapes(wan))
    size = (2, 6, 8) if on_cpu else (21, 60, 104)
    given, count = inputs(wan, *size, backend.device), wan.num_layers
    result = Result("weight_streaming", backend.name(), {"blocks": count, "latents": size, "dtype": "bf16"})
    resident: float | None = None
    for name, copied, fp8 in (
        ("all on the device", 0, False),
        ("half copied", count // 2, False),
        ("all copied", count, False),
        ("fp8, all on the device", 0, True),
        ("fp8, all copied", count, True),
    ):
        model, weights = held(wan, backend, copied, fp8)
        with torch.no_grad():
            taken = seconds(lambda model=model: model.velocity(**given), backend)  # type: ignore[misc]
        resident = taken if resident is None else resident
        row: dict[str, Any] = {"weights": name, "MB on the device": weights.device_bytes / 1e6}
        formula = weights.plan.copied_bytes(weights.blocks)
        row["MB copied in a forward"] = formula / 1e6
        if weights.stream is not None:
            sizes = [weights.blocks[number].num_bytes for number in weights.plan.copied]
            total = sum(sizes[number] * times for number, times in weights.stream.copies.items())
            forwards = 1 if on_cpu else WARM_UP + REPETITIONS
            found = (total - sizes[0] - sizes[1]) / forwards  # two are copied ahead of the first forward
            result.targets.append(Target(f"{name}: MB copied by the formula", found / formula, 1.0))
        if taken is not None and resident is not None:
            row["time by that of all on the device"] = taken / resident
        result.rows.append(row)
        del model, weights
    result.rows.append(_baseline(wan, backend, given, resident))
    publish([result], options.json)


def _baseline(wan: WanConfig, backend: Backend, given: dict[str, Tensor], resident: float | None) -> dict[str, Any]:
    model, weights = held(wan, backend, 0, fp8=False)
    baseline = OneByOne(model, backend.device)
    with torch.no_grad():
        taken = seconds(lambda: model.velocity(**given), backend)
    forwards = 1 if taken is None else WARM_UP + REPETITIONS
    row: dict[str, Any] = {
        "weights": "layer by layer, synchronously",
        "MB copied in a forward": baseline.copied / forwards / 1e6,
    }
    row["MB on the device"] = weights.other_bytes / 1e6
    if taken is not None and resident is not None:
        row["time by that of all on the device"] = taken / resident
    return row


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--blocks", type=int, default=8, help="of 14B, on an accelerator")


if __name__ == "__main__":
    main()
