"""One training run twice: on a layout of ranks, and as a plain PyTorch loop on one process.

Both see the same samples, noise and initial weights. The plain loop uses no part of mm.parallel: torch's AdamW and
clipping, the single-device model, whole samples.
"""

import math
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist

from mm.config.diffusion import DiffusionConfig
from mm.config.layerzero import ZeroConfig
from mm.config.layout import Layout
from mm.config.model import ModelType, WanConfig
from mm.config.recompute import Recompute
from mm.data.loader import FeatureBatch
from mm.device.backend import Backend
from mm.diffusion.flow import FlowMatching
from mm.parallel.apply import DataParallelOptions, ParallelModel, apply
from mm.parallel.host_pool import StepShape, make_offloader
from mm.parallel.mesh import Mesh, build_mesh
from mm.parallel.optimizer import AdamWSettings, Optimizer
from mm.parallel.optimizers import make_optimizer
from mm.parallel.outcome import agree
from mm.parallel.recompute import block_runner
from mm.train.step import compute_gradients
from mm.wan.initial import initial_value
from mm.wan.model import WanModel
from mm.wan.patches import token_grid

# 12 heads divide by 2, 3, 4 and 6; heads of width 8 have rotary pairs on all three axes.
WAN = WanConfig(text_dim=16, text_len=8, hidden_size=96, ffn_dim=192, num_heads=12, num_layers=3, freq_dim=32)
IMAGES = {"in_dim": 36, "img_dim": 24, "clip_token_len": 5}
"""What a model with images has besides: five tokens an image do not divide by the ranks."""
SEED, STEPS, GLOBAL_BATCH = 5, 2, 4
SETTINGS = AdamWSettings(
    lr=1e-2, min_lr=1e-3, lr_decay_style="linear", lr_warmup_init=0.0, warmup_samples=0,
    decay_samples=STEPS * GLOBAL_BATCH, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, clip_grad=0.3,
    # AdamW divides a gradient by its own size. A small epsilon would turn the rounding of near-zero gradients into
    # steps as large as any, and the later steps would compare noise.
    adam_eps=1e-2,
)  # fmt: skip

EVEN, ODD, MIXED = "even", "odd", "mixed"
SIZES = {EVEN: [(2, 6, 8)], ODD: [(3, 6, 10)], MIXED: [(3, 6, 10), (1, 2, 14)]}
"""Latent sizes of the samples: 24, 45 and 7 tokens. 24 divides by 2, 3, 4, 6 and 8; the others leave padding."""


@dataclass(frozen=True)
class Row:
    """One row of the parity matrix."""

    layout: Layout
    options: DataParallelOptions = field(default_factory=DataParallelOptions)
    zero: ZeroConfig | None = None
    samples: str = ODD
    micro_batch_size: int = 1
    recompute: Recompute | None = None
    model_type: ModelType = "t2v"
    compiled: bool = False

    @property
    def wan(self) -> WanConfig:
        """`WAN` with as many blocks as the stages have, and the row's images."""
        num_layers = sum(chain(*self.layout.stages)) or WAN.num_layers
        images = {} if self.model_type == "t2v" else {"model_type": self.model_type, **IMAGES}
        return WAN.model_copy(update={"num_layers": num_layers, **images})

    @property
    def most_tokens(self) -> int:
        return max(math.prod(token_grid(size, self.wan.patch_size)) for size in SIZES[self.samples])

    @property
    def id(self) -> str:
        parts = [self.layout.name()]
        if self.model_type != "t2v":
            parts.append(self.model_type)
        if self.options.use_distributed_optimizer:
            parts.append("distopt")
        if self.options.overlap_grad_reduce or self.options.overlap_param_gather:
            parts.append("overlap")
        if self.micro_batch_size > 1:
            parts.append(f"mbs{self.micro_batch_size}")
        accumulated = GLOBAL_BATCH // (self.micro_batch_size * self.layout.dp_size)
        return "-".join([*parts, f"acc{accumulated}", self.samples])


IMAGE_EMBEDDING = ("img_emb.proj.0.weight", "img_emb.proj.4.weight", "img_emb.emb_pos")


