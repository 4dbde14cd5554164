"""Opening the weights of a Wan transformer, whatever their format, and loading them into a model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import nn

from mm.checkpoint.formats.folder import FolderWeights
from mm.checkpoint.formats.layer_zero import LayerZeroWeights, is_layer_zero
from mm.checkpoint.formats.mindspeed import MindSpeedWeights, is_mm_folder
from mm.checkpoint.formats.source import WeightSource
from mm.checkpoint.formats.training import TrainingWeights, is_training_checkpoint, no_average
from mm.checkpoint.mismatch import raise_on_mismatch
from mm.errors import CheckpointError
from mm.wan.folder import WeightFolder

__all__ = ["LoadReport", "WeightSource", "load_into", "open_weights", "require_exactly"]

log = logging.getLogger(__name__)

_DEEPSPEED = ("*zero_pp_rank_*_optim_states.pt", "*_model_states.pt", "*/*_optim_states.pt", "*/*_model_states.pt")
"""Files of DeepSpeed's checkpoints, in the folder of a step or in the one that its file `latest` names."""


@dataclass(frozen=True)
class LoadReport:
    """What `load_into` did: tensors and elements loaded, and how many tensors changed their dtype on the way."""

    num_tensors: int
    numel: int
    num_cast: int


def open_weights(path: str | Path, *, averaged: bool = False) -> WeightSource:
    """Open a training checkpoint, an MM folder, a layer-zero save of MindSpeed, or safetensors, told apart by content.

    A folder may hold several, as the target of a conversion into the folder of its source does. Then what training
    saved comes before what was converted for training, and that before the source.

    Args:
        path: the folder (or one safetensors file).
        averaged: the average of the weights that `--ema-decay` keeps, in the place of the weights.

    Raises:
        CheckpointError: CKPT-010 to CKPT-021 for a training checkpoint or MM folder that cannot be used, CKPT-041 to
            CKPT-043 for one of a pipeline, CKPT-045 for a layer-zero save; CKPT-019 when there is nothing that could be
            weights, CKPT-047 for a checkpoint of DeepSpeed, CKPT-049 for an average that is not there.
        DataError: DATA-020 to DATA-031 for safetensors that cannot be used.
    """
    path = Path(path)
    if is_training_checkpoint(path):
        return TrainingWeights.open(path, averaged=averaged)
    if averaged:
        raise no_average(path, "is no training checkpoint")
    if is_layer_zero(path):
        return LayerZeroWeights.open(path)
    if is_mm_folder(path):
        return MindSpeedWeights.open(path)
    refuse_deepspeed(path)
    if path.is_dir() and not any(path.glob("*.safetensors*")) and not (path / "transformer").is_dir():
        raise CheckpointError(
            "CKPT-019",
            f"{path} holds no weights: no *.safetensors, no latest_checkpointed_iteration.txt, no iter_* folder.",
            "Give a Hugging Face or native transformer folder, an MM folder or a folder of training checkpoints.",
        )
    return FolderWeights(WeightFolder.open(path))


def refuse_deepspeed(path: Path) -> None:
    """Say what to do with a folder of DeepSpeed's, whose files are pickles of its classes; safetensors in it are used.

    Raises:
        CheckpointError: CKPT-047.
    """
    found = next(chain.from_iterable(path.glob(pattern) for pattern in _DEEPSPEED), None)
    if found is None or any(path.glob("*.safetensors")):
        return
    remedy = (
        f"Give {path / 'transformer'}, which has the same weights."
        if (path / "transformer").is_dir()
        else "If you trust it, run the zero_to_fp32.py that DeepSpeed put into it, with --safe_serialization, where "
        "DeepSpeed is installed; its safetensors are read here."
    )
    raise CheckpointError(
        "CKPT-047",
        f"{path} is a checkpoint of DeepSpeed ({found.relative_to(path)}), whose files are pickles that need its code "
        "to be read; untrusted ones can run any.",
        remedy,
    )


def load_into(model: nn.Module, source: WeightSource) -> LoadReport:
    """Fill every parameter of `model` (native names, on any device but meta); each takes its own dtype.

    Raises:
        CheckpointError: CKPT-011 for missing, unexpected or mis-shaped tensors; the model is unchanged then.
    """
    parameters = dict(model.named_parameters())
    require_exactly(source, {name: tuple(parameter.shape) for name, parameter in parameters.items()})
    if any(parameter.is_meta for parameter in parameters.values()):
        raise ValueError("parameters on the meta device hold nothing; give the model a device first")
    num_cast = 0
    for name, parameter in parameters.items():
        value = source.read(name)
        num_cast += value.dtype != parameter.dtype
        with torch.no_grad():
            parameter.copy_(value)
    report = LoadReport(len(parameters), sum(p.numel() for p in parameters.values()), num_cast)
    log.info("Loaded %d tensors from %s (%s), %d cast.", report.num_tensors, source.path, source.label, num_cast)
    return report


def require_exactly(source: WeightSource, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check that `source` holds exactly the tensors of `expected` (native name to shape).

    Raises:
        CheckpointError: CKPT-011.
    """
    found = source.shapes()
    raise_on_mismatch(
        f"{source.path} ({source.label})",
        sorted(expected.keys() - found.keys()),
        sorted(found.keys() - expected.keys()),
        [
            f"{name} is {list(found[name])} there, {list(shape)} here"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ],
    )
