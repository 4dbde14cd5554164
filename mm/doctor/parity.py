"""One small training run twice: on a layout of ranks, and as a plain PyTorch loop on one device.

Both see the same samples, noise and initial weights. The plain loop uses no part of `mm.parallel`: torch's AdamW and
clipping, the single-device model, whole samples. Everything is fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from mm.activation.host_pool import StepShape, make_offloader
from mm.activation.recompute import block_runner
from mm.checkpoint.comm import Comm
from mm.config.diffusion import DiffusionConfig
from mm.config.layerzero import ZeroConfig
from mm.config.layout import Layout
from mm.config.model import WanConfig
from mm.config.recompute import Recompute
from mm.data.loader import FeatureBatch
from mm.data.packed import MicroBatch, pack
from mm.device.backend import Backend
from mm.diffusion.flow import FlowMatching
from mm.doctor.plain_loss import plain_loss
from mm.ops.attention.segments import consecutive
from mm.optim.make import make_optimizer
from mm.optim.optimizer import Optimizer
from mm.optim.settings import UpdateSettings
from mm.optim.step_statistics import gather_statistics
from mm.parallel.apply import DataParallelOptions, apply
from mm.parallel.mesh import Mesh
from mm.parallel.placement import Placement
from mm.train.step import SampleCounts, compute_gradients
from mm.wan.initial import initial_value
from mm.wan.model import WanModel

SEED, STEPS, DECAY_SAMPLES, EPSILON = 5, 2, 8, 1e-2
SETTINGS = UpdateSettings(
    lr=1e-2,
    min_lr=1e-3,
    lr_decay_style="linear",
    lr_warmup_init=0.0,
    warmup_samples=0,
    decay_samples=DECAY_SAMPLES,
    weight_decay=0.1,
    adam_beta1=0.9,
    adam_beta2=0.95,
    clip_grad=0.3,
    # AdamW divides a gradient by its own size. A small epsilon would turn the rounding of near-zero gradients into
    # steps as large as any, and the later steps would compare noise.
    adam_eps=EPSILON,
)

SMALL: dict[str, Any] = {"img_dim": 24, "clip_token_len": 5, "vace_layers": (0, 2)}
"""Of the sizes that models of some tasks alone have. Five tokens of an image do not divide by the ranks."""

Size = tuple[int, int, int]
Values = TypeVar("Values")


@dataclass(frozen=True)
class GradientPiece:
    """A range of one parameter that this rank owns: the elements from `start` of its part, as one row of numbers."""

    placement: Placement
    start: int
    values: Tensor


@dataclass
class Trace(Generic[Values]):
    """Record of a run: after each step loss, reported gradient norm, gradients by name; and the weights at the end."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, Values]] = field(default_factory=list)
    weights: dict[str, Values] = field(default_factory=dict)


@dataclass(frozen=True)
class RelativeErrors:
    """Largest relative errors of a run; of gradients and weights with the parameter."""

    loss: float
    gradient: float
    worst_gradient: str
    norm: float
    weight: float
    worst_weight: str


