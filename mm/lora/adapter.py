"""An adapter as data: the two matrices and alpha of every linear by native name, and merging it into weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from mm.checkpoint.finite import require_finite, rounded, wide
from mm.errors import CheckpointError, DataError
from mm.lora.layer import Adapted
from mm.lora.targets import Sizes, every_linear


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

    @classmethod
    def of(cls, where: str, a: Tensor, b: Tensor, alpha: float | None) -> Update:
        """The update of one linear in a file of others.

        Args:
            where: file and linear, for messages.
            a, b: its matrices, of any floating point dtype, each of its own.
            alpha: None where the file has none, which means r.

        Raises:
            DataError: DATA-092 for matrices or alpha that contradict each other or are no floating point numbers,
                DATA-130 for values that are not finite.
        """
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.numel() or not b.numel():
            raise contradiction(f"{where} has A {list(a.shape)} and B {list(b.shape)}, expected [r, in] and [out, r]")
        if not (a.is_floating_point() and b.is_floating_point()):
            raise contradiction(f"{where} has A in {a.dtype} and B in {b.dtype}, expected floating point")
        alpha = float(a.shape[0]) if alpha is None else alpha
        if not math.isfinite(alpha):
            raise contradiction(f"{where} has alpha {alpha}, expected a finite number")
        try:
            require_finite(f"A of {where}", a)
            require_finite(f"B of {where}", b)
        except CheckpointError as error:
            found = error.problems[0].message.split(";")[0]
            remedy = "Use another file, or one saved earlier in its training."
            raise DataError("DATA-130", f"{found}.", remedy) from None
        return cls(a, b, alpha)

    @property
    def rank(self) -> int:
        """The width between A and B."""
        return self.a.shape[0]

    def delta(self, strength: float = 1.0) -> Tensor:
        """strength (alpha / r) B A, [out_features, in_features] in fp32, or in fp64 if A or B is."""
        dtype = torch.promote_types(wide(self.a.dtype), wide(self.b.dtype))
        return (self.b.to(dtype) @ self.a.to(dtype)) * (strength * self.alpha / self.rank)


@dataclass(frozen=True)
class Adapter:
    """Updates of linears, and what belongs to them.

    Attributes:
        updates: by native module name, such as `blocks.0.self_attn.q`. texts: recorded with them.
        parts: by native name the values of parameters that were trained themselves, beside the updates; whole.
    """

    updates: Mapping[str, Update]
    texts: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, Tensor] = field(default_factory=dict)

    def adapted(self) -> dict[str, Adapted]:
        """r and alpha of every linear, for `mm.lora.layer.add_adapters`."""
        return {name: Adapted(update.rank, update.alpha) for name, update in self.updates.items()}

    def parameters(self) -> dict[str, Tensor]:
        """The values of the parameters `<module>.lora_A` and `<module>.lora_B` of an adapted model, and its parts."""
        halves = {
            f"{name}.{half}": value
            for name, update in self.updates.items()
            for half, value in (("lora_A", update.a), ("lora_B", update.b))
        }
        return {**halves, **self.parts}

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


def contradiction(what: str) -> DataError:
    """The error DATA-092 about the parts of an adapter."""
    return DataError("DATA-092", f"{what}.", "Save, copy or download the adapter again.")


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


def require_parts_fit(adapter: Adapter, shapes: Mapping[str, Sequence[int]]) -> None:
    """Check that the parts are parameters of a model of these shapes; DATA-093."""
    misfits = [
        f"{name} is {list(value.shape)} in the adapter, {list(shapes[name]) if name in shapes else 'not'} in the model"
        for name, value in adapter.parts.items()
        if tuple(shapes.get(name, ())) != tuple(value.shape)
    ]
    if misfits:
        raise DataError(
            "DATA-093",
            f"{len(misfits)} of the {len(adapter.parts)} parameters beside the adapter do not fit the model: "
            f"{'; '.join(misfits[:10])}{'; ...' if len(misfits) > 10 else ''}.",
            "Use an adapter that was trained for this size and task of Wan2.1.",
        )


def merge_tensor(name: str, weight: Tensor, adapter: Adapter, strength: float = 1.0) -> Tensor:
    """One parameter of the merged model: itself, unless it was trained or is the weight of a linear with an update.

    Args:
        name: native parameter name.
        weight: its value; the sum is computed in fp32 (fp64 for fp64) and rounded once to its dtype.
        adapter: checked by `require_fit` and `require_parts_fit`.
        strength: factor on the update, and on the difference that training made to the parameter.

    Raises:
        CheckpointError: CKPT-016 and CKPT-120 for a sum that is not finite in that dtype.
    """
    if name in adapter.parts:
        return rounded(name, _moved(weight, adapter.parts[name], strength), weight.dtype)
    module, _, kind = name.rpartition(".")
    if kind != "weight" or module not in adapter.updates:
        return weight
    delta = adapter.updates[module].delta(strength)
    dtype = wide(weight.dtype)
    return rounded(name, weight.to(dtype) + delta.to(weight.device, dtype), weight.dtype)


def _moved(weight: Tensor, trained: Tensor, strength: float) -> Tensor:
    dtype = wide(weight.dtype)
    there = trained.to(weight.device, dtype)
    return there if strength == 1 else torch.lerp(weight.to(dtype), there, strength)


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
    require_fit(adapter, every_linear(shapes))
    require_parts_fit(adapter, shapes)
    return ((name, merge_tensor(name, weights.read(name), adapter, strength)) for name in shapes)
