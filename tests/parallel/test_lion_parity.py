"""Lion against the package lion-pytorch: the arithmetic bit for bit, and on every layout with that layout's gradients.

That the gradients are those of one process is what the parity matrix proves. A direction is a sign, so that rounding of
a gradient near zero would be as large a step as any other: the package therefore gets the gradients of the layout.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity import GLOBAL_BATCH, SIZES, Row, gather
from ranks import run_ranks

from mm.config.layerzero import ZeroConfig
from mm.config.layout import Layout, even_stages
from mm.config.place import process_place
from mm.device.backend import select
from mm.doctor import parity
from mm.doctor.dry_run import DryRunJob, dry_run
from mm.optim.algorithms.make import ALGORITHMS
from mm.optim.optimizer import Optimizer
from mm.parallel.apply import DataParallelOptions
from mm.parallel.layerzero import is_replicated
from mm.parallel.mesh import build_mesh
from mm.parallel.placement import whole_shapes
from mm.supervise.job import Job
from mm.wan.precision import keep_fp32

lion_pytorch = pytest.importorskip("lion_pytorch")

SETTINGS = replace(parity.SETTINGS, optimizer="lion", adam_beta1=0.9, adam_beta2=0.6, adam_eps=None)
"""beta2 is such that the average of the first gradient decides some directions of the second step."""
DISTRIBUTED = DataParallelOptions(use_distributed_optimizer=True)
OVERLAPPED = replace(DISTRIBUTED, overlap_grad_reduce=True, overlap_param_gather=True)


def layout(**degrees: Any) -> Layout:
    stages = even_stages(4, degrees["pp_size"], degrees.get("vp_size", 1)) if "pp_size" in degrees else ()
    return Layout(world_size=4, **degrees, **({"stages": stages} if stages else {}))


def zero(size: int, options: DataParallelOptions, **degrees: Any) -> Row:
    return Row(layout(zero3_size=size, **degrees), options, ZeroConfig(zero3_size=size))


ROWS = [
    Row(layout()),
    Row(layout(), OVERLAPPED),
    Row(layout(tp_size=2, sequence_parallel=True, pp_size=2)),
    Row(layout(pp_size=2, vp_size=2), DISTRIBUTED),
    Row(layout(cp_size=2, ulysses_size=2, tp_size=2), DISTRIBUTED),
    zero(2, DataParallelOptions()),
    zero(2, DISTRIBUTED),
    zero(2, DataParallelOptions(), pp_size=2),
]


def with_state(optimizer: Optimizer, what: str) -> dict[str, torch.Tensor]:
    """`gather`, and with the weights at the end what the optimizer keeps."""
    found = gather(optimizer, what)
    if what == "master":
        kept = [shard.state() for shard in optimizer.shards]
        assert all(state.keys() == {"exp_avg"} for state in kept)
        for shard, state in zip(optimizer.shards, kept, strict=True):
            object.__setattr__(shard, "average", state["exp_avg"])
        found |= {f"average of {name}": value for name, value in gather(optimizer, "average").items()}
    return found


def by_the_package(trace: parity.Trace[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights and averages after the run's steps, from its gradients and the clipped norm it reported."""
    names = list(trace.gradients[0])
    weights = {name: torch.nn.Parameter(parity.value_of(name, tuple(trace.gradients[0][name].shape))) for name in names}
    decayed = [weights[name] for name in names if weights[name].dim() > 1 and not name.endswith(".bias")]
    others = [weights[name] for name in names if weights[name].dim() == 1 or name.endswith(".bias")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    theirs = lion_pytorch.Lion(groups, lr=1e-2, betas=(0.9, 0.6))
    for step, gradients in enumerate(trace.gradients):
        for group in theirs.param_groups:
            group["lr"] = 1e-2 - (1e-2 - 1e-3) * step * GLOBAL_BATCH / parity.DECAY_SAMPLES
        for name, gradient in gradients.items():
            weights[name].grad = gradient * min(1.0, SETTINGS.clip_grad / (trace.norms[step] + 1e-6))
        theirs.step()
    averages = {f"average of {name}": theirs.state[weight]["exp_avg"] for name, weight in weights.items()}
    return {name: weight.detach() for name, weight in weights.items()} | averages


def worst_of_rows() -> dict[str, tuple[float, float]]:
    """By row on rank 0: the largest difference from the package, and how far the weights have moved."""
    backend, found = select("cpu"), {}
    with Job(process_place(), "gloo", torch.device("cpu"), 2):
        for row in ROWS:
            with build_mesh(row.layout, 2, "cpu") as mesh:
                trace = parity.run_on_the_mesh(row.case, mesh, backend, with_state, settings=SETTINGS)
            if dist.get_rank() == 0:
                expected = by_the_package(trace)
                assert trace.weights.keys() == expected.keys()
                moved = trace.weights["blocks.0.ffn.0.weight"] - parity.value_of(
                    "blocks.0.ffn.0.weight", tuple(expected["blocks.0.ffn.0.weight"].shape)
                )
                difference = max(float((trace.weights[name] - value).abs().max()) for name, value in expected.items())
                found[row.id] = difference, float(moved.abs().max())
    return found


def test_every_layout_updates_as_the_package_does() -> None:
    assert SIZES  # the rows' samples
    found = run_ranks(4, worst_of_rows, timeout_s=300)[0]
    assert len(found) == len(ROWS)
    for row, (difference, moved) in found.items():
        assert difference <= 1e-7, row  # of weights of about one, which a wrong direction moves by 2e-3 or more
        assert moved > 1e-2, row


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_arithmetic_is_the_package_s(decay: float) -> None:
    """Bit for bit, over five updates with gradients that turn around, in tensors of several shapes."""
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=draw) for shape in [(7,), (33, 5), (3, 1, 2)]]
    ours, theirs = ([torch.nn.Parameter(value.clone()) for value in start] for _ in range(2))
    settings = replace(SETTINGS, lr=3e-4, weight_decay=decay, adam_beta2=0.99)
    one = ALGORITHMS["lion"].make([{"params": ours, "weight_decay": decay}], settings)
    other = lion_pytorch.Lion(theirs, lr=3e-4, betas=(0.9, 0.99), weight_decay=decay)
    for _ in range(5):
        for mine, its in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=draw)
            its.grad = mine.grad.clone()
        one.step()
        other.step()
        assert all(torch.equal(mine, its) for mine, its in zip(ours, theirs, strict=True))
    assert all(
        torch.equal(one.state[m]["exp_avg"], other.state[t]["exp_avg"]) for m, t in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row", [ROWS[0], ROWS[1], ROWS[5]], ids=lambda row: f"{row.id}-{row.zero}")
@pytest.mark.nightly
def test_a_dry_run_counts_four_bytes_an_element(row: Row, dtype: torch.dtype) -> None:
    """Where AdamW keeps eight, beside the same masters: those of what the model has in bf16."""
    counted = {}
    for name in ("adamw", "lion"):
        job = DryRunJob(row.wan, row.layout, row.options, row.zero, dtype, (3, 6, 10), 1, 1, optimizer=name)
        counted[name] = [dry_run(job, rank) for rank in range(4)]
    sizes = {name: math.prod(shape) for name, shape in whole_shapes(row.wan).items()}
    if row.zero is not None:  # two groups of two shards, and what is whole on all four
        elements, masters = sum(sizes[n] * (4 if is_replicated(n, row.zero) else 2) for n in sizes), 0
    else:
        copies = 1 if row.options.use_distributed_optimizer else 4
        elements = copies * sum(sizes.values())
        low = sum(size for name, size in sizes.items() if not keep_fp32(name))
        masters = 4 * copies * low if dtype == torch.bfloat16 else 0
    padding = 4 * 4 * 64 * len(sizes)  # in megatron-core's buffers every parameter begins at a multiple of 64 elements
    for name, each in (("adamw", 8), ("lion", 4)):
        found = sum(report.optimizer_bytes for report in counted[name])
        assert found == pytest.approx(each * elements + masters, abs=padding), name
