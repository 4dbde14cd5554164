"""Adapters from one format to another, and merged into the weights of their base model."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mm.checkpoint.formats import mindspeed, training
from mm.checkpoint.formats.source import TensorKind, WeightSource
from mm.checkpoint.formats.training import no_average
from mm.checkpoint.identify import Found, identify
from mm.checkpoint.identity import identity
from mm.checkpoint.weights import open_weights
from mm.config.model import WanConfig
from mm.lora.adapter import Adapter, merge_tensor, require_fit, require_parts_fit
from mm.lora.files import Family, read_adapter, write_adapter, write_parts
from mm.lora.mindspeed import read_mindspeed, write_mindspeed
from mm.lora.record import BASE_IDENTITY, adapter_of
from mm.lora.targets import every_linear

log = logging.getLogger(__name__)


def read_any(at: Path | Found, *, averaged: bool = False) -> Adapter:
    """The adapter of a LoRA run's checkpoints (the latest), of an MM folder of adapters, or of a file of any family.

    Args:
        at: what `identify` found where adapters are wanted, or a path for it.
        averaged: the average of a run with --ema-decay, in the place of what it trained.

    Raises:
        CheckpointError: CKPT-012, CKPT-013, CKPT-049 and CKPT-081 for checkpoints that cannot be used, and what
            `read_mindspeed` raises.
        DataError: DATA-022 and DATA-090 to DATA-092 for a file that cannot be used.
    """
    found = at if isinstance(at, Found) else identify(at, wanted="adapters")
    if found.format == training.FORMAT:
        return adapter_of(found.path, averaged=averaged)
    if averaged:
        raise no_average(found.asked, "is no training checkpoint")
    return read_mindspeed(found) if found.format == mindspeed.FORMAT else read_adapter(found)


def write_file(source: Path, target: Path, family: Family, *, averaged: bool = False) -> None:
    """Write an adapter of any format as one file; raises what `read_any` and `write_adapter` raise.

    What was trained beside it is no adapter, and goes into a second file: `x.parts.safetensors` beside `x.safetensors`.
    """
    adapter = read_any(source, averaged=averaged)
    write_adapter(target, adapter, family)
    _write_parts(target, adapter)
    log.info("Wrote %d linears to %s (%s names).", len(adapter.updates), target, family)


def lora_to_mm(source: Path, target: Path, *, averaged: bool = False) -> None:
    """Write an adapter of any format as an MM `release`; raises what `read_any` and `write_mindspeed` raise.

    Parts have a file as with `write_file`.
    """
    adapter = read_any(source, averaged=averaged)
    write_mindspeed(target, adapter)
    _write_parts(target, adapter)
    log.info("Wrote %d linears to %s (MM names).", len(adapter.updates), target)


def _write_parts(target: Path, adapter: Adapter) -> None:
    if adapter.parts:
        path = target.with_name(f"{target.name.removesuffix('.safetensors')}.parts.safetensors")
        write_parts(path, adapter)
        log.info("Wrote %d parameters that were trained beside the adapter to %s.", len(adapter.parts), path)


@dataclass(frozen=True)
class MergedWeights:
    """`WeightSource` over a base model with an adapter added to it, one tensor at a time.

    Attributes:
        base: the model. adapter: checked to fit it. strength: factor on the adapter.
    """

    base: WeightSource
    adapter: Adapter
    strength: float

    @property
    def path(self) -> Path:
        """Path of the base."""
        return self.base.path

    @property
    def label(self) -> str:
        """The format of the base."""
        return f"{self.base.label} with an adapter"

    def kinds(self) -> dict[str, TensorKind]:
        """Those of the base."""
        return self.base.kinds()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Those of the base."""
        return self.base.shapes()

    def read(self, name: str) -> Tensor:
        """The sum, rounded once to the dtype of the base; CKPT-016 and CKPT-120 as `merge_tensor`."""
        return merge_tensor(name, self.base.read(name), self.adapter, self.strength)

    def config(self) -> WanConfig | None:
        """Configuration of the base."""
        return self.base.config()


def merged(base_path: Path, adapter_path: Path, strength: float = 1.0, *, averaged: bool = False) -> MergedWeights:
    """Open a base model with an adapter; a warning tells where the adapter was trained on another base.

    Raises:
        DataError: DATA-093 when the adapter does not fit, and what `read_any` and `open_weights` raise.
        CheckpointError: what `read_any` and `open_weights` raise.
    """
    base, adapter = open_weights(base_path), read_any(adapter_path, averaged=averaged)
    require_fit(adapter, every_linear(base.shapes()))
    require_parts_fit(adapter, base.shapes())
    kinds = base.kinds()
    coarse = [name for name in adapter.updates if kinds[f"{name}.weight"].dtype.itemsize == 1]
    if coarse:
        message = (
            "%s has %d of the adapter's linears in 8 bits, %s, and so will the result, in which small updates may be "
            "rounded away; a base in bfloat16 keeps them."
        )
        log.warning(message, base_path, len(coarse), kinds[f"{coarse[0]}.weight"].dtype)
    theirs = adapter.texts.get(BASE_IDENTITY)
    ours = identity(base) if theirs else None
    if theirs != ours:
        log.warning("%s was trained on a base with identity %s; %s has %s.", adapter_path, theirs, base_path, ours)
    return MergedWeights(base, adapter, strength)
