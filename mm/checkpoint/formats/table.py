"""The weight formats that are known: how each is recognised, and how it is opened. One row a format.

To add one, write its reader, a file of this folder with `recognise` and a `WeightSource`, and its row here. The first
row that recognises a path decides, so that what a training run saved comes before what was converted for training, and
that before the source.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

from mm.checkpoint import encoders
from mm.checkpoint.formats import deepspeed, folder, layer_zero, mindspeed, training
from mm.checkpoint.formats.found import Found, Wanted
from mm.checkpoint.formats.source import WeightSource
from mm.errors import CheckpointError
from mm.wan.shards import no_weights


class WeightFormat(NamedTuple):
    """A row.

    Attributes:
        name: of the format, for messages.
        recognise: what is at a path, from names and headers alone, or None where it is another format; raises the
            format's errors where it is damaged or ambiguous.
        open: a model's tensors from what was found.
    """

    name: str
    recognise: Callable[[Path, Wanted], Found | None]
    open: Callable[[Found], WeightSource]


def refuse(found: Found) -> NoReturn:
    """Say that there are no weights of a transformer.

    Raises:
        CheckpointError: CKPT-019 for a folder without any. DataError: DATA-020 for everything else.
    """
    if found.format == "folder":
        raise CheckpointError(
            "CKPT-019",
            f"{found.asked} holds no weights: no *.safetensors, no latest_checkpointed_iteration.txt, no iter_* "
            "folder.",
            "Give a Hugging Face or native transformer folder, an MM folder or a folder of training checkpoints.",
        )
    raise no_weights(found.asked, "file" if found.format == encoders.FORMAT else found.format)


FORMATS = (
    WeightFormat(training.FORMAT, lambda path, _: training.recognise(path), training.TrainingWeights.open),
    WeightFormat(layer_zero.FORMAT, lambda path, _: layer_zero.recognise(path), layer_zero.LayerZeroWeights.open),
    WeightFormat(mindspeed.FORMAT, lambda path, _: mindspeed.recognise(path), mindspeed.MindSpeedWeights.open),
    WeightFormat(deepspeed.FORMAT, lambda path, _: deepspeed.recognise(path), deepspeed.refuse),
    WeightFormat(folder.FORMAT, folder.recognise, folder.FolderWeights.open),
    WeightFormat(encoders.FORMAT, lambda path, _: encoders.recognise(path), refuse),
)