@dataclass(frozen=True)
class Case:
    """Run whose layout is compared with one device.

    Attributes:
        wan, layout, options, zero: as for `mm.parallel.apply.apply`. recompute: as for `mm.activation.recompute`.
        sizes: of latents, F H W; the samples take turns. One size where micro-batches have several samples.
        micro_batch_size: samples in a forward. micro_batches: of one replica in a step.
        packs: numbers of samples that share a sequence, of each micro-batch of each replica; empty where every sample
            has its own. The captions of such samples have different lengths. They take the place of the two sizes.
        objective: of the training.
    """

    wan: WanConfig
    layout: Layout
    options: DataParallelOptions
    zero: ZeroConfig | None
    recompute: Recompute | None
    sizes: tuple[Size, ...]
    micro_batch_size: int
    micro_batches: int
    packs: tuple[tuple[int, ...], ...] = ()
    objective: DiffusionConfig = field(default_factory=DiffusionConfig)

    @property
    def samples(self) -> int:
        """Number of samples of a step, in all replicas."""
        if self.packs:
            return sum(map(sum, self.packs))
        return self.micro_batch_size * self.micro_batches * self.layout.dp_size

    @property
    def most_tokens(self) -> int:
        """Number of tokens of the longest sample, or places of as many samples as share a sequence."""
        lengths = [self.wan.num_tokens(size) for size in self.sizes]
        if not self.packs:
            return max(lengths)
        ranks = self.layout.cp_size * (self.layout.tp_size if self.layout.sequence_parallel else 1)
        return self.counts.most * max(-(-length // ranks) * ranks for length in lengths)

    @property
    def counts(self) -> SampleCounts:
        """Numbers of samples of a step."""
        return SampleCounts(self.samples, max(map(max, self.packs)) if self.packs else self.micro_batch_size)

    @property
    def step_shape(self) -> StepShape:
        """Shapes and counts of a step."""
        if not self.packs:
            return StepShape(self.micro_batch_size, self.most_tokens, self.micro_batches, torch.float32)
        return StepShape(1, self.most_tokens, max(map(len, self.packs)), torch.float32)

    @property
    def text_lengths(self) -> Sequence[int]:
        """Lengths of captions, which take turns."""
        return range(1, self.wan.text_len + 1, 3) if self.packs else [self.wan.text_len]

    def global_batch(self, step: int) -> list[FeatureBatch]:
        """The samples of one step, each alone."""
        return global_batch(self.wan, self.sizes, self.samples, step, self.text_lengths)

    def micro_batches_of(self, dp_rank: int, samples: Sequence[FeatureBatch]) -> list[MicroBatch]:
        """Micro-batches of a replica, of the samples of a step, each alone."""
        if not self.packs:
            mine, size = samples[dp_rank :: self.layout.dp_size], self.micro_batch_size
            return [collate(mine[start : start + size]) for start in range(0, len(mine), size)]
        mine = samples[sum(map(sum, self.packs[:dp_rank])) :]
        return [pack(mine[rows]) for rows in consecutive(self.packs[dp_rank])]


def small_model(wan: WanConfig) -> WanConfig:
    """Small model with as many heads and blocks as another, so that it takes the same layouts."""
    width = 8 * wan.num_heads  # heads of width 8 have rotary pairs on all three axes
    small = {"text_dim": 16, "text_len": 8, "hidden_size": width, "ffn_dim": width, "freq_dim": 32}
    return wan.model_copy(update=small | {name: SMALL[name] for name in wan.task.sizes})


def value_of(name: str, shape: tuple[int, ...]) -> Tensor:
    """Initial weights with no gradient near zero, which would compare rounding with rounding.

    Wan starts its head and biases at zero, norms at one and the embedders small: the head's zeros would stop every
    gradient, and nearly equal keys make softmax blind to them. So what starts with one number everywhere is changed.
    """
    value = initial_value(name, shape, SEED)
    if name.startswith(("text_embedding.", "time_embedding.")) and name.endswith("weight"):
        return 10 * value
    if bool((value == value.flatten()[0]).all()):
        return value + 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(len(name) + shape[0]))
    return value


def nudged_value_of(name: str, shape: tuple[int, ...]) -> Tensor:
    """`value_of` with every number moved to one of its two neighbours."""
    value = value_of(name, shape)
    up = torch.rand(shape, generator=torch.Generator().manual_seed(SEED)) < 0.5
    return torch.nextafter(value, torch.where(up, math.inf, -math.inf))


def global_batch(
    wan: WanConfig, sizes: Sequence[Size], count: int, step: int, text_lengths: Sequence[int] = ()
) -> list[FeatureBatch]:
    """The samples of one step, each alone; sizes of latents and lengths of captions take turns."""
    text_lengths = text_lengths or [wan.text_len]
    source = torch.Generator().manual_seed(step)
    samples = []
    for index in range(count):
        size = sizes[index % len(sizes)]
        sample = FeatureBatch(
            latents=torch.randn(1, wan.out_dim, *size, generator=source),
            text=torch.randn(1, text_lengths[index % len(text_lengths)], wan.text_dim, generator=source),
            sample=[f"clip {index}"],
            draw=[step],
            features={
                name: torch.randn(1, *shape, generator=source) for name, shape in wan.feature_shapes(size).items()
            },
        )
        samples.append(sample)
    return samples


def collate(samples: Sequence[FeatureBatch]) -> FeatureBatch:
    """Samples of one size as one micro-batch."""
    return FeatureBatch(
        latents=torch.cat([s["latents"] for s in samples]),
        text=torch.cat([s["text"] for s in samples]),
        sample=[name for s in samples for name in s["sample"]],
        draw=[draw for s in samples for draw in s["draw"]],
        features={name: torch.cat([s["features"][name] for s in samples]) for name in samples[0]["features"]},
    )


def run_on_one_device(
    wan: WanConfig,
    sizes: Sequence[Size],
    count: int,
    device: torch.device | None = None,
    value_of: Callable[[str, tuple[int, ...]], Tensor] = value_of,
    *,
    text_lengths: Sequence[int] = (),
    objective: DiffusionConfig | None = None,
) -> Trace[Tensor]:
    """The plain loop; `count` samples a step, one by one."""
    device = device or torch.device("cpu")
    model = WanModel(wan)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(value_of(name, tuple(parameter.shape)))
    model.to(device)
    flow, named = FlowMatching(objective or DiffusionConfig()), dict(model.named_parameters())
    decayed = [p for n, p in named.items() if p.dim() > 1 and not n.endswith(".bias")]
    others = [p for n, p in named.items() if p.dim() == 1 or n.endswith(".bias")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=SETTINGS.lr, betas=(0.9, 0.95), eps=EPSILON)
    trace: Trace[Tensor] = Trace()
    for step in range(STEPS):
        done = min(step * count / DECAY_SAMPLES, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = SETTINGS.lr - (SETTINGS.lr - SETTINGS.min_lr) * done
        optimizer.zero_grad()
        losses = []
        for sample in global_batch(wan, sizes, count, step, text_lengths):
            losses.append(plain_loss(model, flow, sample, SEED, device) / count)
            losses[-1].backward()
        trace.losses.append(float(torch.stack([loss.detach().cpu() for loss in losses]).double().sum()))
        trace.gradients.append({name: p.grad.clone() for name, p in named.items() if p.grad is not None})
        trace.norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.clip_grad)))
        optimizer.step()
    trace.weights = {name: p.detach().clone() for name, p in named.items()}
    return trace