def value_of(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Initial weights with no gradient near zero, which would compare rounding with rounding.

    Wan starts its head and biases at zero, norms at one and the embedders small: the head's zeros would stop every
    gradient, and nearly equal keys make softmax blind to them.
    """
    value = initial_value(name, shape, SEED)
    if name.startswith(("text_embedding.", "time_embedding.")) and name.endswith("weight"):
        return 10 * value
    if name.endswith("bias") or "norm" in name or name == "head.head.weight" or name in IMAGE_EMBEDDING:
        return value + 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(len(name) + shape[0]))
    return value


def global_batch(kind: str, step: int, wan: WanConfig = WAN) -> list[FeatureBatch]:
    """The samples of one step, one a micro-batch."""
    source = torch.Generator().manual_seed(step)
    sizes = SIZES[kind]
    samples = []
    for index in range(GLOBAL_BATCH):
        size = sizes[index % len(sizes)]
        sample = FeatureBatch(
            latents=torch.randn(1, 16, *size, generator=source),
            text=torch.randn(1, 8, 16, generator=source),
            sample=[f"clip {index}"],
            draw=[step],
        )
        if wan.image_tokens:
            sample["image_features"] = torch.randn(1, wan.image_tokens, wan.image_dim, generator=source)
            sample["condition"] = torch.randn(1, wan.condition_channels, *size, generator=source)
        samples.append(sample)
    return samples


def merge(samples: list[FeatureBatch]) -> FeatureBatch:
    merged = FeatureBatch(
        latents=torch.cat([s["latents"] for s in samples]),
        text=torch.cat([s["text"] for s in samples]),
        sample=[name for s in samples for name in s["sample"]],
        draw=[draw for s in samples for draw in s["draw"]],
    )
    if "condition" in samples[0]:
        merged["image_features"] = torch.cat([s["image_features"] for s in samples])
        merged["condition"] = torch.cat([s["condition"] for s in samples])
    return merged


@dataclass
class Trace:
    """What a run shows after each step: loss, reported gradient norm, whole gradients; and the weights at the end."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def plain_run(kind: str, wan: WanConfig) -> Trace:
    """The reference."""
    model = WanModel(wan)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(value_of(name, tuple(parameter.shape)))
    flow = FlowMatching(DiffusionConfig())
    named = dict(model.named_parameters())
    decayed = [p for n, p in named.items() if p.dim() > 1 and not n.endswith(".bias")]
    others = [p for n, p in named.items() if p.dim() == 1 or n.endswith(".bias")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=SETTINGS.lr, betas=(0.9, 0.95), eps=SETTINGS.adam_eps)
    trace = Trace()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = SETTINGS.lr - (SETTINGS.lr - SETTINGS.min_lr) * step / STEPS
        optimizer.zero_grad()
        losses = []
        for sample in global_batch(kind, step, wan):
            sigma, timestep, weight = flow.draw_timesteps(SEED, sample["sample"], sample["draw"])
            noise = flow.draw_noise(SEED, sample["sample"], sample["draw"], sample["latents"].shape[1:])
            noisy = flow.noisy(sample["latents"], noise, sigma)
            velocity = model(noisy, timestep, sample["text"], sample.get("image_features"), sample.get("condition"))
            difference = velocity - (noise - sample["latents"])
            losses.append((difference.square().mean() * weight[0]) / GLOBAL_BATCH)
            losses[-1].backward()
        trace.losses.append(float(torch.stack([loss.detach() for loss in losses]).double().sum()))
        trace.gradients.append({name: p.grad.clone() for name, p in named.items()})
        trace.norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.clip_grad)))
        optimizer.step()
    trace.weights = {name: p.detach().clone() for name, p in named.items()}
    return trace


def parallel_run(row: Row, mesh: Mesh, backend: Backend) -> Trace:
    """The same on a layout; gradients and weights are gathered from the ranks that own them."""
    accumulated = GLOBAL_BATCH // (row.micro_batch_size * row.layout.dp_size)
    shape = StepShape(row.micro_batch_size, row.most_tokens, accumulated, torch.float32)
    offloader = make_offloader(row.recompute, row.wan, mesh, backend, shape)
    runner = block_runner(row.recompute, offloader, backend.model_code)
    sizes = len(SIZES[row.samples]) if row.compiled else None
    parallel = apply(row.wan, mesh, backend, row.options, torch.float32, value_of, row.zero, runner, sizes)
    optimizer = make_optimizer(parallel, SETTINGS)
    flow = FlowMatching(DiffusionConfig())
    trace = Trace()
    for step in range(STEPS):
        mine = micro_batches(row, global_batch(row.samples, step, row.wan), mesh)
        losses = compute_gradients(parallel, flow, mine, SEED)
        optimizer.reduce_gradients()
        trace.gradients.append(gather(parallel, optimizer, "gradient"))
        outcome = agree(parallel, optimizer, losses)
        trace.losses.append(outcome.loss)
        trace.norms.append(outcome.grad_norm)
        optimizer.update(outcome.grad_norm, GLOBAL_BATCH)
    trace.weights = gather(parallel, optimizer, "master")
    return trace


