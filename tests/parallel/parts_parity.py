"""Training of parts of a model twice: on a layout of ranks, and as a plain loop with the others frozen.

The plain loop is torch's AdamW over the single-device model: `requires_grad` by hand, two groups for two rates, and
nothing of mm.parallel or mm.train. What is trained is said to it as names, not as words.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from lora_parity import ALPHA, RANK, _bytes
from parity import Row, WholeTrace, compare, gather, micro_batches
from torch import Tensor

from mm.activation.host_pool import make_offloader
from mm.activation.recompute import block_runner
from mm.config.diffusion import DiffusionConfig
from mm.config.trainable import names_by_pattern, patterns_of
from mm.device.backend import Backend
from mm.diffusion.flow import FlowMatching
from mm.doctor.parity import DECAY_SAMPLES, EPSILON, SEED, SETTINGS, STEPS, RelativeErrors, value_of
from mm.doctor.plain_loss import plain_loss
from mm.lora.layer import Adapted, add_adapters, initial_adapter_value, is_adapter
from mm.lora.plan import LoRAPlan
from mm.lora.targets import linears_of, target_linears
from mm.optim.make import make_optimizer
from mm.optim.step_statistics import gather_statistics
from mm.parallel.apply import apply
from mm.parallel.mesh import Mesh, build_mesh
from mm.parallel.placement import whole_shapes
from mm.train.step import compute_gradients
from mm.train.trained_parts import TrainedModel, TrainedParts
from mm.wan.model import WanModel

Chosen = Callable[[str], float | None]
"""(native name) -> factor of the learning rate of what is trained, None of what is frozen."""


CHOICES: dict[tuple[str, ...], Chosen] = {
    ("self_attn", "ffn:0.5"): lambda name: 1.0 if ".self_attn." in name else 0.5 if ".ffn." in name else None,
    ("modulation", "norm:0.25"): lambda name: 1.0 if "modulation" in name else 0.25 if "norm" in name else None,
    ("^head.",): lambda name: 1.0 if name.startswith("head.") else None,
    ("embedding", "time_projection:0.5"): lambda name: (
        1.0 if "embedding" in name else 0.5 if "time_projection" in name else None
    ),
    ("blocks.0.", ".bias:2"): lambda name: 1.0 if "blocks.0." in name else 2.0 if name.endswith(".bias") else None,
    ("^motion_controller.",): lambda name: 1.0 if name.startswith("motion_controller.") else None,
    ("^vace_",): lambda name: 1.0 if name.startswith("vace_") else None,
    ("cross_attn.v.weight",): lambda name: 1.0 if name.endswith("cross_attn.v.weight") else None,
}
"""The words of `training.trainable`, and the same said without them."""


@dataclass(frozen=True)
class PartsRow:
    """One row: a layout, what is trained, and linears with adapters beside it."""

    row: Row
    words: tuple[str, ...]
    adapted: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        plan = self.row.recompute
        how = [f"recompute{plan.full_layers}-{plan.keep_layers}" + "-offload" * plan.offload] if plan else []
        zero = ["zero"] if self.row.zero is not None else []
        return "-".join([self.row.id, *zero, "+".join(self.words).replace(".", "_"), *how, *self.adapted])

    @property
    def plan(self) -> LoRAPlan | None:
        if not self.adapted:
            return None
        linears = linears_of(whole_shapes(self.row.wan))
        names = target_linears(list(self.adapted), linears)
        return LoRAPlan(linears, dict.fromkeys(names, Adapted(RANK, ALPHA)), None)

    @property
    def model(self) -> TrainedModel:
        shapes, patterns = whole_shapes(self.row.wan), patterns_of(self.words)
        named = names_by_pattern(patterns, shapes)
        scales = {name: one.lr_scale for one, names in zip(patterns, named, strict=True) for name in names}
        trained = {name: shape for name, shape in shapes.items() if name in scales}
        return TrainedModel(self.plan, TrainedParts(trained, {n: s for n, s in scales.items() if s != 1}, 0))


def start(name: str, shape: tuple[int, ...]) -> Tensor:
    """Initial values; B of an adapter is not zero, which would leave A without gradients."""
    if not is_adapter(name):
        return value_of(name, shape)
    if name.endswith("lora_A"):
        return initial_adapter_value(name, shape, SEED)
    return 0.2 * torch.randn(*shape, generator=torch.Generator().manual_seed(len(name) + shape[0]))


def plain_run(row: PartsRow) -> WholeTrace:
    """The reference: the row's samples one by one."""
    model, chosen = WanModel(row.row.wan), CHOICES[row.words]
    if row.plan is not None:
        add_adapters(model, row.plan.adapted)
    named, groups = {}, dict[tuple[bool, float], list[Any]]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(start(name, tuple(parameter.shape)))
            scale = 1.0 if is_adapter(name) else chosen(name)
            parameter.requires_grad_(scale is not None)
            if scale is not None:
                named[name] = parameter
                decayed = parameter.dim() > 1 and not name.endswith(".bias")
                groups.setdefault((decayed, scale), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": params, "weight_decay": 0.1 * decayed} for (decayed, _), params in groups.items()],
        lr=SETTINGS.lr, betas=(0.9, 0.95), eps=EPSILON,
    )  # fmt: skip
    return _steps(row.row, model, named, optimizer, [scale for _, scale in groups])


