"""A limit of the gradient norm that changes: on every layout the weights are those of torch's clipping and AdamW."""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from parity import GLOBAL_BATCH, Row, gather
from ranks import run_ranks

from mm.config.layerzero import ZeroConfig
from mm.config.layout import Layout, even_stages
from mm.config.place import process_place
from mm.device.backend import select
from mm.doctor import parity
from mm.parallel.apply import DataParallelOptions
from mm.parallel.mesh import build_mesh
from mm.supervise.job import Job

LIMIT, RATIO = 0.02, 3.0
SETTINGS = replace(
    parity.SETTINGS, clip_grad=LIMIT, initial_clip_ratio=RATIO, abnormal_clip_samples=GLOBAL_BATCH - 1, weight_decay=0.0
)
"""Of two steps the first is inside of the samples that the limit takes to settle, and the second behind them."""
PLAIN, SHARDED = DataParallelOptions(), DataParallelOptions(use_distributed_optimizer=True)


def layout(**degrees: Any) -> Layout:
    return Layout(world_size=2, **degrees)


ROWS = [
    Row(layout(), SHARDED),
    Row(layout(tp_size=2, sequence_parallel=True)),
    Row(layout(pp_size=2, stages=even_stages(4, 2, 1))),
    Row(layout(zero3_size=2), PLAIN, ZeroConfig(zero3_size=2)),
]


def by_torch(trace: parity.Trace[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights after the steps, of a run's gradients: each clipped by torch to the limit that the rule has for it."""
    shapes = {name: tuple(gradient.shape) for name, gradient in trace.gradients[0].items()}
    weights = {name: torch.nn.Parameter(parity.value_of(name, shape)) for name, shape in shapes.items()}
    theirs = torch.optim.AdamW(weights.values(), lr=1e-2, betas=(0.9, 0.95), eps=parity.EPSILON, weight_decay=0.0)
    for step, gradients in enumerate(trace.gradients):
        theirs.param_groups[0]["lr"] = 1e-2 - (1e-2 - 1e-3) * step * GLOBAL_BATCH / parity.DECAY_SAMPLES
        for name, gradient in gradients.items():
            weights[name].grad = gradient.clone()
        norm = float(torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt())
        assert norm > 20 * LIMIT, "the second step is far out, and the first one above its limit"
        torch.nn.utils.clip_grad_norm_(weights.values(), RATIO * LIMIT if step == 0 else LIMIT / 10)
        theirs.step()
    return {name: weight.detach() for name, weight in weights.items()}


def worst_of_rows() -> list[float]:
    backend, found = select("cpu"), []
    with Job(process_place(), "gloo", torch.device("cpu"), 2):
        for row in ROWS:
            with build_mesh(row.layout, 2, "cpu") as mesh:
                trace = parity.run_on_the_mesh(row.case, mesh, backend, gather, settings=SETTINGS)
            if dist.get_rank() == 0:
                expected = by_torch(trace)
                found.append(max(float((trace.weights[name] - value).abs().max()) for name, value in expected.items()))
    return found


def test_weights_are_those_of_torch_s_clipping() -> None:
    found = run_ranks(2, worst_of_rows, timeout_s=300)[0]
    assert len(found) == len(ROWS)
    assert max(found) < 1e-7, found  # of weights that move by more than 1e-4
