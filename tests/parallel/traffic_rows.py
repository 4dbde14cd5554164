"""Layouts whose traffic is counted on real gloo processes, and how it is counted."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mm.config.diffusion import DiffusionConfig
from mm.config.layerzero import ZeroConfig
from mm.config.layout import Layout, even_stages
from mm.config.model import WanConfig, of_task
from mm.config.place import process_place
from mm.config.recompute import Recompute
from mm.config.tasks.registry import TASKS
from mm.data.loader import FeatureBatch
from mm.data.packed import MicroBatch, pack
from mm.device.backend import select
from mm.diffusion.flow import FlowMatching
from mm.doctor.traffic import CountTraffic, Traffic, axes_of, totals
from mm.optim.make import make_optimizer
from mm.optim.settings import UpdateSettings
from mm.parallel.apply import DataParallelOptions, apply
from mm.parallel.mesh import Mesh, build_mesh
from mm.supervise.job import Job
from mm.train.step import train_step
from mm.wan.initial import initial_value

# Every parameter has a multiple of 128 elements on two tensor-parallel ranks, where megatron-core's buffers need no
# padding; 8 heads divide by 8.
WAN = WanConfig(text_dim=16, text_len=8, hidden_size=256, ffn_dim=512, num_heads=8, num_layers=2, freq_dim=32)
EVEN, ODD = (2, 8, 8), (3, 6, 10)
"""Latent sizes of 32 tokens, which divide by 8, and of 45, which leave padding."""
SETTINGS = UpdateSettings(
    lr=1e-3, min_lr=0.0, lr_decay_style="constant", lr_warmup_init=0.0, warmup_samples=0, decay_samples=100,
    weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, clip_grad=1e-3,
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One layout, and what a step of it works on."""

    layout: Layout
    options: DataParallelOptions = field(default_factory=DataParallelOptions)
    zero: ZeroConfig | None = None
    latent: tuple[int, int, int] = ODD
    micro_batches: int = 2
    dtype: torch.dtype = torch.bfloat16
    wan: WanConfig = WAN
    recompute: Recompute | None = None
    packed: int | None = None
    side_every: int = 0
    """Every such block takes a hint of a side block; 0 for models without."""

    @property
    def id(self) -> str:
        parts = [self.layout.name()]
        if self.wan.model_type != "t2v":
            parts.append(self.wan.model_type + ("-first" if self.side_every > 1 else ""))
        if self.zero is not None:
            parts.append(f"x{self.layout.dp_cp_size // self.zero.zero3_size}")
        if self.options.use_distributed_optimizer:
            parts.append("distopt")
        if self.recompute is not None:
            kept = f"keep {self.recompute.kept}" if self.recompute.keep_layers != 0 else "full"
            parts.append(kept + (" offloaded" if self.recompute.offload else ""))
        if self.packed is not None:
            parts.append(f"packed {self.packed}")
        return "-".join([*parts, f"{self.tokens} tokens"])

    @property
    def tokens(self) -> int:
        return self.wan.num_tokens(self.latent)

    @property
    def side_block(self) -> int | None:
        """Number of a side block that a further layer has."""
        return 1 if self.side_every == 1 else None

    def with_layers(self, num_layers: int) -> "Row":
        layout = replace(self.layout, stages=even_stages(num_layers, self.layout.pp_size, self.layout.vp_size))
        sides = {"vace_layers": tuple(range(0, num_layers, self.side_every))} if self.side_every else {}
        wan = WanConfig.model_validate({**self.wan.model_dump(), "num_layers": num_layers, **sides})
        return replace(self, layout=layout, wan=wan)


def row(world_size: int, *, distopt: bool = False, zero: int | None = None, latent: Any = ODD, **degrees: Any) -> Row:
    return Row(
        Layout(world_size=world_size, zero3_size=zero, **degrees),
        DataParallelOptions(use_distributed_optimizer=distopt),
        None if zero is None else ZeroConfig(zero3_size=zero),
        latent,
    )


IMAGE_SIZES = {"img_dim": 128, "clip_token_len": 5}


def with_images(row: Row) -> Row:
    return of(row, "i2v")


def of(row: Row, task: str, side_every: int = 1) -> Row:
    """The row with a model of another task."""
    declared = TASKS[task]
    channels = declared.latent_channels or 16
    shape = row.wan.model_copy(update={"in_dim": channels, "out_dim": channels})
    sides = {"vace_layers": tuple(range(0, row.wan.num_layers, side_every))}
    sizes = {name: {**IMAGE_SIZES, **sides}[name] for name in declared.sizes}
    wan = of_task(shape, declared, **sizes)
    return replace(row, wan=wan, side_every=side_every if wan.side_blocks else 0)


