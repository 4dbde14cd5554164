"""Opening the weights of a Wan transformer, whatever their format, and loading them into a model."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mm.checkpoint.formats import training
from mm.checkpoint.formats.source import WeightSource
from mm.checkpoint.formats.table import FORMATS, refuse
from mm.checkpoint.formats.training import TrainingWeights, no_average
from mm.checkpoint.identify import Found, identify
from mm.checkpoint.mismatch import require_exactly

__all__ = ["LoadReport", "WeightSource", "load_into", "open_weights"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadReport:
    """Report of `load_into`: tensors and elements loaded, and how many tensors changed their dtype on the way."""

    num_tensors: int
    numel: int
    num_cast: int


def open_weights(at: str | Path | Found, *, averaged: bool = False) -> WeightSource:
    """Open a training checkpoint, an MM folder, a layer-zero save of MindSpeed, or safetensors, told apart by content.

    A folder may hold several, as the target of a conversion into the folder of its source does. Then what training
    saved comes before what was converted for training, and that before the source.

    Args:
        at: what `identify` found, or a path for it.
        averaged: the average of the weights that `--ema-decay` keeps, in the place of the weights.

    Raises:
        CheckpointError: CKPT-010 to CKPT-021 for a training checkpoint or MM folder that cannot be used, CKPT-041 to
            CKPT-043 for one of a pipeline, CKPT-045 for a layer-zero save; CKPT-019 when there is nothing that could be
            weights, CKPT-047 for a checkpoint of DeepSpeed, CKPT-049 for an average that is not there.
        DataError: DATA-020 to DATA-031 for safetensors that cannot be used.
    """
    found = at if isinstance(at, Found) else identify(at)
    if averaged:
        if found.format != training.FORMAT:
            raise no_average(found.asked, "is no training checkpoint")
        return TrainingWeights.open(found, averaged=True)
    row = next((row for row in FORMATS if row.name == found.format), None)
    return refuse(found) if row is None else row.open(found)


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