def _steps(
    row: Row, model: WanModel, named: dict[str, Any], optimizer: torch.optim.Optimizer, scales: list[float]
) -> WholeTrace:
    flow, trace = FlowMatching(DiffusionConfig()), WholeTrace()
    for step in range(STEPS):
        done = min(step * row.case.samples / DECAY_SAMPLES, 1.0)
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            group["lr"] = scale * (SETTINGS.lr - (SETTINGS.lr - SETTINGS.min_lr) * done)
        optimizer.zero_grad()
        losses = []
        for sample in row.case.global_batch(step):
            losses.append(plain_loss(model, flow, sample, SEED, torch.device("cpu")) / row.case.samples)
            losses[-1].backward()
        trace.losses.append(float(torch.stack([loss.detach() for loss in losses]).double().sum()))
        trace.gradients.append({name: p.grad.clone() for name, p in named.items()})
        trace.norms.append(float(torch.nn.utils.clip_grad_norm_(named.values(), SETTINGS.clip_grad)))
        optimizer.step()
    trace.weights = {name: p.detach().clone() for name, p in named.items()}
    return trace


def parallel_run(parts: PartsRow, mesh: Mesh, backend: Backend) -> WholeTrace:
    """The same on a layout; what is frozen keeps every bit and has neither gradient nor state."""
    row = parts.row
    offloader = make_offloader(row.recompute, row.wan, mesh, backend, row.case.step_shape)
    parallel = apply(
        row.wan, mesh, backend, row.options, torch.float32, start, zero=row.zero,
        run_blocks=block_runner(row.recompute, offloader, backend.model_code), extension=parts.model.extension(),
    )  # fmt: skip
    frozen = {name: _bytes(p) for name, p in parallel.all_parameters().items() if not p.requires_grad}
    optimizer = make_optimizer(parallel, SETTINGS)
    assert {shard.name for shard in optimizer.shards}.isdisjoint(frozen)
    assert {shard.name for shard in optimizer.frozen} == frozen.keys()
    flow, trace = FlowMatching(DiffusionConfig()), WholeTrace()
    for step in range(STEPS):
        mine = micro_batches(row, row.case.global_batch(step), mesh)
        losses = compute_gradients(parallel, flow, mine, SEED, row.case.counts)
        optimizer.reduce_gradients()
        trace.gradients.append(gather(optimizer, "gradient"))
        statistics = gather_statistics(parallel, optimizer, losses, samples=row.case.samples)
        trace.losses.append(statistics.loss)
        trace.norms.append(statistics.grad_norm)
        optimizer.update(statistics.grad_norm, row.case.samples)
    trace.weights = gather(optimizer, "master")
    for name, parameter in parallel.all_parameters().items():
        if name in frozen:
            assert parameter.grad is None and not hasattr(parameter, "main_grad"), name
            assert torch.equal(_bytes(parameter), frozen[name]), f"{name} changed"
    return trace


def run_rows(rows: list[PartsRow], backend: Backend) -> dict[str, RelativeErrors]:
    """Every row on the ranks of one job; the results are rank 0's."""
    references: dict[Any, WholeTrace] = {}
    results = {}
    for row in rows:
        with build_mesh(row.row.layout, 2, "cpu") as mesh:
            trace = parallel_run(row, mesh, backend)
        if dist.get_rank() == 0:
            reference = row.row.reference, row.words, row.adapted
            if reference not in references:
                references[reference] = plain_run(row)
            results[row.id] = compare(trace, references[reference])
    return results
