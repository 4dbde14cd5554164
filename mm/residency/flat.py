"""The parameters of one block in one piece of memory, so that they are copied at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mm.device.queues import aligned_bytes
from mm.residency.plan import BlockSize


@dataclass(frozen=True)
class FlatParameter:
    """One parameter's place in the memory of its block.

    Attributes:
        name: in the block, `self_attn.q.weight`. module, attribute: who holds it.
        shape, dtype: of it. start: first byte.
    """

    name: str
    module: nn.Module
    attribute: str
    shape: torch.Size
    dtype: torch.dtype
    start: int

    def of(self, memory: Tensor) -> Tensor:
        """The parameter as a view of the block's memory, uint8."""
        size = self.shape.numel() * self.dtype.itemsize
        return memory[self.start : self.start + size].view(self.dtype).view(self.shape)


class FlatBlock:
    """A block whose parameters lie in one piece of memory or another.

    Attributes:
        parameters: in the block's order. size: of all of them.
    """

    def __init__(self, block: nn.Module) -> None:
        """Lay out a block, which may be on the meta device; its parameters are in the dtypes that they keep."""
        start, found = 0, []
        for name, parameter in block.named_parameters():
            path, _, attribute = name.rpartition(".")
            module = block.get_submodule(path)
            found.append(FlatParameter(name, module, attribute, parameter.shape, parameter.dtype, start))
            start += aligned_bytes(parameter.numel(), parameter.itemsize)
        self.parameters = tuple(found)
        self.size = BlockSize(start, sum(parameter.shape.numel() for parameter in found))
        self._waiting = self._held()

    @property
    def is_trained(self) -> bool:
        """True where a parameter requires a gradient."""
        return any(parameter.requires_grad for parameter in self._waiting)

    def wait(self) -> None:
        """Put parameters without memory in their places: nobody computes with weights that are not there."""
        self._waiting = tuple(nn.Parameter(held.to("meta"), held.requires_grad) for held in self._waiting)
        self.put(self._waiting)

    def views(self, memory: Tensor) -> tuple[nn.Parameter, ...]:
        """Parameters of the block as views of some memory, uint8 [at least its bytes]."""
        return tuple(nn.Parameter(one.of(memory), requires_grad=False) for one in self.parameters)

    def put(self, values: Sequence[nn.Parameter]) -> None:
        """Give the block these parameters. It costs no memory and no tensor is made."""
        for one, value in zip(self.parameters, values, strict=True):
            one.module._parameters[one.attribute] = value

    def take_away(self) -> None:
        """Give it parameters without memory again."""
        self.put(self._waiting)

    def _held(self) -> tuple[nn.Parameter, ...]:
        held = (one.module._parameters[one.attribute] for one in self.parameters)
        return tuple(parameter for parameter in held if parameter is not None)