def micro_batches(row: Row, samples: list[FeatureBatch], mesh: Mesh) -> list[FeatureBatch]:
    mine, size = samples[mesh.dp_rank :: row.layout.dp_size], row.micro_batch_size
    return [merge(mine[start : start + size]) for start in range(0, len(mine), size)]


def gather(parallel: ParallelModel, optimizer: Optimizer, what: str) -> dict[str, torch.Tensor]:
    """Whole tensors out of the owned ranges of all ranks, on rank 0. Every element must come exactly once."""
    del parallel
    mine = [
        (s.name, s.placement, s.start, getattr(s, what).detach().clone())
        for s in optimizer.shards
        if s.owned and s.start < s.stop
    ]
    everyone: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, everyone)
    whole: dict[str, torch.Tensor] = {}
    for name, placement, start, values in (piece for rank in everyone or [] for piece in rank):
        target = whole.setdefault(name, torch.full(placement.global_shape, float("nan")))
        local = placement.of(target).clone().view(-1)
        assert torch.isnan(local[start : start + len(values)]).all(), f"{name}: elements owned twice"
        local[start : start + len(values)] = values
        placement.of(target).copy_(local.view(placement.shape))
    for name, value in whole.items():
        assert not torch.isnan(value).any(), f"{name}: elements that nobody owns"
    return whole


@dataclass(frozen=True)
class Errors:
    """Largest relative errors of a run; of gradients and weights with the parameter."""

    loss: float
    gradient: float
    worst_gradient: str
    norm: float
    weight: float
    worst_weight: str


def compare(run: Trace, reference: Trace) -> Errors:
    gradient, worst_gradient = max(worst(r, p) for r, p in zip(run.gradients, reference.gradients, strict=True))
    weight, worst_weight = worst(run.weights, reference.weights)
    gathered = [
        float(torch.stack([g.double().square().sum() for g in step.values()]).sum().sqrt()) for step in run.gradients
    ]
    return Errors(
        loss=max(abs(a - b) / abs(b) for a, b in zip(run.losses, reference.losses, strict=True)),
        gradient=gradient,
        worst_gradient=worst_gradient,
        norm=max(
            max(abs(a - b) / b, abs(a - c) / c) for a, b, c in zip(run.norms, gathered, reference.norms, strict=True)
        ),
        weight=weight,
        worst_weight=worst_weight,
    )


def over_limits(row: Row, errors: Errors) -> dict[str, str]:
    """The measures in which a run differs from one process by more than rounding, with what they found.

    The loss within 1e-6 (1e-5 where ring or tensor parallelism adds up in another order), every named gradient and
    weight within 1e-5 of its largest element, the norm within 1e-5 of that of the gathered gradients.
    """
    reordered = row.layout.tp_size > 1 or row.layout.ring_size > 1
    found = {
        "loss": (errors.loss, 1e-5 if reordered else 1e-6, ""),
        "gradient": (errors.gradient, 1e-5, f" of {errors.worst_gradient}"),
        "norm": (errors.norm, 1e-5, ""),
        "weight": (errors.weight, 1e-5, f" of {errors.worst_weight}"),
    }
    return {measure: f"{error:.1e}{where}" for measure, (error, limit, where) in found.items() if not error <= limit}


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    """max |a - b| / max |b| over the parameters, and the parameter."""
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    return max((float((found[n] - e).abs().max() / e.abs().max().clamp_min(1e-8)), n) for n, e in expected.items())


def run_rows(rows: list[Row], backend: Backend) -> dict[str, Errors]:
    """Every row on the ranks of one job; the results are rank 0's."""
    references = {}
    results = {}
    for row in rows:
        with build_mesh(row.layout, 2, "cpu") as mesh:
            trace = parallel_run(row, mesh, backend)
        if dist.get_rank() == 0:
            reference = row.samples, row.model_type, row.wan.num_layers
            if reference not in references:
                references[reference] = plain_run(row.samples, row.wan)
            results[row.id] = compare(trace, references[reference])
    return results
