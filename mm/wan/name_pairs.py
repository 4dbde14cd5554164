"""Pairs of names: one tensor of the original Wan's encoders, and the tensors of diffusers or transformers in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


def _one(tensor: Tensor) -> tuple[Tensor, ...]:
    return (tensor,)


def _only(tensors: tuple[Tensor, ...]) -> Tensor:
    return tensors[0]


class Pair(NamedTuple):
    """A tensor of the original file, and the tensors that it is elsewhere.

    Attributes:
        native: its name in the original. hf: their names in diffusers or transformers.
        to_hf, to_native: the values, one way and back; by default they are the same. No element is computed, so that
            both are exact.
    """

    native: str
    hf: tuple[str, ...]
    to_hf: Callable[[Tensor], tuple[Tensor, ...]] = _one
    to_native: Callable[[tuple[Tensor, ...]], Tensor] = _only


def same(native: str, hf: str, kinds: tuple[str, ...] = ("weight", "bias")) -> list[Pair]:
    """The parameters of a module that is the same in both; no kinds: a parameter by itself."""
    if not kinds:
        return [Pair(native, (hf,))]
    return [Pair(f"{native}.{kind}", (f"{hf}.{kind}",)) for kind in kinds]
