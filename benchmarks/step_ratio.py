"""A training step beside diffusers' with the same weights on the CPU: `python benchmarks/step_ratio.py`.

Forward, loss and backward of the whole transformer in fp32, in one process. Outputs and gradients are compared before
anything is timed. Then the contestants take turns of a few steps, and every round gives the ratios of its own
neighbours in time, so that what slows the machine down slows both sides; medians and quartiles are over the rounds. One
thread is timed by its processor's time, which other programs do not enter; several by the clock on the wall. A further
contestant, the matrix products and the attention of our step alone, shows how far anything else could be brought down.
Only ratios are printed: times on a CPU say little about an accelerator.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "wan")]

from results import Result, Target, arguments, write  # noqa: E402  (the path above)
from test_wan_parity import ours_for, reference_for, relative_error  # noqa: E402

from mm.config.model import WanConfig  # noqa: E402
from mm.wan.block import WanBlock  # noqa: E402
from mm.wan.compile import compile_blocks, graphs_needed  # noqa: E402
from mm.wan.model import WanModel  # noqa: E402
from mm.wan.names import translate  # noqa: E402

WAN = WanConfig(text_dim=256, hidden_size=256, ffn_dim=1024, num_heads=4, num_layers=4)
SHAPES = [((4, 32, 32), 64), ((6, 32, 42), 512)]  # latent F, H, W, and text tokens: 1024 and 2016 video tokens
BOUND = 1e-5
TARGETS = {"ours": 0.95, "ours, compiled blocks": 0.88}
ATEN = torch.ops.aten
KERNELS = {
    ATEN.mm, ATEN.addmm, ATEN.bmm, ATEN.baddbmm,
    ATEN._scaled_dot_product_flash_attention_for_cpu, ATEN._scaled_dot_product_flash_attention_for_cpu_backward,
}  # fmt: skip
FLOOR = "ours, matrix products and attention alone"
THEIRS = "diffusers"

Step = Callable[[], Tensor]


class RecordKernels(TorchDispatchMode):
    """Keeps every matrix product and attention that runs inside, with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in KERNELS:
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def replay(self) -> Tensor:
        """Run them again, and nothing else."""
        with torch.no_grad():
            for func, args, kwargs in self.calls:
                func(*args, **kwargs)
        return torch.empty(0)