def own_pieces(optimizer: Optimizer, what: str) -> dict[str, list[GradientPiece]]:
    """Pieces of every parameter's `gradient` or `master` that this rank owns."""
    pieces: dict[str, list[GradientPiece]] = {}
    for shard in optimizer.shards:
        if shard.owned and shard.start < shard.stop:
            values = getattr(shard, what).detach().clone()
            pieces.setdefault(shard.name, []).append(GradientPiece(shard.placement, shard.start, values))
    return pieces


def run_on_the_mesh(
    case: Case,
    mesh: Mesh,
    backend: Backend,
    read: Callable[[Optimizer, str], dict[str, Values]],
    compiled_for: int | None = None,
    settings: UpdateSettings = SETTINGS,
) -> Trace[Values]:
    """The same on a layout; every rank calls it.

    Args:
        case: what is run. mesh: of its layout. backend: this process's device.
        read: takes gradients and weights out, as `own_pieces` does.
        compiled_for: as for `mm.parallel.apply.apply`. settings: of the updates.
    """
    shape = case.step_shape
    offloader = make_offloader(case.recompute, case.wan, mesh, backend, shape)
    runner = block_runner(case.recompute, offloader, backend.model_code)
    model = case.wan, mesh, backend, case.options, torch.float32, value_of
    parallel = apply(*model, zero=case.zero, run_blocks=runner, compiled_for=compiled_for)
    optimizer = make_optimizer(parallel, replace(settings, fused=parallel.backend.kind != "cpu"))
    flow = FlowMatching(case.objective)
    trace: Trace[Values] = Trace()
    for step in range(STEPS):
        batches = case.micro_batches_of(mesh.dp_rank, case.global_batch(step))
        losses = compute_gradients(parallel, flow, batches, SEED, case.counts)
        optimizer.reduce_gradients()
        trace.gradients.append(read(optimizer, "gradient"))
        statistics = gather_statistics(parallel, optimizer, losses, samples=case.samples)
        trace.losses.append(statistics.loss)
        trace.norms.append(statistics.grad_norm)
        optimizer.update(statistics.grad_norm, case.samples)
    trace.weights = read(optimizer, "master")
    return trace


