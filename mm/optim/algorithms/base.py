"""Declaration of an optimizer: the state that it keeps of each parameter, and the arithmetic of its updates.

Everything else follows from the declaration, on every layout: what a rank keeps, checkpoints and their memory, the dry
run, the advice when memory runs out, the checks before a run. No other file knows the name of a moment.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mm.config.optimizer import OptimizerName
from mm.optim.settings import UpdateSettings

Groups = list[dict[str, Any]]
"""Parameter groups as torch's optimizers take them, each with its own `weight_decay`."""


@dataclass(frozen=True)
class ElementState:
    """State with one number for each element of a parameter.

    That is its shape rule: it is cut, owned and saved as the parameter's master is. State of another shape, such as
    sums over rows, is another class, and `ParamShard` and checkpoints would have to learn how it is cut.

    Attributes:
        name: under which torch's optimizer keeps it, and checkpoints after `optimizer.`. dtype: of the numbers.
    """

    name: str
    dtype: torch.dtype = torch.float32


class Algorithm(abc.ABC):
    """An optimizer over fp32 master weights, whose update looks at each element alone.

    Attributes:
        name: of `--optimizer`. title: what people call it.
        state: what it keeps.
        step_key: the scalar of a checkpoint that says how many updates it has made, where its next one depends on that.
        fused: whether it has a kernel for the whole update of a parameter.
    """

    name: OptimizerName
    title: str
    state: Sequence[ElementState]
    step_key: str | None = None
    fused: bool = False

    @abc.abstractmethod
    def make(self, groups: Groups, settings: UpdateSettings) -> torch.optim.Optimizer:
        """The torch optimizer of some parameters."""

    def take_over(self, made: torch.optim.Optimizer, settings: UpdateSettings) -> torch.optim.Optimizer:
        """The optimizer to use where megatron-core, which knows only some, has made an AdamW that has no state yet."""
        own = made.defaults.keys() - {"lr", "weight_decay"}
        groups = [{key: value for key, value in group.items() if key not in own} for group in made.param_groups]
        inner = self.make([{**group, "params": []} for group in groups], settings)
        for group, theirs in zip(inner.param_groups, groups, strict=True):
            group["params"] = theirs["params"]  # ranges of a flat buffer among them, which torch takes only this way
        return inner

    def new_state(self, inner: torch.optim.Optimizer, key: Tensor) -> dict[str, Tensor]:
        """The state of a parameter before its first update, complete: torch's optimizers take a part for the whole."""
        return {one.name: torch.zeros_like(key, dtype=one.dtype) for one in self.state}

    def steps_made(self, inner: torch.optim.Optimizer) -> Iterable[float]:
        """Numbers of updates that parameters have had, where it counts them."""
        return ()

    def set_steps_made(self, inner: torch.optim.Optimizer, count: int) -> None:  # noqa: B027  not all count
        """Set that count on every parameter, whose state must be there already."""

    @property
    def bytes_per_element(self) -> int:
        """Bytes of what it keeps, beside the master weight."""
        return sum(one.dtype.itemsize for one in self.state)
