"""Size of the host memory that an offloading run needs, and the offloader that owns it.

Sizes follow from the plan, the layout and the largest sample, so the pool is made once, before the first step.
Shapes: B batch, t tokens of this rank, T tokens that attention sees, D model width, N heads of attention, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mm.activation.offload import Offloader
from mm.config.model import WanConfig
from mm.config.recompute import Recompute
from mm.config.units import format_bytes
from mm.device.backend import Backend, free_host_bytes
from mm.device.queues import TransferEvent, aligned_bytes, queues_of
from mm.errors import ConfigError
from mm.parallel.mesh import Mesh


@dataclass(frozen=True)
class StepShape:
    """Shapes and counts of a step, known before it runs.

    Attributes:
        micro_batch_size: sequences of a forward. num_tokens: of the longest; of one of several samples, with what
            pads each of them.
        micro_batches: forwards of one replica in a step.
        dtype: of the hidden state.
    """

    micro_batch_size: int
    num_tokens: int
    micro_batches: int
    dtype: torch.dtype


def make_offloader(
    plan: Recompute | None,
    wan: WanConfig,
    mesh: Mesh,
    backend: Backend,
    step: StepShape,
    *,
    processes_of_node: int | None = None,
    timeline: list[TransferEvent] | None = None,
) -> Offloader | None:
    """The offloader of this rank; None for a plan that offloads nothing.

    Args:
        plan, wan, mesh, backend, step: the run.
        processes_of_node: that share its memory; None does not look at what is free.
        timeline: of the offloader.

    Raises:
        ConfigError: CFG-049 when this rank's share of the node's free memory is smaller than the pool.
    """
    if plan is None or not plan.offload:
        return None
    slots, size = pool_slots(plan, wan, mesh, step.micro_batches), slot_bytes(plan, wan, mesh, step)
    if processes_of_node is not None:
        _check_host_memory(slots * size, free_host_bytes() // processes_of_node)
    return Offloader(queues_of(backend), slots, size, timeline)


def pool_slots(plan: Recompute, wan: WanConfig, mesh: Mesh, micro_batches: int) -> int:
    """Layers that wait in host memory at the same time: those of every pass that is under way."""
    layers = max(_leaving(plan, number) for number in _blocks_of_stages(wan, mesh))
    return layers * mesh.layout.passes_in_flight(mesh.pp_rank, micro_batches)


def slot_bytes(plan: Recompute, wan: WanConfig, mesh: Mesh, step: StepShape) -> int:
    """Shapes of a group's input, and of what its blocks keep of attention."""
    batch, itemsize = step.micro_batch_size, step.dtype.itemsize
    layout = mesh.layout
    # Ulysses gathers the tokens of its ranks and leaves each of them its share of the heads.
    tokens = mesh.tokens.width(step.num_tokens) * mesh.tokens.sp_size * layout.ulysses_size
    heads = wan.num_heads // (layout.tp_size * layout.ulysses_size)
    attention = aligned_bytes(batch * tokens * heads * wan.head_dim, itemsize)
    statistics = aligned_bytes(batch * tokens * heads, max(itemsize, 4))
    each = attention * (4 if plan.kept == "q,k,v,O" else 1) + statistics
    stream = aligned_bytes(batch * mesh.tokens.width(step.num_tokens) * wan.hidden_size, itemsize)
    streams = 2 if wan.side_blocks else 1
    return streams * stream + (plan.group_size + _most_side_blocks(wan, plan.group_size)) * each


def _most_side_blocks(wan: WanConfig, group_size: int) -> int:
    """Side blocks that run with so many consecutive blocks, at most."""
    starts = range(wan.num_layers)
    return max(sum(block in wan.side_blocks for block in range(start, start + group_size)) for start in starts)


def _leaving(plan: Recompute, num_blocks: int) -> int:
    """Groups that keep attention, without the last: it never leaves the device."""
    return max(sum(mode == "keep attention" for _, mode in plan.groups(num_blocks)) - 1, 0)


def _blocks_of_stages(wan: WanConfig, mesh: Mesh) -> list[int]:
    layout = mesh.layout
    return [len(layout.blocks(mesh.pp_rank, vp)) for vp in range(layout.vp_size)] if layout.stages else [wan.num_layers]


def _check_host_memory(num_bytes: int, available: int) -> None:
    if num_bytes > available:
        raise ConfigError(
            "CFG-049",
            f'"attention_async_offload" needs {format_bytes(num_bytes)} of page-locked host memory on this process, '
            f"and {format_bytes(available)} are free for it.",
            "Start fewer processes on the node, let fewer blocks keep their attention "
            "(--recompute-num-layers, --recompute-num-layers-skip-core-attention), use --recompute-keep O, "
            "or raise --context-parallel-size, which divides it.",
        )