FOUR = [
    row(4, cp_size=2, ulysses_size=2),
    *(row(4, cp_size=4, ulysses_size=4, latent=latent) for latent in (EVEN, ODD)),
    row(4, cp_size=2),
    *(row(4, cp_size=4, latent=latent) for latent in (EVEN, ODD)),
    row(4, cp_size=4, window_size=2),
    *(row(4, cp_size=4, ulysses_size=2, latent=latent) for latent in (EVEN, ODD)),
    *(row(4, tp_size=2, sequence_parallel=True, latent=latent) for latent in (EVEN, ODD)),
    row(4, tp_size=2),
    row(4, pp_size=2),
    row(4, pp_size=2, vp_size=2),
    row(4, pp_size=4),
    row(4),
    row(4, distopt=True),
    row(4, zero=2),
    row(4, zero=2, distopt=True),
    row(4, zero=2, cp_size=2, ulysses_size=2, pp_size=2),
    row(4, tp_size=2, sequence_parallel=True, cp_size=2, ulysses_size=2),
    with_images(row(4, tp_size=2)),
    with_images(row(4, tp_size=2, sequence_parallel=True, pp_size=2)),
]
FAMILY = [
    of(row(4, tp_size=2, sequence_parallel=True, pp_size=2), "vace"),
    of(row(4, tp_size=2, sequence_parallel=True, cp_size=2, ulysses_size=2), "fun_control_ref"),
    of(row(4, zero=2, cp_size=2, pp_size=2), "vace"),
]
MORE_FAMILY = [
    of(row(4, cp_size=4, ulysses_size=2), "vace"),
    of(row(4, tp_size=2), "vace"),
    of(row(4, pp_size=2, vp_size=2), "vace"),
    of(row(4, tp_size=2, pp_size=2), "vace", side_every=99),
    of(row(4, zero=2, distopt=True), "vace"),
    of(row(4, cp_size=4), "fun_control_ref"),
    of(row(4, tp_size=2, pp_size=2), "fun_control_ref"),
    of(row(4, zero=2, cp_size=2, ulysses_size=2), "fun_control_ref"),
    of(row(4, pp_size=2, vp_size=2), "fun_control_ref"),
    of(row(4, cp_size=4, ulysses_size=2), "fun_camera"),
    of(row(4, tp_size=2, sequence_parallel=True, pp_size=2), "fun_camera"),
    of(row(4, zero=2, distopt=True), "fun_camera"),
    *(of(row(4, tp_size=2, cp_size=2), task) for task in ("fun_control", "wan22_i2v", "ti2v", "speedcontrol")),
    *(of(row(4, zero=2, pp_size=2), task) for task in ("fun_control", "wan22_i2v", "ti2v", "speedcontrol")),
]
"""Models whose features enter in other ways: with side blocks, and with tokens in front of the video's."""
MORE_FOUR = FOUR[1::2] + MORE_FAMILY
FOUR = FOUR[::2] + FAMILY
"""Every second row, which leaves every axis; the others are nightly."""
EIGHT = [
    row(8, tp_size=2, sequence_parallel=True, cp_size=2, ulysses_size=2, pp_size=2, vp_size=2),
    row(8, tp_size=2, sequence_parallel=True, cp_size=4, ulysses_size=2),
    row(8, zero=4, cp_size=2, pp_size=2),
]


def real_steps(row: Row, mesh: Mesh, steps: int) -> Traffic:
    """What this rank sends in the last of some steps, by the training step that `mm train` takes."""
    backend = select("cpu")
    with CountTraffic(axes_of(mesh)) as traffic:
        parallel = apply(
            row.wan,
            mesh,
            backend,
            row.options,
            row.dtype,
            lambda name, shape: initial_value(name, shape, 1),
            zero=row.zero,
        )
        optimizer = make_optimizer(parallel, SETTINGS)
        flow = FlowMatching(DiffusionConfig())
        for _ in range(steps):
            first = len(traffic.calls)
            train_step(parallel, optimizer, flow, batches(row), samples=row.micro_batches, seed=0)
        return totals(traffic.calls[first:])


def batches(row: Row) -> list[MicroBatch]:
    samples = _samples(row, row.micro_batches * (row.packed or 1))
    if row.packed is None:
        return [*samples]
    return [pack(samples[first : first + row.packed]) for first in range(0, len(samples), row.packed)]


def _samples(row: Row, count: int) -> list[FeatureBatch]:
    source, wan = torch.Generator().manual_seed(0), row.wan
    shapes, made = wan.feature_shapes(row.latent), []
    # All samples have the same: what waits on the host for its turn, as large as a camera's rays, is no device memory.
    features = {name: torch.randn(1, *shape, generator=source) for name, shape in shapes.items()}
    for index in range(count):
        batch = FeatureBatch(
            latents=torch.randn(1, wan.noise_channels, *row.latent, generator=source),
            text=torch.randn(1, wan.text_len, wan.text_dim, generator=source),
            sample=[f"clip {index}"],
            draw=[0],
            features=features,
        )
        made.append(batch)
    return made


def count(rows: list[Row]) -> list[tuple[Traffic, Traffic]]:
    """On one rank of a job: the traffic of each row with one block a virtual stage, and with two."""
    return [_count(row) for row in rows]


def _count(row: Row) -> tuple[Traffic, Traffic]:
    # A job of its own for each row: the groups of a job stay, with their threads, until it ends.
    with Job(process_place(), "gloo", torch.device("cpu"), 2), build_mesh(row.layout, 2, "cpu") as mesh:
        return _with_layers(row, mesh, 1), _with_layers(row, mesh, 2)


def _with_layers(row: Row, mesh: Mesh, each: int) -> Traffic:
    longer = row.with_layers(each * row.layout.pp_size * row.layout.vp_size)
    return real_steps(longer, replace(mesh, layout=longer.layout), 1)


def a_layer(row: Row, few: Traffic, more: Traffic) -> dict[tuple[str, str], tuple[float, float]]:
    """(calls, bytes) that one block adds, from the traffic with one and two of them on every virtual stage."""
    added = {
        key: (
            (more[key].calls - few[key].calls) / row.layout.vp_size,
            (more[key].bytes - few[key].bytes) / row.layout.vp_size,
        )
        for key in more
    }
    return {key: value for key, value in added.items() if any(value)}
