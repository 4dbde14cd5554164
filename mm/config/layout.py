"""Layout of a run over its processes: the degree of every axis, and the blocks that each pipeline stage holds.

`layout_of` reads it from a checked run; everything behind the configuration takes a `Layout` and no sections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from mm.config.run.mesh import MeshRun
from mm.config.run.training import TrainingRun

Stages = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Layout:
    """Degrees of every axis of a run. What the axes leave of the world is data parallel.

    The processes of one sample's context-parallel group form `ring_size` groups of `ulysses_size` neighbours.

    Attributes:
        world_size: all processes.
        tp_size: tensor-parallel degree. sequence_parallel: tokens outside the split layers are cut over it too.
        cp_size: context-parallel degree, `ulysses_size * ring_size`.
        ulysses_size: ranks that exchange heads for tokens.
        window_size: ring ranks in one window of a double ring; 1 or `ring_size` means one plain ring.
        send_recv_overlap: the ring sends and receives through groups of their own.
        pp_size: pipeline-parallel degree. vp_size: model chunks of one pipeline rank.
        stages: [vp_size][pp_size] blocks of each virtual stage; empty only where no model is cut.
        zero3_size: ranks among which layer-zero shards a parameter; None without layer-zero.

    Raises:
        ValueError: when the degrees contradict each other; the rules of `mm.config.rules` tell a user before.
    """

    world_size: int = 1
    tp_size: int = 1
    sequence_parallel: bool = False
    cp_size: int = 1
    ulysses_size: int = 1
    window_size: int = 1
    send_recv_overlap: bool = False
    pp_size: int = 1
    vp_size: int = 1
    stages: Stages = ()
    zero3_size: int | None = None

    def __post_init__(self) -> None:
        fits = {
            "world_size by TP x PP x CP": self.world_size % (self.tp_size * self.pp_size * self.cp_size) == 0,
            "cp_size by ulysses_size": self.cp_size % self.ulysses_size == 0,
            "ring_size by window_size": self.ring_size % self.window_size == 0,
            "data- times context-parallel size by zero3_size": self.dp_cp_size % (self.zero3_size or 1) == 0,
        }
        wrong = [what for what, fit in fits.items() if not fit]
        if wrong:
            raise ValueError(f"does not divide: {', '.join(wrong)}")
        if self.stages and (len(self.stages) != self.vp_size or any(len(row) != self.pp_size for row in self.stages)):
            raise ValueError(f"stages {self.stages} are not {self.vp_size} rows of {self.pp_size} numbers")

    @property
    def ring_size(self) -> int:
        """Ranks among which keys and values go round."""
        return self.cp_size // self.ulysses_size

    @property
    def dp_size(self) -> int:
        """Data-parallel replicas."""
        return self.world_size // (self.tp_size * self.pp_size * self.cp_size)

    @property
    def dp_cp_size(self) -> int:
        """Ranks that hold the same parameters of one tensor- and pipeline-parallel place."""
        return self.dp_size * self.cp_size

    @property
    def double_ring(self) -> bool:
        """True for a ring of windows, each a ring of its own."""
        return 1 < self.window_size < self.ring_size

    @property
    def token_parts(self) -> int:
        """Equal chunks into which the tokens of a sample are cut."""
        return self.cp_size * (self.tp_size if self.sequence_parallel else 1)

    def blocks(self, pp_rank: int, vp_rank: int) -> range:
        """Indices, in the whole model, of the blocks of one virtual stage.

        A sample passes chunk 0 of every pipeline rank in turn, then chunk 1 of every rank, and so on.
        """
        before = [*chain(*self.stages[:vp_rank]), *self.stages[vp_rank][:pp_rank]]
        return range(sum(before), sum(before) + self.stages[vp_rank][pp_rank])

    @property
    def micro_batches_come_in(self) -> int:
        """Number whose multiples a replica's micro-batches are: interleaved stages take rounds of one for each rank."""
        return self.pp_size if self.vp_size > 1 else 1

    def passes_in_flight(self, pp_rank: int, micro_batches: int) -> int:
        """Forwards of a rank, of any of its virtual stages, whose backward has not run yet, at most.

        Those of the warm-up and one more: p - r of plain 1F1B, 2 (p - r) - 1 + (v - 1) p when stages interleave.

        Source: Narayanan et al. 2021 (arXiv 2104.04473), section 2.2, in the order of megatron-core.
        """
        behind = self.pp_size - pp_rank
        if self.vp_size == 1:
            return min(behind, micro_batches)
        return min(2 * behind - 1 + (self.vp_size - 1) * self.pp_size, self.vp_size * micro_batches)

    def name(self) -> str:
        """A short id such as `dp2-tp2sp-cp4(u2xr2)-pp2vp2-zero2`; axes of degree 1 are left out, uneven stages told."""
        parts = [
            f"dp{self.dp_size}" if self.dp_size > 1 else "",
            f"tp{self.tp_size}{'sp' if self.sequence_parallel else ''}" if self.tp_size > 1 else "",
            f"cp{self.cp_size}({self._context_name()})" if self.cp_size > 1 else "",
            self._pipeline_name() if self.pp_size > 1 else "",
            f"zero{self.zero3_size}" if self.zero3_size is not None else "",
        ]
        return "-".join(part for part in parts if part) or "single"

    def _context_name(self) -> str:
        degrees = [f"u{self.ulysses_size}"] if self.ulysses_size > 1 else []
        if self.ring_size > 1:
            degrees.append(f"r{self.ring_size}" + (f"w{self.window_size}" if self.double_ring else ""))
        return "x".join(degrees) + (",overlap" if self.send_recv_overlap else "")

    def _pipeline_name(self) -> str:
        chunks = f"vp{self.vp_size}" if self.vp_size > 1 else ""
        uneven = len(set(chain(*self.stages))) > 1
        listed = ",".join("+".join(map(str, row)) for row in self.stages)
        return f"pp{self.pp_size}{chunks}" + (f"({listed})" if uneven else "")