def compare_pieces(mine: Trace[list[GradientPiece]], whole: Trace[Tensor], comm: Comm) -> RelativeErrors:
    """The largest errors of all ranks; every rank calls it with its own pieces.

    An element that no rank owns, or that two do, is an error without bound.
    """
    gradients = [_worst(a, b, comm) for a, b in zip(mine.gradients, whole.gradients, strict=True)]
    return _errors(mine, whole, gradients, _worst(mine.weights, whole.weights, comm))


def limits(layout: Layout) -> RelativeErrors:
    """Limits of rounding in a run of few blocks in fp32: sums of ring and tensor parallelism have another order.

    Gradients and weights are measured against the largest element of the same parameter.
    """
    reordered = layout.tp_size > 1 or layout.ring_size > 1
    return RelativeErrors(1e-5 if reordered else 1e-6, 1e-5, "", 1e-5, 1e-5, "")


def with_rounding(least: RelativeErrors, rounding: RelativeErrors) -> RelativeErrors:
    """Limits for a model of any depth: four times what changing every weight in its last bit does, if that is more.

    Args:
        least: the limits of few blocks.
        rounding: between two runs on one device, with `value_of` and with `nudged_value_of`.
    """
    loss, gradient = max(least.loss, 4 * rounding.loss), max(least.gradient, 4 * rounding.gradient)
    norm, weight = max(least.norm, 4 * rounding.norm), max(least.weight, 4 * rounding.weight)
    return RelativeErrors(loss, gradient, "", norm, weight, "")


def compare_wholes(run: Trace[Tensor], reference: Trace[Tensor]) -> RelativeErrors:
    """The largest errors of a run whose whole gradients and weights are here."""
    gradients = [worst(mine, other) for mine, other in zip(run.gradients, reference.gradients, strict=True)]
    return _errors(run, reference, gradients, worst(run.weights, reference.weights))


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """max |a - b| / max |b| over the parameters, and the parameter."""
    return max((float((found[n] - e).abs().max() / e.abs().max().clamp_min(1e-8)), n) for n, e in expected.items())


def _errors(
    run: Trace[Values], reference: Trace[Tensor], gradients: list[tuple[float, str]], weights: tuple[float, str]
) -> RelativeErrors:
    return RelativeErrors(
        max(abs(a - b) / abs(b) for a, b in zip(run.losses, reference.losses, strict=True)),
        *max(gradients),
        max(abs(a - b) / b for a, b in zip(run.norms, reference.norms, strict=True)),
        *weights,
    )


def _worst(mine: dict[str, list[GradientPiece]], whole: dict[str, Tensor], comm: Comm) -> tuple[float, str]:
    """max |a - b| / max |b| over the parameters of all ranks, and the parameter."""
    found = {name: (_difference(pieces, whole[name]), _elements(pieces)) for name, pieces in mine.items()}
    everyone: list[dict[str, tuple[float, int]]] = comm.all_gather_object(found)
    worst = max((error, name) for part in everyone for name, (error, _) in part.items())
    for name, expected in whole.items():
        if sum(part[name][1] for part in everyone if name in part) != expected.numel():
            return math.inf, name
    return worst


def _difference(pieces: Sequence[GradientPiece], whole: Tensor) -> float:
    """Error of this rank's pieces of a parameter, relative to the whole parameter's largest element."""
    largest = whole.abs().max().clamp_min(1e-8)
    error = 0.0
    for piece in pieces:
        expected = piece.placement.of(whole).reshape(-1)[piece.start : piece.start + piece.values.numel()]
        difference = float((piece.values.to(expected) - expected).abs().max() / largest)
        if not math.isfinite(difference):
            return math.inf
        error = max(error, difference)
    return error


def _elements(pieces: Sequence[GradientPiece]) -> int:
    return sum(piece.values.numel() for piece in pieces)
