"""A training step of one rank of any job, in one process without its devices: memory, traffic, bubble.

What runs is the code of a training step on fake process groups and fake tensors: the mesh, the model on it, megatron-
core's schedule and DDP or FSDP2, the optimizer. Only what reads a number on the host is left out: the drawn timesteps,
the loss and the gradient norm, whose messages are still sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from mm.activation.host_pool import StepShape, make_offloader
from mm.activation.recompute import block_runner
from mm.config.diffusion import DiffusionConfig
from mm.config.layerzero import ZeroConfig
from mm.config.layout import Layout
from mm.config.model import WanConfig
from mm.config.optimizer import OptimizerName
from mm.config.recompute import Recompute
from mm.data.loader import FeatureBatch
from mm.data.packed import MicroBatch, pack
from mm.device.backend import Backend, select
from mm.diffusion.flow import FlowMatching, PlaceInStep, SampleId
from mm.doctor import formulas
from mm.doctor import memory_tracker as memory
from mm.doctor.fake_job import FakeTensors, fake_job
from mm.doctor.memory_tracker import TrackMemory
from mm.doctor.traffic import CallTotals, CountTraffic, Traffic, axes_of, totals
from mm.optim.make import make_optimizer
from mm.optim.optimizer import Optimizer
from mm.optim.settings import UpdateSettings
from mm.optim.step_statistics import message_size
from mm.parallel.apply import DataParallelOptions, ParallelModel, apply
from mm.parallel.mesh import Mesh, build_mesh
from mm.parallel.placement import local
from mm.parallel.replica import leads_replica
from mm.parallel.schedule import LossFunction, forward_backward
from mm.parallel.stage import WanStage
from mm.parallel.trainable_extension import TrainableExtension
from mm.train.pieces import saved_bytes
from mm.train.step import forward_micro_batch, lengths_of
from mm.wan.layers import BlockRunner

_SETTINGS = UpdateSettings(
    lr=1.0,
    min_lr=0.0,
    lr_decay_style="constant",
    lr_warmup_init=0.0,
    warmup_samples=0,
    decay_samples=1,
    weight_decay=0.1,
    adam_beta1=0.9,
    adam_beta2=0.95,
    adam_eps=1e-8,
    clip_grad=1.0,
    fused=True,
)
"""An update as on an accelerator, with clipping; its numbers change neither memory nor messages."""


@dataclass(frozen=True)
class DryRunJob:
    """Run to rehearse, cut as it is.

    Attributes:
        wan, layout, options, zero: as for `mm.parallel.apply.apply`. recompute: as for `mm.activation.recompute`.
        dtype: of the bulk of the parameters.
        extension: what is trained, where that is not all. ema_decay: of the average of the weights, if any.
        latent: F, H, W of a sample's latents. micro_batch_size: samples in a forward, beside each other.
        micro_batches: of one replica in a step. optimizer: its name.
        packed: samples that share a sequence, a micro-batch each; None where every sample has its own.
        encoder_bytes: of encoders that stand on the first rank of each replica, beside the model.
        idle_expert: where the one of two experts is that a step does not train; None where there is one model.
        motion_loss_ratio: of the objective, which for it tells ranks what others predict.
        async_save: whether checkpoints are written in the background. save_optimizer: with the optimizer's state.
        save_frozen: with what is frozen of the model.
    """

    wan: WanConfig
    layout: Layout
    options: DataParallelOptions
    zero: ZeroConfig | None
    dtype: torch.dtype
    latent: tuple[int, int, int]
    micro_batch_size: int
    micro_batches: int
    recompute: Recompute | None = None
    extension: TrainableExtension | None = None
    ema_decay: float | None = None
    async_save: bool = False
    save_optimizer: bool = True
    save_frozen: bool = False
    optimizer: OptimizerName = "adamw"
    packed: int | None = None
    encoder_bytes: int = 0
    idle_expert: Literal["device", "host"] | None = None
    motion_loss_ratio: float | None = None

    @property
    def samples(self) -> int:
        """Number of samples of a micro-batch."""
        return self.packed or self.micro_batch_size

    @property
    def sequence(self) -> list[int]:
        """Tokens of each sample of a sequence."""
        return [self.wan.num_tokens(self.latent)] * (self.packed or 1)


@dataclass(frozen=True)
class Report:
    """Memory and messages of one rank in a step after the first.

    Attributes:
        rank: in the job. tp_rank, cp_rank, dp_rank, pp_rank: its coordinates.
        parameters: elements that it keeps of the model. trained: those of them that are not frozen.
        parameter_bytes, gradient_bytes, optimizer_bytes: kept all the time, in the model's and DDP's buffers, and in
            the optimizer.
        peak: bytes by kind (`mm.doctor.memory_tracker`) when most memory was in use. peak_bytes: their sum.
        host_bytes: of the offload pool, beside the device's memory. save_bytes: of background saves, there too.
        expert_bytes: of two experts that take turns on the device, there too.
        traffic: what it sends in a step by axis and operation.
        bubble: share of the step in which a stage waits, if stages are equally long.
        groups: name and size of the process groups that it is in, beside the job's own.
        tokens: of a sample. samples: in a sequence.
        rank_tokens: places for a sequence's tokens on a rank. real_tokens: of them on this rank, no padding.
    """

    rank: int
    tp_rank: int
    cp_rank: int
    dp_rank: int
    pp_rank: int
    parameters: int
    trained: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    peak: dict[str, int]
    host_bytes: int
    save_bytes: int
    expert_bytes: int
    traffic: Traffic
    bubble: float
    groups: tuple[tuple[str, int], ...]
    tokens: int
    samples: int
    rank_tokens: int
    real_tokens: int

    @property
    def peak_bytes(self) -> int:
        """All kinds together."""
        return sum(self.peak.values())


def dry_run(job: DryRunJob, rank: int) -> Report:
    """One rank's step; no process of the calling program may be in a job.

    Of many micro-batches only so many are run that in-flight activations and gradients are at their most
    (`_micro_batches_to_run`); what the others send is added by count.
    """
    backend, waits = select("cpu"), job.idle_expert == "host"
    with fake_job(rank, job.layout.world_size), build_mesh(job.layout, 1, backend.kind) as mesh:
        with FakeTensors(), TrackMemory(memory.PARAMETERS) as tracked, CountTraffic(axes_of(mesh)) as counted:
            places, size = mesh.tokens.places(job.sequence), 1 if job.packed else job.micro_batch_size
            shape = StepShape(size, places * job.layout.token_parts, job.micro_batches, job.dtype)
            offloader = make_offloader(job.recompute, job.wan, mesh, backend, shape)
            if offloader is not None:
                tracked.label([offloader.memory], memory.HOST)
            run_blocks = block_runner(job.recompute, offloader, backend.model_code)
            count = 2 if job.idle_expert == "device" else 1
            models = [_build(job, mesh, backend, run_blocks, tracked) for _ in range(count)]
            parallel, optimizer = models[0]
            tracked.kind = memory.ACTIVATIONS
            passes: list[Traffic] = []
            runs = _micro_batches_to_run(job)
            for micro_batches in runs:
                start, first = tracked.mark(), len(counted.calls)
                _gradients(parallel, job, micro_batches)
                passes.append(totals(counted.calls[first:]))
            first = len(counted.calls)
            _update(parallel, job, optimizer, tracked)
            update = totals(counted.calls[first:])
        return Report(
            rank=rank,
            tp_rank=mesh.tp_rank,
            cp_rank=mesh.cp_rank,
            dp_rank=mesh.dp_rank,
            pp_rank=mesh.pp_rank,
            parameters=_elements(parallel.all_parameters()),
            trained=_elements(parallel.named_parameters()),
            parameter_bytes=tracked.now(memory.PARAMETERS),
            gradient_bytes=tracked.peak(start).get(memory.GRADIENTS, 0),
            optimizer_bytes=tracked.now(memory.OPTIMIZER),
            peak=tracked.peak(start) | _encoders(job, mesh),
            host_bytes=tracked.now(memory.HOST),
            save_bytes=_saved_bytes(job, optimizer),
            expert_bytes=2 * (tracked.now(memory.PARAMETERS) + tracked.now(memory.OPTIMIZER)) if waits else 0,
            traffic=_sum(_of_all(passes, runs, job.micro_batches), update),
            bubble=formulas.bubble(job.layout, job.micro_batches),
            groups=mesh.made + ((("background saves", job.layout.world_size),) if job.async_save else ()),
            tokens=job.sequence[0],
            samples=len(job.sequence),
            rank_tokens=places,
            real_tokens=sum(run.real for run in mesh.tokens.runs(job.sequence)),
        )


def _build(
    job: DryRunJob, mesh: Mesh, backend: Backend, run_blocks: BlockRunner, tracked: TrackMemory
) -> tuple[ParallelModel, Optimizer]:
    """A model and its optimizer, with all that it keeps."""
    tracked.kind = memory.PARAMETERS
    model = job.wan, mesh, backend, job.options, job.dtype, None
    parallel = apply(*model, zero=job.zero, run_blocks=run_blocks, extension=job.extension)
    _label_model(tracked, parallel)
    tracked.kind = memory.OPTIMIZER
    optimizer = make_optimizer(parallel, replace(_SETTINGS, optimizer=job.optimizer, ema_decay=job.ema_decay))
    for shard in optimizer.shards:
        shard.state()  # it would be made only at the end of the first step
    return parallel, optimizer


def _saved_bytes(job: DryRunJob, optimizer: Optimizer) -> int:
    """Bytes of the copy that a background save makes; 0 where there is none."""
    kinds = {"with_optimizer": job.save_optimizer, "with_frozen": job.save_frozen}
    return saved_bytes(optimizer, **kinds) if job.async_save else 0


def _encoders(job: DryRunJob, mesh: Mesh) -> dict[str, int]:
    return {"encoders": job.encoder_bytes} if job.encoder_bytes and leads_replica(mesh) else {}


def _elements(parameters: Mapping[str, Tensor]) -> int:
    return sum(parameter.numel() for parameter in map(local, parameters.values()))


def _micro_batches_to_run(job: DryRunJob) -> list[int]:
    """The micro-batches of the forward and backward passes to run; the last is measured.

    One for each stage fills a pipeline, and with the next the first gradients exist beside all activations. The
    interleaved schedule takes whole rounds of one for each stage. In a pipeline layer-zero gathers other blocks for the
    first micro-batches than for later ones, so that a second pass must tell what a further one adds.
    """
    layout = job.layout
    enough = layout.pp_size + 1 if layout.vp_size == 1 else 2 * layout.pp_size
    if job.micro_batches <= enough:
        return [job.micro_batches]
    return [layout.pp_size, enough] if job.zero is not None and layout.pp_size > 1 else [enough]


def _gradients(parallel: ParallelModel, job: DryRunJob, micro_batches: int) -> None:
    """`mm.train.step.compute_gradients` without the loss on the host."""
    flow = _Undrawn(DiffusionConfig(motion_loss_ratio=job.motion_loss_ratio))

    def forward_step(stage: WanStage, module: Any, batch: MicroBatch) -> tuple[Tensor, LossFunction]:
        return forward_micro_batch(stage, module, batch, flow, parallel, seed=0)

    sizes = partial(lengths_of, wan=job.wan)
    for parameter in parallel.named_parameters().values():
        parameter.grad = None  # layer-zero's, of a pass before
    forward_backward(parallel, forward_step, [_batch(job)] * micro_batches, sizes)


def _update(parallel: ParallelModel, job: DryRunJob, optimizer: Optimizer, tracked: TrackMemory) -> None:
    """`mm.train.step.train_step` after backward."""
    tracked.label((parameter.grad for parameter in parallel.named_parameters().values()), memory.GRADIENTS)
    optimizer.reduce_gradients()
    optimizer.gradient_squares(torch.zeros(message_size(job.micro_batches * job.samples)))
    optimizer.apply_gradients(norm=2.0)  # above clip_grad, so that gradients are clipped
    if optimizer.average is not None:
        optimizer.average.update()


def _batch(job: DryRunJob) -> MicroBatch:
    if job.packed is None:
        return _samples(job, job.micro_batch_size)
    return pack([_samples(job, 1) for _ in range(job.packed)])


def _samples(job: DryRunJob, size: int) -> FeatureBatch:
    wan = job.wan
    return FeatureBatch(
        latents=torch.empty(size, wan.noise_channels, *job.latent),
        text=torch.empty(size, wan.text_len, wan.text_dim),
        sample=[str(index) for index in range(size)],
        draw=[0] * size,
        features={name: torch.empty(size, *shape) for name, shape in wan.feature_shapes(job.latent).items()},
    )


class _Undrawn(FlowMatching):
    """Timesteps without a value: choosing one from the grid reads a random number on the host."""

    def draw_timesteps(
        self,
        seed: int,
        samples: Sequence[SampleId],
        draws: Sequence[int],
        places: Sequence[PlaceInStep] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Three [B]."""
        return torch.empty(len(samples)), torch.empty(len(samples)), torch.empty(len(samples))

    def draw_given_frames(
        self, seed: int, samples: Sequence[SampleId], draws: Sequence[int], usual_share: float
    ) -> Tensor:
        """[B]."""
        return torch.empty(len(samples))


