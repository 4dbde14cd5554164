"""The rows of the parity matrix: small training runs on layouts of ranks, beside `mm.doctor.parity`'s plain loop.

Here whole gradients and weights are put together on rank 0, where every element must come exactly once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist

from mm.config.diffusion import DiffusionConfig
from mm.config.layerzero import ZeroConfig
from mm.config.layout import Layout
from mm.config.model import WanConfig, of_task
from mm.config.recompute import Recompute
from mm.config.tasks.registry import TASKS
from mm.data.loader import FeatureBatch
from mm.data.packed import MicroBatch
from mm.device.backend import Backend
from mm.doctor import parity
from mm.doctor.parity import Case, RelativeErrors, Trace, limits
from mm.optim.optimizer import Optimizer, ParamShard
from mm.parallel.apply import DataParallelOptions
from mm.parallel.mesh import Mesh, build_mesh

# 12 heads divide by 2, 3, 4 and 6; heads of width 8 have rotary pairs on all three axes.
WAN = WanConfig(text_dim=16, text_len=8, hidden_size=96, ffn_dim=192, num_heads=12, num_layers=3, freq_dim=32)
GLOBAL_BATCH = 4

EVEN, ODD, MIXED, ANY, REFERENCED = "even", "odd", "mixed", "any", "referenced"
SIZES = {
    EVEN: [(2, 6, 8)],
    ODD: [(3, 6, 10)],
    MIXED: [(3, 6, 10), (1, 2, 14)],
    ANY: [(3, 6, 10), (1, 2, 4), (1, 2, 14), (2, 4, 6)],
    REFERENCED: [(4, 6, 10), (3, 6, 10), (5, 6, 10)],
}
"""Latent sizes of the samples: 24, 45 and 7 tokens. 24 divides by 2, 3, 4, 6 and 8; the others leave padding.

Those of any size have 45, 2, 7 and 12: two single frames, of which one has fewer tokens than there are ranks.
Referenced ones are a clip of three latent frames with one in front of it, none and two.
"""


@dataclass(frozen=True)
class Row:
    """One row of the parity matrix."""

    layout: Layout
    options: DataParallelOptions = field(default_factory=DataParallelOptions)
    zero: ZeroConfig | None = None
    samples: str = ODD
    micro_batch_size: int = 1
    recompute: Recompute | None = None
    model_type: str = "t2v"
    compiled: bool = False
    packs: tuple[tuple[int, ...], ...] = ()
    objective: DiffusionConfig = field(default_factory=DiffusionConfig)

    @property
    def wan(self) -> WanConfig:
        """`WAN` with as many blocks as the stages have, and the row's images."""
        num_layers = sum(chain(*self.layout.stages)) or WAN.num_layers
        of_blocks = WAN.model_copy(update={"num_layers": num_layers})
        task = TASKS[self.model_type]
        shape = of_blocks if task.latent_channels is None else of_channels(of_blocks, task.latent_channels)
        return of_task(shape, task, **{name: parity.SMALL[name] for name in task.sizes})

    @property
    def most_tokens(self) -> int:
        return max(self.wan.num_tokens(size) for size in SIZES[self.samples])

    @property
    def id(self) -> str:
        parts = [self.layout.name()]
        if self.model_type != "t2v":
            parts.append(self.model_type)
        if self.options.use_distributed_optimizer:
            parts.append("distopt")
        if self.options.overlap_grad_reduce or self.options.overlap_param_gather:
            parts.append("overlap")
        if self.packs:
            parts.append("packed" + "+".join(",".join(map(str, replica)) for replica in self.packs))
        plan = self.recompute
        if plan is not None and self.packs:
            parts.append(f"recompute{plan.full_layers}-{plan.keep_layers}" + "-offload" * plan.offload)
        if self.micro_batch_size > 1:
            parts.append(f"mbs{self.micro_batch_size}")
        return "-".join([*parts, f"acc{self.micro_batches}", self.samples])

    @property
    def reference(self) -> tuple[Any, ...]:
        """What rows have in common that are compared with the same run."""
        objective = self.objective.model_dump_json()
        return self.samples, self.model_type, self.wan.num_layers, self.case.samples, bool(self.packs), objective

    @property
    def micro_batches(self) -> int:
        return len(self.packs[0]) if self.packs else GLOBAL_BATCH // (self.micro_batch_size * self.layout.dp_size)

    @property
    def case(self) -> Case:
        return Case(
            self.wan, self.layout, self.options, self.zero, self.recompute, tuple(SIZES[self.samples]),
            self.micro_batch_size, self.micro_batches, self.packs, self.objective,
        )  # fmt: skip


