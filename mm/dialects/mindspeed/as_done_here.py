"""Flags of MindSpeed-MM's scripts that say what is done here in other words: read so, and noted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

from mm.config.unread import Unread, if_read
from mm.dialects.mindspeed.accepted import Note
from mm.dialects.mindspeed.mesh_flags import MeshFlags
from mm.dialects.mindspeed.train_flags import TrainFlags

MeshFlagsT = TypeVar("MeshFlagsT", bound=MeshFlags)
TrainFlagsT = TypeVar("TrainFlagsT", bound=TrainFlags)
Read = tuple[dict[str, Any], Note] | None
"""Fields with other values, and what is said of that."""


def training_as_done_here(flags: TrainFlagsT) -> tuple[TrainFlagsT, list[Note]]:
    """A training's command line with the values that it has here, and what they were. Fields that the user did not
    give stay out of `model_fields_set`.
    """
    return _read(flags, (_sequence_parallel, _base_model, _format))


def mesh_as_done_here(flags: MeshFlagsT) -> tuple[MeshFlagsT, list[Note]]:
    """Result of `training_as_done_here` for the flags that training and generation share."""
    return _read(flags, (_sequence_parallel,))


def _read(flags: MeshFlagsT, readers: tuple[Callable[[Any], Read], ...]) -> tuple[MeshFlagsT, list[Note]]:
    values = {name: getattr(flags, name) for name in type(flags).model_fields}
    notes = []
    for reader in readers:
        found = if_read(partial(reader, flags))
        if found is not None and not isinstance(found, Unread):
            values |= found[0]
            notes.append(found[1])
    return cast(MeshFlagsT, flags.model_construct(_fields_set=flags.model_fields_set, **values)), notes


def _sequence_parallel(flags: MeshFlags) -> Read:
    if not flags.sequence_parallel or flags.tensor_model_parallel_size > 1:
        return None
    why = "without tensor parallelism there is nothing to cut"
    return {"sequence_parallel": False}, Note("--sequence-parallel", "", why)


def _base_model(flags: TrainFlags) -> Read:
    """MindSpeed-MM's LoRA scripts start from a base model that `--load` names."""
    if not flags.lora or flags.load is None or flags.load_base_model is not None:
        return None
    why = "read as the base model of the adapters; with --load-base-model it is where adapters start"
    return {"load": None, "load_base_model": flags.load}, Note("--load", flags.load, why)


def _format(flags: TrainFlags) -> Read:
    """There, too, layer-zero and adapters have files of their own, whatever the format is."""
    if flags.ckpt_format != "torch" or not (flags.layerzero or flags.lora):
        return None
    what = "layer-zero" if flags.layerzero else "adapters"
    why = f"checkpoints of {what} are torch_dist; mm convert writes MindSpeed-MM's files"
    return {"ckpt_format": "torch_dist"}, Note("--ckpt-format", "torch", why)
