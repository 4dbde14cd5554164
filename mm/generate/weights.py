"""The transformer's weights for generation: from any format, with adapters added, and a fingerprint of the result."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mm.checkpoint.finite import require_finite, rounded
from mm.checkpoint.safetensor_file import bytes_of
from mm.checkpoint.weights import WeightSource, open_weights, require_exactly
from mm.config.model import WanConfig
from mm.config.run.generation import AdapterFile
from mm.errors import ConfigError, Problem, raise_all
from mm.lora.adapter import Adapter, merge_tensor, require_fit
from mm.lora.convert import read_any
from mm.lora.targets import every_linear
from mm.parallel.placement import whole_shapes
from mm.wan.precision import keep_fp32


class GenerationWeights:
    """Every parameter of a transformer by native name, in the dtype that it is used in.

    Attributes:
        source: the weights without adapters.
    """

    def __init__(
        self,
        source: WeightSource,
        adapters: Sequence[tuple[Adapter, float]],
        dtype: torch.dtype,
        fingerprinted: bool,
    ) -> None:
        """Take checked parts: see `open_generation_weights`."""
        self.source = source
        self._fingerprinted = fingerprinted
        self._adapters = adapters
        self._dtype = dtype
        self._digests: dict[str, str] = {}

    def value_of(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The `mm.parallel.apply.ValueOf` of these weights: adapters are added in fp32 and rounded once.

        Raises:
            CheckpointError: CKPT-016 and CKPT-120 for a value that is not finite, or not in the dtype it is used in.
        """
        del shape  # `open_generation_weights` has compared all of them
        value = self.source.read(name)
        if self._adapters:
            value = rounded(name, value, torch.float32)
        for adapter, strength in self._adapters:
            value = merge_tensor(name, value, adapter, strength)
        value = require_finite(name, rounded(name, value, torch.float32 if keep_fp32(name) else self._dtype))
        if self._fingerprinted:
            self._digests[name] = _digest(name, value)
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
    path: str, lora: Iterable[AdapterFile], wan: WanConfig, dtype: torch.dtype, fingerprinted: bool = True
) -> GenerationWeights:
    """Open weights and adapters and check that they fit the model and each other; no tensor is read.

    Args:
        path: as for `mm.checkpoint.weights.open_weights`.
        lora: adapter files, or folders of LoRA runs, and the factors on them.
        wan: the transformer's shape.
        dtype: of the bulk of the parameters.
        fingerprinted: read every value for `GenerationWeights.fingerprint` too, about a second a GB.

    Raises:
        ConfigError: CFG-065 when the weights say that they belong to another model.
        CheckpointError, DataError: what opening raises, CKPT-011 for tensors of another model, DATA-093 for adapters of
            another.
    """
    source = open_weights(path)
    theirs = source.config()
    differing = [] if theirs is None else theirs.differing_fields(wan)
    raise_all(
        ConfigError,
        [
            Problem(
                "CFG-065",
                f"{source.path} has {name} {getattr(theirs, name)}, "
                f"and predictor.{name} in inference_model.json is {getattr(wan, name)}.",
                "Correct the predictor section, or name other weights.",
            )
            for name in differing
        ],
    )
    return with_adapters(source, lora, wan, dtype, fingerprinted)


def with_adapters(
    source: WeightSource, lora: Iterable[AdapterFile], wan: WanConfig, dtype: torch.dtype, fingerprinted: bool
) -> GenerationWeights:
    """`open_generation_weights` of weights that are open and say that they are of the model `wan`; raises as that."""
    shapes = whole_shapes(wan)
    require_exactly(source, shapes)
    adapters = [(read_any(Path(section.path)), section.strength) for section in lora]
    for adapter, _ in adapters:
        require_fit(adapter, every_linear(shapes))
    return GenerationWeights(source, adapters, dtype, fingerprinted)


def weights_fingerprint(model: nn.Module) -> str:
    """What `GenerationWeights.fingerprint` gives for a whole model with these parameters."""
    return _joined({name: _digest(name, parameter) for name, parameter in model.named_parameters()})


def _digest(name: str, value: Tensor) -> str:
    digest = hashlib.sha256(f"{name} {value.dtype} {tuple(value.shape)}:".encode())
    digest.update(bytes_of(value.detach()))
    return digest.hexdigest()


def _joined(digests: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(digests[name] for name in sorted(digests)).encode()).hexdigest()[:16]
