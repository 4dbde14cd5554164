"""Reading the weights out of a training checkpoint.

Its conventions: tensors `model.<native name>` (the fp32 master), `optimizer.<state>.<native name>` with the names that
the optimizer declares (`mm.optim.algorithms`) and, of a run with --ema-decay, `ema.<native name>`; the scalars hold
`step`, `consumed_samples` and `wan_config`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mm.checkpoint.formats.found import Content, Found
from mm.checkpoint.formats.source import TensorKind
from mm.checkpoint.manifest import MANIFEST_NAME, Manifest, read_manifest
from mm.checkpoint.safetensor_file import DTYPES
from mm.checkpoint.store import read_tensor
from mm.config.base import parse
from mm.config.model import WanConfig
from mm.errors import CheckpointError, ConfigError

FORMAT = "a training checkpoint"
MODEL_PREFIX, AVERAGE_PREFIX = "model.", "ema."
DECAY_KEY = "ema_decay"
"""Of the scalars: a checkpoint that has it holds the average of its weights."""
CONFIG_KEY = "wan_config"
STATE_KEY = "optimizer_state"
"""Of the scalars: whether the state of an optimizer is there that does not count its updates."""
STEPS_KEY = "steps"
"""Of the scalars: `mm.config.step.StepSettings` of the run; checkpoints of earlier versions do not have it."""
ADAPTERS_KEY = "adapters"
"""Of the scalars: a checkpoint that has it holds adapters and no model."""


@dataclass(frozen=True)
class TrainingWeights:
    """`WeightSource` over one committed training checkpoint.

    Attributes:
        prefix: of the tensors that are read, the masters or their average.
    """

    path: Path
    manifest: Manifest
    label: str = FORMAT
    prefix: str = MODEL_PREFIX

    @classmethod
    def open(cls, found: Found, *, averaged: bool = False) -> TrainingWeights:
        """Open what `recognise` found.

        Args:
            found: of this format. averaged: read the average of the weights in their place.

        Raises:
            CheckpointError: CKPT-012 when it is damaged, CKPT-019 when it holds no model weights, CKPT-049 when it
                holds no average, CKPT-084 when it holds adapters alone.
        """
        path, manifest = found.path, read_manifest(found.path)
        if manifest.scalars.get(ADAPTERS_KEY) is not None:
            raise CheckpointError(
                "CKPT-084",
                f"{path} holds adapters of a LoRA run, not a model.",
                "Merge them into their base model first: mm convert --mode merge_lora. To train them further, "
                "give LoRA's flags, and the base model to --load-base-model.",
            )
        if not any(key.startswith(MODEL_PREFIX) for key in manifest.tensors):
            raise CheckpointError(
                "CKPT-019", f"{path} holds no tensors model.*.", "Use a checkpoint that a training run saved."
            )
        return cls(path, manifest, prefix=weights_prefix(path, manifest, averaged=averaged))

    def kinds(self) -> dict[str, TensorKind]:
        """Kinds by the manifest."""
        tensors = self.manifest.tensors
        names = [key.removeprefix(MODEL_PREFIX) for key in tensors if key.startswith(MODEL_PREFIX)]
        records = {name: tensors[key] for name in names if (key := self._key(name)) in tensors}
        return {name: TensorKind(record.shape, DTYPES[record.dtype]) for name, record in records.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by the manifest."""
        return {name: kind.shape for name, kind in self.kinds().items()}

    def read(self, name: str) -> Tensor:
        """Put together from its pieces."""
        return read_tensor(self.path, self.manifest, self._key(name))

    def _key(self, name: str) -> str:
        """Key of a weight; what a run has frozen has no average, and is the same in it."""
        key, steps = self.prefix + name, self.manifest.scalars.get(STEPS_KEY)
        froze = isinstance(steps, dict) and steps.get("trainable") is not None
        return MODEL_PREFIX + name if froze and key not in self.manifest.tensors else key

    def config(self) -> WanConfig | None:
        """Configuration by the scalars.

        Raises:
            CheckpointError: CKPT-012 when they hold something else under that name.
        """
        values = self.manifest.scalars.get(CONFIG_KEY)
        if values is None:
            return None
        try:
            return parse(WanConfig, values, f"{self.path / MANIFEST_NAME}, {CONFIG_KEY}")
        except ConfigError as error:
            problem = error.problems[0]
            raise CheckpointError("CKPT-012", problem.message, "Use a checkpoint of this version.") from None


def weights_prefix(path: Path, manifest: Manifest, *, averaged: bool) -> str:
    """Prefix of the tensors of a checkpoint's weights, or of their average.

    Raises:
        CheckpointError: CKPT-049 where it has none.
    """
    if averaged and manifest.scalars.get(DECAY_KEY) is None:
        raise no_average(path, "is a checkpoint of a run without --ema-decay")
    return AVERAGE_PREFIX if averaged else MODEL_PREFIX


def no_average(path: Path, what: str) -> CheckpointError:
    """The error CKPT-049."""
    return CheckpointError(
        "CKPT-049",
        f"{path} {what}; there are no averaged weights in it.",
        "Leave --weights ema out, or give the --save folder of a run with --ema-decay.",
    )


def recognise(path: Path) -> Found | None:
    """Facts that a committed training checkpoint holds.

    Raises:
        CheckpointError: CKPT-012 when it is damaged.
    """
    if not (path / MANIFEST_NAME).exists():
        return None
    manifest = read_manifest(path)
    content: Content = "model" if any(key.startswith(MODEL_PREFIX) for key in manifest.tensors) else "unknown"
    if manifest.scalars.get(ADAPTERS_KEY) is not None:
        content = "adapters"
    return Found(path, FORMAT, path, content, step=manifest.step)
