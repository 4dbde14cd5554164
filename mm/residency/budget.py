"""The plan that keeps to limits of device and host memory."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from mm.config.model import WanConfig
from mm.config.run.residency import Residency
from mm.config.units import format_bytes, parse_bytes
from mm.device.backend import free_host_bytes
from mm.errors import ConfigError
from mm.residency.hold import block_sizes, other_bytes
from mm.residency.plan import WeightPlan, by_parameters, fewest_copied, least_device_bytes, within_host
from mm.wan.model import WanModel

log = logging.getLogger(__name__)

BUFFER = "512MiB"
"""What is left of a limit where it is not said."""


@dataclass(frozen=True)
class Room:
    """Memory in which the weights of one or more transformers of one shape are planned.

    Attributes:
        free_host: bytes of host memory that this process may lock for all of them, before any is held.
        beside: bytes of device memory that forwards need beside the weights, and what else is there.
        transformers: those that share the limits, alike.
    """

    free_host: int
    beside: int = 0
    transformers: int = 1

    @classmethod
    def now(cls, processes_of_node: int, beside: int = 0, transformers: int = 1) -> Room:
        """The room that there is now, with the node's free host memory in equal parts for its processes."""
        return cls(free_host_bytes() // processes_of_node, beside, transformers)


def plan_weights(model: WanModel, residency: Residency, room: Room) -> WeightPlan:
    """The plan of a section for this rank's part of a model.

    Args:
        model: on the meta device, in the dtypes that it will have.
        residency: checked by `mm.config.rules.residency.residency_problems`.
        room: the memory.

    Raises:
        ConfigError: CFG-373 for a device limit that no plan can keep, CFG-374 for too little host memory.
    """
    blocks, others = block_sizes(model), other_bytes(model)
    if residency.staying_parameters is not None:
        outside = sum(p.numel() for p in model.parameters()) - sum(block.num_parameters for block in blocks)
        plan = by_parameters(blocks, residency.staying_parameters - outside)
    elif residency.device_limit is not None:
        limit = parse_bytes(residency.device_limit)
        reserved = parse_bytes(residency.device_buffer or BUFFER) + room.beside
        found = fewest_copied(blocks, (limit - reserved) // room.transformers - others)
        if found is None:
            least = reserved + room.transformers * (others + least_device_bytes(blocks))
            raise ConfigError(
                "CFG-373",
                f"A device limit of {format_bytes(limit)} cannot be kept: {format_bytes(least)} are needed when all "
                "blocks wait outside of the device.",
                "Raise the limit, lower its buffer, keep weights in fp8, generate fewer or smaller frames at once, or "
                "divide the model over more processes.",
            )
        plan = found
    else:
        return WeightPlan()
    free, limited = room.free_host, residency.host_limit
    allowed = free if limited is None else min(free, parse_bytes(limited))
    most = allowed // room.transformers
    in_host = within_host(plan, blocks, most)
    if in_host is None or (in_host.from_files and residency.host_limit is None):
        raise ConfigError(
            "CFG-374",
            f"{format_bytes(plan.host_bytes(blocks))} of weights wait in page-locked host memory of this process, and "
            f"{format_bytes(most)} are there for it.",
            "Raise or give a host limit, for which the rest is read from files each time; or keep weights in fp8, or "
            "start fewer processes on the node.",
        )
    _tell(in_host, model)
    return in_host


def forward_bytes(wan: WanConfig, num_tokens: int, batch: int, itemsize: int) -> int:
    """Device memory that a forward without gradients takes at most beside weights, inputs and messages.

    Counted with operators that make their fp32 steps one by one, as on devices without kernels of their own
    (`tests/residency/test_budget.py`): 19 tensors as large as the hidden state where queries and keys are normalised,
    or three of the feed-forward's width and five more. A side stream has 12 more.

    Args:
        wan: the model. num_tokens: of this rank. batch: samples of a forward. itemsize: of the hidden state's elements.
    """
    width = max(19 * wan.hidden_size, 3 * wan.ffn_dim + 5 * wan.hidden_size)
    return batch * num_tokens * itemsize * (width + (12 * wan.hidden_size if wan.side_blocks else 0))


def _tell(plan: WeightPlan, model: WanModel) -> None:
    blocks = block_sizes(model)
    files = f", {len(plan.from_files)} of them read from files each time" if plan.from_files else ""
    log.info(
        "%d of %d blocks stay on the device, %d are copied there%s: weights take %s on the device, %s of host memory; "
        "%s are copied in each forward",
        len(blocks) - len(plan.copied),
        len(blocks),
        len(plan.copied),
        files,
        format_bytes(plan.device_bytes(blocks) + other_bytes(model)),
        format_bytes(plan.host_bytes(blocks)),
        format_bytes(plan.copied_bytes(blocks)),
    )
