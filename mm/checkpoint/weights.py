"""Opening the weights of a Wan transformer, whatever their format."""

from __future__ import annotations

from pathlib import Path

from mm.checkpoint.formats import training
from mm.checkpoint.formats.source import WeightSource
from mm.checkpoint.formats.table import FORMATS, refuse
from mm.checkpoint.formats.training import TrainingWeights, no_average
from mm.checkpoint.identify import Found, identify

__all__ = ["WeightSource", "open_weights"]


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
