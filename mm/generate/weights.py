"""The transformer's weights for generation: from any format, with adapters added, and a fingerprint of the result."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mm.checkpoint.comm import Comm, SingleProcess, on_rank_zero
from mm.checkpoint.finite import require_finite, rounded
from mm.checkpoint.identify import identify
from mm.checkpoint.mismatch import Expected
from mm.checkpoint.safetensor_file import bytes_of
from mm.checkpoint.weights import WeightSource, open_weights
from mm.config.model import WanConfig
from mm.config.run.generation import AdapterFile
from mm.lora.adapter import Adapter, merge_tensor, require_fit, require_parts_fit
from mm.lora.convert import read_any
from mm.lora.layer import keep_in_low_bits
from mm.lora.low_bit import SCALE, quantised
from mm.lora.targets import Sizes, every_linear, linears_of
from mm.parallel.apply import ValueOf
from mm.parallel.placement import whole_shapes
from mm.parallel.trainable_extension import TrainableExtension
from mm.wan.model import WanModel
from mm.wan.precision import keep_fp32

Fp8Kind = Literal["scaled", "unscaled"]


@dataclass(frozen=True)
class Fp8:
    """Linears whose weights are in e4m3, by native module name, with their (out_features, in_features)."""

    kind: Fp8Kind
    linears: Mapping[str, Sizes]

    def extension(self) -> TrainableExtension:
        """Extension that `mm.parallel.apply.apply_frozen` adds to a model: the scales."""
        scales = {f"{name}.{SCALE}": (rows,) for name, (rows, _) in self.linears.items()}
        return TrainableExtension(self.prepare, scales, {})

    def prepare(self, model: WanModel) -> None:
        """Make the linears of a model on the meta device such that take 8-bit weights."""
        keep_in_low_bits(model, self.linears, "fp8")


class GenerationWeights:
    """Every parameter of a transformer by native name, in the dtype that it is used in.

    Attributes:
        source: the weights without adapters. places: where these and the adapters are.
        fp8: linears whose weights are in eight bits, if any.
    """

    def __init__(
        self,
        source: WeightSource,
        adapters: Sequence[tuple[Adapter, float]],
        dtype: torch.dtype,
        fingerprinted: bool,
        fp8: Fp8 | None = None,
        adapter_places: Sequence[Path] = (),
    ) -> None:
        """Take checked parts: see `open_generation_weights`."""
        self.source = source
        self.places = (source.path, *adapter_places)
        self.fp8 = fp8
        self._fingerprinted = fingerprinted
        self._adapters = adapters
        self._dtype = dtype
        self._digests: dict[str, str] = {}
        self._value = self._values()

    def value_of(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The `mm.parallel.apply.ValueOf` of these weights: adapters are added in fp32 and rounded once.

        Raises:
            CheckpointError: CKPT-016 and CKPT-120 for a value that is not finite, or not in the dtype it is used in.
        """
        del shape  # `open_generation_weights` has compared all of them
        value = require_finite(name, self._value(name))
        if self._fingerprinted:
            self._digests[name] = _digest(name, value)
        return value

    def again(self) -> ValueOf:
        """`value_of` for values that it has given already, in another thread: neither looked at nor hashed again."""
        value = self._values()
        return lambda name, shape: value(name)

    def _values(self) -> Callable[[str], Tensor]:
        """Values by name, in the dtype that they are used in."""
        if self.fp8 is None:
            return lambda name: self._rounded(name, self._merged(name))
        linears, scaled = self.fp8.linears, self.fp8.kind == "scaled"
        return quantised(partial(self._before_fp8, linears, scaled), linears, "fp8", scaled)

    def _before_fp8(self, linears: Collection[str], scaled: bool, name: str) -> Tensor:
        """Weights that are kept in fp8 are rounded once, from the precision that they are stored in."""
        value = self._merged(name)
        if name.removesuffix(".weight") not in linears:
            return self._rounded(name, value)
        if not scaled:
            rounded(name, value, torch.float8_e4m3fn)  # refuses what does not fit
        return require_finite(name, value)

    def _rounded(self, name: str, value: Tensor) -> Tensor:
        return rounded(name, value, torch.float32 if keep_fp32(name) else self._dtype)

    def _merged(self, name: str) -> Tensor:
        value = self.source.read(name)
        if self._adapters:
            value = rounded(name, value, torch.float32)
        for adapter, strength in self._adapters:
            value = merge_tensor(name, value, adapter, strength)
        return value

    def adapter_fingerprints(self) -> list[str]:
        """Sixteen hexadecimal digits of each adapter's matrices and alphas, whatever file they came from."""
        return [
            _joined(
                {name: _digest(name, value) for name, value in adapter.parameters().items()}
                | {f"{name}.alpha": str(update.alpha) for name, update in adapter.updates.items()}
            )
            for adapter, _ in self._adapters
        ]

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of all parameters that `value_of` has given, whatever files they came from."""
        return _joined(self._digests)


def open_generation_weights(
    path: str,
    adapters: Iterable[AdapterFile],
    expected: Expected,
    dtype: torch.dtype,
    fingerprinted: bool = True,
    comm: Comm | None = None,
    *,
    fp8: Fp8Kind | None = None,
) -> GenerationWeights:
    """Open weights and adapters and check that they fit the model and each other; no weight of the model is read.

    Args:
        path: as for `mm.checkpoint.weights.open_weights`.
        adapters: files, or folders of LoRA runs, and the factors on them.
        expected: the transformer that they must be of.
        dtype: of the bulk of the parameters.
        fingerprinted: read every value for `GenerationWeights.fingerprint` too, about a second a GB.
        comm: the ranks; every one calls it.
        fp8: weights of the blocks' linears in e4m3.

    Raises:
        ConfigError: CFG-065 when the weights say that they belong to another model.
        CheckpointError, DataError: what opening raises, CKPT-011 for tensors of another model, DATA-093 for adapters of
            another.
    """
    comm = comm or SingleProcess()
    source = open_weights(identify(path, comm))
    on_rank_zero(comm, lambda: expected.require(source))
    return with_adapters(source, adapters, expected.config, dtype, fingerprinted, comm, fp8=fp8)


def with_adapters(
    source: WeightSource,
    adapters: Iterable[AdapterFile],
    wan: WanConfig,
    dtype: torch.dtype,
    fingerprinted: bool,
    comm: Comm | None = None,
    *,
    fp8: Fp8Kind | None = None,
) -> GenerationWeights:
    """`open_generation_weights` of weights that are open and known to be of the model `wan`.

    Raises:
        CheckpointError, DataError: what opening adapters raises, DATA-093 for adapters of another model.
    """
    comm = comm or SingleProcess()
    shapes = whole_shapes(wan)
    linears = every_linear(shapes)
    found = [(identify(section.path, comm, wanted="adapters"), section.strength) for section in adapters]
    read = [(read_any(one), strength) for one, strength in found]
    for adapter, _ in read:
        require_fit(adapter, linears)
        require_parts_fit(adapter, shapes)
    eight_bits = None if fp8 is None else Fp8(fp8, linears_of(shapes))
    return GenerationWeights(source, read, dtype, fingerprinted, eight_bits, [one.path for one, _ in found])


def _digest(name: str, value: Tensor) -> str:
    digest = hashlib.sha256(f"{name} {value.dtype} {tuple(value.shape)}:".encode())
    digest.update(bytes_of(value.detach()))
    return digest.hexdigest()


def _joined(digests: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(digests[name] for name in sorted(digests)).encode()).hexdigest()[:16]