def step_of(model: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Step:
    """Forward, mean squared error and backward; gives the velocity."""

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        velocity = model.velocity(*inputs) if isinstance(model, WanModel) else model(*inputs).sample
        (velocity - target).square().mean().backward()
        return velocity.detach()

    return step


def compiled(model: nn.Module) -> nn.Module:
    """A copy whose blocks are compiled one by one: ours as `--compile-blocks` does, diffusers' whole."""
    model = copy.deepcopy(model)
    if isinstance(model, WanModel):
        blocks = [block for block in model.blocks.values() if isinstance(block, WanBlock)]
        compile_blocks(blocks, graphs_needed(1, pipeline=False), tensor_parallel=False)
        return model
    for block in model.get_submodule("blocks").children():
        block.compile(dynamic=False)
    return model


def contestants(latent: tuple[int, int, int], text_tokens: int) -> dict[str, Step]:
    """All steps by name, checked against diffusers'."""
    reference = reference_for(WAN)
    models = {THEIRS: reference, "ours": ours_for(reference, WAN)}
    models["ours, compiled blocks"] = compiled(models["ours"])
    models["diffusers, compiled blocks"] = compiled(reference)
    # Early: diffusers takes the angles of the timestep's sinusoid in fp32, and what they lose grows with the timestep.
    inputs = (torch.randn(1, 16, *latent), torch.tensor([50.0]), torch.randn(1, text_tokens, WAN.text_dim))
    target = torch.randn(1, 16, *latent)
    steps = {name: step_of(model, inputs, target) for name, model in models.items()}
    expected = steps[THEIRS]()
    for name, model in models.items():
        error = relative_error(steps[name](), expected)
        convention: Literal["native", "diffusers"] = "native" if isinstance(model, WanModel) else "diffusers"
        gradients = {translate(n, convention, "native"): p.grad for n, p in model.named_parameters()}
        native = {translate(n, "diffusers", "native"): p.grad for n, p in reference.named_parameters()}
        worst = max(relative_error(gradients[n], gradient) for n, gradient in native.items())
        if max(error, worst) > BOUND:
            raise SystemExit(f"{name}: output differs by {error:.1e}, a gradient by {worst:.1e}; nothing is timed")
    with RecordKernels() as kernels:
        steps["ours"]()
    return {**steps, FLOOR: kernels.replay}


def rounds(steps: dict[str, Step], count: int) -> dict[str, list[float]]:
    """Seconds of every contestant in every round, after one round that does not count.

    A turn is three steps, of which the first does not count: in training a step finds in caches and in the allocator
    what the same step before it left there, not what another model left. Each round has an order of its own.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)  # noqa: S311
    for _ in range(count + 1):
        for name in order.sample(list(steps), len(steps)):
            steps[name]()
            started = clock()
            steps[name]()
            steps[name]()
            seconds[name].append(clock() - started)
    return {name: values[1:] for name, values in seconds.items()}


def row(name: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """A line: the ratio to diffusers' step of the same round, and the ratio of both medians and both least times."""
    ratios = [ours / theirs for ours, theirs in zip(seconds[name], seconds[THEIRS], strict=True)]
    first, middle, third = statistics.quantiles(ratios, n=4)
    least = min(seconds[name]) / min(seconds[THEIRS])
    medians = statistics.median(seconds[name]) / statistics.median(seconds[THEIRS])
    return {"step": name, "/ diffusers": middle, "quartiles": f"{first:.3f} to {third:.3f}",
            "of medians": medians, "of least": least}  # fmt: skip


def profile(steps: dict[str, Step]) -> Result:
    """Where the eager steps spend their time, as shares of diffusers' step."""
    found = {}
    for name in ("ours", THEIRS):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            for _ in range(3):
                steps[name]()
        found[name] = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    whole = sum(found[THEIRS].values())
    keys = sorted(set().union(*found.values()), key=lambda key: -max(times.get(key, 0) for times in found.values()))
    rows = [{"operator": key, **{name: times.get(key, 0) / whole for name, times in found.items()}} for key in keys]
    return Result("step_ratio: share of diffusers' step", "CPU", {"profiled": "3 steps"}, rows=rows[:30])


def measure(latent: tuple[int, int, int], text_tokens: int, options: argparse.Namespace) -> Iterator[Result]:
    """One shape, with each number of threads."""
    torch.manual_seed(0)
    tokens = latent[0] * latent[1] * latent[2] // 4
    for threads in options.threads:
        torch.set_num_threads(threads)
        torch._dynamo.reset()  # compiled code is made for a number of threads
        steps = contestants(latent, text_tokens)
        seconds = rounds(steps, options.rounds)
        shapes = {"D": WAN.hidden_size, "f": WAN.ffn_dim, "heads": WAN.num_heads, "layers": WAN.num_layers,
                  "s": tokens, "text": text_tokens, "threads": threads, "rounds": options.rounds}  # fmt: skip
        rows = [row(name, seconds) for name in steps if name != THEIRS]
        by_name = {line["step"]: line["/ diffusers"] for line in rows}
        targets = [Target(f"{name} / diffusers", by_name[name], bound) for name, bound in TARGETS.items()]
        yield Result("step_ratio", "CPU", shapes, rows=rows, targets=targets)
        if options.profile:
            yield profile(steps)


def main() -> None:
    """Check, measure, print."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--rounds", type=int, default=15)
        parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
        parser.add_argument("--profile", action="store_true", help="also print what each operator costs")

    options = arguments(__doc__, add)
    results: list[Result] = []
    for result in itertools.chain.from_iterable(measure(*shape, options) for shape in SHAPES):
        result.show()
        results.append(result)
        write(results, options.json)


if __name__ == "__main__":
    main()
