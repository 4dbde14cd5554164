"""Putting a frozen model's weights where a plan says: on the device, in host memory, or back into their files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mm.device.backend import Backend
from mm.device.queues import Queues, TransferEvent, queues_of
from mm.errors import ConfigError
from mm.parallel.apply import WriteValue
from mm.residency.files import FileSource
from mm.residency.flat import FlatBlock
from mm.residency.plan import BlockSize, WeightPlan
from mm.residency.stream import HostSource, Source, WeightStream
from mm.wan.model import WanModel


@dataclass(frozen=True)
class WeightValues:
    """Values of a model's parameters.

    Attributes:
        first: writes each of them, once. again: the same, with less checking, for what is read from files each time;
            called by another thread.
    """

    first: WriteValue
    again: WriteValue


@dataclass(frozen=True)
class HeldWeights:
    """Weights of a model that lie where a plan says.

    Attributes:
        plan: the plan. blocks: sizes of the model's blocks, in the order in which they run.
        stream: of the blocks that are copied; None where all stay.
        other_bytes: of the parameters that are not the blocks', which stay on the device.
    """

    plan: WeightPlan
    blocks: tuple[BlockSize, ...]
    stream: WeightStream | None
    other_bytes: int

    @property
    def device_bytes(self) -> int:
        """Bytes of device memory that weights take, at most and all the time."""
        return self.other_bytes + self.plan.device_bytes(self.blocks)


def block_sizes(model: WanModel) -> tuple[BlockSize, ...]:
    """Sizes of this rank's blocks and side blocks, in the order in which they run; the model may be on meta."""
    return tuple(FlatBlock(block).size for block in model.blocks_in_order())


def other_bytes(model: WanModel) -> int:
    """Bytes of the parameters that are not the blocks'."""
    everything = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    return everything - sum(p.numel() * p.itemsize for block in model.blocks_in_order() for p in block.parameters())


@torch.no_grad()
def hold_weights(
    model: WanModel,
    plan: WeightPlan,
    backend: Backend,
    values: WeightValues,
    *,
    queues: Queues | None = None,
    timeline: list[TransferEvent] | None = None,
) -> HeldWeights:
    """Give a model on the meta device its weights, in place, for forwards without gradients.

    While a block does not run, the parameters of one that is copied are on the meta device.

    Args:
        model: frozen, in the dtypes that it will have; this rank's part of it.
        plan: of its blocks.
        backend: this process's device. values: of the parameters.
        queues: of the device; None for the backend's. timeline: of the copies.

    Raises:
        ConfigError: CFG-370 where a parameter is to be trained, here or in a later forward.
    """
    if any(parameter.requires_grad for parameter in model.parameters()):
        raise _trained()
    queues = queues or queues_of(backend)
    blocks = model.blocks_in_order()
    flat = [FlatBlock(block) for block in blocks]
    sizes, others = tuple(one.size for one in flat), other_bytes(model)
    away = {number: flat[number] for number in plan.copied}
    names = _names(model)
    inside = {id(one.module) for block in away.values() for one in block.parameters}
    for module in model.modules():
        if id(module) not in inside:
            module.to_empty(device=backend.device, recurse=False)
            for attribute, parameter in module.named_parameters(recurse=False):
                values.first(names[id(module)] + attribute, parameter)
    if not away:
        return HeldWeights(plan, sizes, None, others)
    line = list(away.values())
    stream = WeightStream(queues, line, _sources(plan, line, names, queues, values), timeline)
    for index, number in enumerate(plan.copied):
        blocks[number].register_forward_pre_hook(partial(_enter, stream, index, line[index]), with_kwargs=True)
        blocks[number].register_forward_hook(partial(_leave, stream, index))
    stream.begin_at(0)
    return HeldWeights(plan, sizes, stream, others)


def _sources(
    plan: WeightPlan, line: Sequence[FlatBlock], names: dict[int, str], queues: Queues, values: WeightValues
) -> list[Source]:
    """Read the blocks that are copied, and keep those that wait in host memory."""
    in_host: dict[int, Tensor] = {}
    in_files = [index for index, number in enumerate(plan.copied) if number in plan.from_files]
    for index, block in enumerate(line):
        if index in in_files:
            for one in block.parameters:  # so that a damaged file is found before hours of work
                values.first(names[id(one.module)] + one.attribute, torch.empty(one.shape, dtype=one.dtype))
        else:
            in_host[index] = queues.host_memory(block.size.num_bytes)
            _write(block, names, values.first, in_host[index])
    host = HostSource(in_host)
    if not in_files:
        return [host for _ in line]
    sizes = [line[index].size.num_bytes for index in in_files]
    files = FileSource(queues, in_files, sizes, lambda index, memory: _write(line[index], names, values.again, memory))
    return [files if index in in_files else host for index in range(len(line))]


def _write(block: FlatBlock, names: dict[int, str], write: WriteValue, memory: Tensor) -> None:
    for one in block.parameters:
        write(names[id(one.module)] + one.attribute, one.of(memory))


def _names(model: WanModel) -> dict[int, str]:
    """Prefix of the names of each module's own parameters, by the module's identity."""
    return {id(module): f"{name}." if name else "" for name, module in model.named_modules()}


def _enter(
    stream: WeightStream, number: int, block: FlatBlock, module: nn.Module, args: tuple[Any, ...], more: dict[str, Any]
) -> None:
    del module
    if torch.is_grad_enabled():
        given = [value for value in (*args, *more.values()) if isinstance(value, Tensor)]
        if block.is_trained or any(value.requires_grad for value in given):
            raise _trained()
    stream.enter(number)


def _leave(stream: WeightStream, number: int, module: nn.Module, args: Any, result: Any) -> None:
    del module, args, result
    stream.leave(number)


def _trained() -> ConfigError:
    found = "A model whose weights wait outside of the device was asked for gradients."
    return ConfigError("CFG-370", found, "Call it under torch.no_grad(), or load it without residency.")