def layout_of(run: TrainingRun) -> Layout:
    """The layout of a training run that `mm.config.rules.training.check_training` has accepted.

    Raises:
        ValueError: when it has not, and the degrees contradict each other.
    """
    return mesh_layout(run, run.vp, _stages(run))


def mesh_layout(run: MeshRun, vp_size: int = 1, stages: Stages = ()) -> Layout:
    """The layout of a run that the rules (`mm.config.rules.mesh`) have accepted.

    Args:
        run: what was asked for.
        vp_size: model chunks of one pipeline rank. stages: their blocks, [vp_size][pp_size]; empty without a pipeline.

    Raises:
        ValueError: when they have not, and the degrees contradict each other.
    """
    mesh, ulysses = run.mesh, run.ulysses
    if ulysses is None:
        raise ValueError("the hybrid algorithm needs a Ulysses degree that divides the context-parallel size")
    return Layout(
        world_size=run.world_size,
        tp_size=run.tp,
        sequence_parallel=mesh.sequence_parallel,
        cp_size=run.cp,
        ulysses_size=ulysses,
        window_size=mesh.ring_window if mesh.ring_window > 1 else run.cp // ulysses,
        send_recv_overlap=mesh.ring_overlap,
        pp_size=run.pp,
        vp_size=vp_size,
        stages=stages,
        zero3_size=mesh.layerzero.zero3_size if mesh.layerzero else None,
    )


def even_stages(num_layers: int, pp_size: int, vp_size: int = 1) -> Stages:
    """The same number of blocks in every virtual stage, [vp_size][pp_size].

    Raises:
        ValueError: when the blocks do not divide by the virtual stages.
    """
    if num_layers % (pp_size * vp_size):
        raise ValueError(f"{num_layers} blocks do not divide by {pp_size * vp_size} virtual stages")
    return balanced_stages(num_layers, pp_size, vp_size)


def balanced_stages(num_layers: int, pp_size: int, vp_size: int = 1) -> Stages:
    """Virtual stages that differ by one block at most, [vp_size][pp_size]; the middle ones are the larger ones.

    The first stage has the embeddings besides and the last one the head, so these are not the ones to fill up.
    """
    count = pp_size * vp_size
    size, extra = divmod(num_layers, count)
    first_large = (count - extra) // 2
    sizes = [size + (first_large <= place < first_large + extra) for place in range(count)]
    return tuple(tuple(sizes[row * pp_size : (row + 1) * pp_size]) for row in range(vp_size))


def stage_rows(listed: Sequence[int] | Sequence[list[int]]) -> Stages:
    """`pipeline_num_layers` as rows, one for each model chunk; a flat list is one row."""
    rows = [row for row in listed if isinstance(row, list)]
    return tuple(map(tuple, rows)) if rows else (tuple(item for item in listed if isinstance(item, int)),)


def _stages(run: TrainingRun) -> Stages:
    rows, num_layers = run.parallel.stages, run.wan.num_layers
    if run.pp == 1:  # a list is unused then, as in MindSpeed-MM, whose model files always have one
        return ((num_layers,),)
    return tuple(map(tuple, rows)) if rows is not None else even_stages(num_layers, run.pp, run.vp)