def _label_model(tracked: TrackMemory, parallel: ParallelModel) -> None:
    for parameter in parallel.all_parameters().values():
        tracked.label([parameter.data], memory.PARAMETERS)
        tracked.label([getattr(parameter, "main_grad", None)], memory.GRADIENTS)


def _of_all(passes: Sequence[Traffic], runs: Sequence[int], micro_batches: int) -> Traffic:
    """Traffic of passes over all micro-batches, from passes over a few.

    Only DDP sends something once for all micro-batches, its parameters and gradients.
    """
    more = micro_batches - runs[-1]
    if len(passes) == 1:
        of_none: Traffic = {key: sent for key, sent in passes[0].items() if key[0] == "dp_cp"}
        passes, runs = [of_none, passes[0]], [0, runs[0]]
    found: Traffic = {}
    for key, last in passes[1].items():
        before = passes[0].get(key, CallTotals(0, 0.0))
        calls = last.calls + (last.calls - before.calls) * more // (runs[1] - runs[0])
        found[key] = CallTotals(calls, last.bytes + (last.bytes - before.bytes) * more / (runs[1] - runs[0]))
    return found


def _sum(traffic: Traffic, other: Traffic) -> Traffic:
    found = dict(traffic)
    for key, sent in other.items():
        before = found.get(key, CallTotals(0, 0.0))
        found[key] = CallTotals(before.calls + sent.calls, before.bytes + sent.bytes)
    return found
