"""An adapter as data: the two matrices and alpha of every linear by native name, and merging it into weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from mm.errors import DataError
from mm.lora.layer import Adapted
from mm.lora.targets import Sizes


@dataclass(frozen=True)
class Update:
    """The update of one linear, (alpha / r) B A.

    Attributes:
        a: [r, in_features]. b: [out_features, r].
        alpha: always a number: where a file has none, the reader has put there what its family means by that.
    """

    a: Tensor
    b: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """The width between A and B."""
        return self.a.shape[0]

    def delta(self, strength: float = 1.0) -> Tensor:
        """strength (alpha / r) B A, [out_features, in_features] in fp32, or in fp64 if A and B are."""
        dtype = torch.promote_types(self.a.dtype, torch.float32)
        return (self.b.to(dtype) @ self.a.to(dtype)) * (strength * self.alpha / self.rank)


@dataclass(frozen=True)
class Adapter:
    """Updates by native module name, such as `blocks.0.self_attn.q`, and texts that were recorded with them."""

    updates: Mapping[str, Update]
    texts: Mapping[str, str] = field(default_factory=dict)

    def adapted(self) -> dict[str, Adapted]:
        """r and alpha of every linear, for `mm.lora.layer.add_adapters`."""
        return {name: Adapted(update.rank, update.alpha) for name, update in self.updates.items()}

    def parameters(self) -> dict[str, Tensor]:
        """The values of the parameters `<module>.lora_A` and `<module>.lora_B` of an adapted model."""
        return {
            f"{name}.{half}": value
            for name, update in self.updates.items()
            for half, value in (("lora_A", update.a), ("lora_B", update.b))
        }

    @classmethod
    def of_parameters(
        cls, parameters: Mapping[str, Tensor], adapted: Mapping[str, Adapted], texts: Mapping[str, str] | None = None
    ) -> Adapter:
        """The adapter of a trained model.

        Args:
            parameters: whole `<module>.lora_A` and `<module>.lora_B`; other parameters are not looked at.
            adapted: what the model was adapted with.
            texts: to record with it, such as the base model.
        """
        updates = {
            name: Update(parameters[f"{name}.lora_A"].detach(), parameters[f"{name}.lora_B"].detach(), how.alpha)
            for name, how in adapted.items()
        }
        return cls(updates, dict(texts or {}))


class Weights(Protocol):
    """Weights of a whole model by native name, such as `mm.checkpoint.weights.open_weights` gives them."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor."""
        ...


def require_fit(adapter: Adapter, linears: Mapping[str, Sizes]) -> None:
    """Check that every update is one of these linears, and of its size.

    Args:
        adapter: the updates.
        linears: by native module name; for training those of `mm.lora.targets.linears_of`.

    Raises:
        DataError: DATA-093 with the number of misfits and the first ten.
    """
    misfits = []
    for name, update in adapter.updates.items():
        size = (update.b.shape[0], update.a.shape[1])
        if name not in linears:
            misfits.append(f"{name} is none of the model's linears")
        elif linears[name] != size:
            misfits.append(f"{name} is {list(size)} in the adapter, {list(linears[name])} in the model")
    if misfits:
        shown = "; ".join(misfits[:10]) + ("; ..." if len(misfits) > 10 else "")
        raise DataError(
            "DATA-093",
            f"{len(misfits)} of the {len(adapter.updates)} updates of the adapter do not fit the model: {shown}.",
            "Use an adapter that was trained for this size and task of Wan2.1.",
        )


def merge_tensor(name: str, weight: Tensor, adapter: Adapter, strength: float = 1.0) -> Tensor:
    """One parameter of the merged model: itself, unless it is the weight of a linear with an update.

    Args:
        name: native parameter name.
        weight: its value; the sum is computed in fp32 (fp64 for fp64) and rounded once to its dtype.
        adapter: checked by `require_fit`.
        strength: factor on the update.
    """
    module, _, kind = name.rpartition(".")
    if kind != "weight" or module not in adapter.updates:
        return weight
    delta = adapter.updates[module].delta(strength)
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + delta.to(weight.device, wide)).to(weight.dtype)


def merge(weights: Weights, adapter: Adapter, strength: float = 1.0) -> Iterator[tuple[str, Tensor]]:
    """All parameters of the merged model by native name, one at a time.

    Args:
        weights: of the whole base model.
        adapter: the updates.
        strength: factor on them; 0 gives the base model.

    Raises:
        DataError: DATA-093 when the adapter does not fit, before any tensor is read.
    """
    shapes = weights.shapes()
    # adapters of other tools may be of linears outside the blocks too, for which this is the same sum
    linears = {n.removesuffix(".weight"): (s[0], s[1]) for n, s in shapes.items() if len(s) == 2}
    require_fit(adapter, linears)
    return ((name, merge_tensor(name, weights.read(name), adapter, strength)) for name in shapes)