def of_channels(wan: WanConfig, channels: int) -> WanConfig:
    return wan.model_copy(update={"in_dim": channels, "out_dim": channels})


WholeTrace = Trace[torch.Tensor]


def global_batch(kind: str, step: int, wan: WanConfig = WAN) -> list[FeatureBatch]:
    return parity.global_batch(wan, SIZES[kind], GLOBAL_BATCH, step)


def plain_run(row: Row) -> WholeTrace:
    """The reference: the row's samples one by one."""
    return parity.run_on_one_device(
        row.wan,
        SIZES[row.samples],
        row.case.samples,
        text_lengths=row.case.text_lengths,
        objective=row.objective,
    )


def parallel_run(row: Row, mesh: Mesh, backend: Backend) -> WholeTrace:
    """The same on a layout; gradients and weights are gathered from the ranks that own them."""
    return parity.run_on_the_mesh(row.case, mesh, backend, gather, len(SIZES[row.samples]) if row.compiled else None)


def micro_batches(row: Row, samples: list[FeatureBatch], mesh: Mesh) -> list[MicroBatch]:
    return row.case.micro_batches_of(mesh.dp_rank, samples)


def gather(optimizer: Optimizer, what: str) -> dict[str, torch.Tensor]:
    """Whole gradients or masters, on rank 0."""
    return gather_of(optimizer, attrgetter(what))


def gather_of(optimizer: Optimizer, value: Callable[[ParamShard], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole tensors out of the owned ranges of all ranks, on rank 0. Every element must come exactly once."""
    mine = [
        (s.name, s.placement, s.start, value(s).detach().clone())
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


def compare(run: WholeTrace, reference: WholeTrace) -> RelativeErrors:
    """The errors; the reported norm must also be that of the gathered gradients."""
    for mine, expected in zip([*run.gradients, run.weights], [*reference.gradients, reference.weights], strict=True):
        assert mine.keys() == expected.keys(), sorted(mine.keys() ^ expected.keys())
    errors = parity.compare_wholes(run, reference)
    gathered = [
        float(torch.stack([g.double().square().sum() for g in step.values()]).sum().sqrt()) for step in run.gradients
    ]
    beside = max(abs(a - b) / b for a, b in zip(run.norms, gathered, strict=True))
    return replace(errors, norm=max(errors.norm, beside))


def over_limits(row: Row, errors: RelativeErrors) -> dict[str, str]:
    """The measures in which a run differs from one process by more than rounding, with what they found.

    The loss within 1e-6 (1e-5 where ring or tensor parallelism adds up in another order), every named gradient and
    weight within 1e-5 of its largest element, the norm within 1e-5 of that of the gathered gradients.
    """
    most = limits(row.layout)
    found = {
        "loss": (errors.loss, most.loss, ""),
        "gradient": (errors.gradient, most.gradient, f" of {errors.worst_gradient}"),
        "norm": (errors.norm, most.norm, ""),
        "weight": (errors.weight, most.weight, f" of {errors.worst_weight}"),
    }
    return {measure: f"{error:.1e}{where}" for measure, (error, limit, where) in found.items() if not error <= limit}


def run_rows(rows: list[Row], backend: Backend) -> dict[str, RelativeErrors]:
    """Every row on the ranks of one job; the results are rank 0's."""
    references = {}
    results = {}
    for row in rows:
        with build_mesh(row.layout, 2, "cpu") as mesh:
            trace = parallel_run(row, mesh, backend)
        if dist.get_rank() == 0:
            if row.reference not in references:
                references[row.reference] = plain_run(row)
            results[row.id] = compare(trace, references[row.reference])
    return results
