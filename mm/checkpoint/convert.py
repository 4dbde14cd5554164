"""Conversion of one transformer's weights between the formats, in one process.

Memory is about that of one tensor, as files are mapped and written in a stream. The exception is a training checkpoint
to the MM format, whose files are written from a state dict, which has to be put together first: one pipeline stage.

Every conversion is strict (exactly the model's tensors), leaves existing targets alone, and appears under its target
name in one step.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch

from mm.checkpoint.directory import TRACKER_NAME
from mm.checkpoint.encoders import EncoderSource, encoder_to_hf, encoder_to_native, open_encoder
from mm.checkpoint.expert_band import write_band
from mm.checkpoint.files import (
    added_files,
    new_folder,
    require_absent,
    require_addable,
    require_free_space,
    write_new,
)
from mm.checkpoint.finite import rounded
from mm.checkpoint.formats import hf, mindspeed, native
from mm.checkpoint.formats.layer_zero import LayerZeroWeights
from mm.checkpoint.formats.mindspeed_split import require_blocks
from mm.checkpoint.formats.source import WeightSource
from mm.checkpoint.formats.training import TrainingWeights, no_average
from mm.checkpoint.identify import Found, identify
from mm.checkpoint.mismatch import Expected, require_exactly
from mm.checkpoint.safetensor_file import Entry
from mm.checkpoint.weights import open_weights
from mm.config.layout import Stages
from mm.config.model import WanConfig
from mm.config.run.origins import Word
from mm.errors import CheckpointError
from mm.wan.config_json import infer_config
from mm.wan.folder import WeightFolder
from mm.wan.model import whole_shapes

log = logging.getLogger(__name__)

HF_SHARD_BYTES = hf.MAX_SHARD_BYTES
BF16_SHARD_BYTES = 80 * 10**9
"""VideoX-Fun's default: one file for every model there is."""

Shapes = dict[str, tuple[int, ...]]


def convert_to_mm(source_path: Path, target: Path, stages: Stages | None = None, *, averaged: bool = False) -> None:
    """Write weights of any format as an MM `release` with its tracker, dtypes untouched.

    Args:
        source_path: weights of any format.
        target: may be a folder with other things in it, such as the source itself, as long as it has neither `release`
            nor a tracker nor mm_config.json.
        stages: [VP][PP] blocks of each pipeline stage; None writes one file.
        averaged: write the average of a training checkpoint's weights.

    Raises:
        CheckpointError: CKPT-011, CKPT-020, CKPT-023, CKPT-030, CKPT-031, CKPT-040, or from `open_weights`.
        DataError: from `open_weights`.
    """
    _require_place_for_release(target)
    source = open_weights(source_path, averaged=averaged)
    _write_release(source, target, known_config(source), stages)


def resplit(source_path: Path, target: Path, stages: Stages) -> None:
    """Write an MM checkpoint of any pipeline as one of another, without a need of the model's configuration.

    Raises:
        CheckpointError: CKPT-044 for other formats, and what `convert_to_mm` raises.
        DataError: DATA-028 when the tensors do not tell the model's shape.
    """
    _require_place_for_release(target)
    source = open_weights(source_path)
    if not isinstance(source, mindspeed.MindSpeedWeights):
        raise CheckpointError(
            "CKPT-044",
            f"{source.path} holds {source.label}, not a checkpoint in the MM format.",
            "Use --mode convert_to_mm with --pp_vpp_layers.",
        )
    _write_release(source, target, source.config(), stages)


def layerzero_to_mm(source_path: Path, target: Path, stages: Stages | None = None) -> None:
    """Write a layer-zero save of MindSpeed as an MM `release`, for a pipeline where `stages` are given.

    Raises:
        CheckpointError: CKPT-046 for other formats, and what `convert_to_mm` raises.
        DataError: DATA-028 when the tensors do not tell the model's shape.
    """
    _require_place_for_release(target)
    source = open_weights(source_path)
    if not isinstance(source, LayerZeroWeights):
        raise CheckpointError(
            "CKPT-046",
            f"{source.path} holds {source.label}, not a layer-zero save (model_0.pt, model_1.pt, ...).",
            "Use --mode convert_to_mm.",
        )
    _write_release(source, target, None, stages)


def _require_place_for_release(target: Path) -> None:
    require_addable(target, (mindspeed.RELEASE, mindspeed.CONFIG_NAME), last=TRACKER_NAME)


def _write_release(source: WeightSource, target: Path, config: WanConfig | None, stages: Stages | None) -> None:
    """Write a release and its tracker; where the configuration is unknown, so it is to the release's readers."""
    known = config or infer_config(source.shapes(), source.path, head_dim=2)  # no shape depends on the heads
    shapes = _checked(source, known)
    stages = stages or ((known.num_layers,),)
    require_blocks(stages, known.num_layers)
    _require_space(target, _entries(source, shapes))
    beside = {} if config is None else {mindspeed.CONFIG_NAME: config.model_dump_json(indent=2) + "\n"}
    beside[TRACKER_NAME] = mindspeed.RELEASE
    added = target.exists() and any(target.iterdir())
    with added_files(target, last=TRACKER_NAME) if added else new_folder(target) as folder:
        (folder / mindspeed.RELEASE).mkdir()
        mindspeed.write_release(folder / mindspeed.RELEASE, source, shapes, stages)
        for name, text in beside.items():
            write_new(folder / name, text)
        write_band(folder / mindspeed.RELEASE, source.path)
    log.info("Wrote %d tensors to %s, pipeline stages of %s blocks.", len(shapes), target, stages)


def convert_to_hf(
    source_path: Path,
    target: Path,
    like: Path | None = None,
    max_shard_bytes: int = HF_SHARD_BYTES,
    *,
    averaged: bool = False,
) -> None:
    """Write weights of any format as a diffusers transformer folder; or one of the encoders as a folder of its library.

    Args:
        source_path: an MM folder, a training checkpoint, other weights, or an encoder (`mm.checkpoint.encoders`).
        target: must not exist, or be an empty folder; or it is `source_path` and holds weights in folders of their own,
            as MindSpeed-MM's guide has it: then the files are added to what is there.
        like: the original diffusers folder, whose file names, index, config.json and dtypes are kept; without it the
            source's own configuration and dtypes are used.
        max_shard_bytes: of new shards.
        averaged: write the average of a training checkpoint's weights.

    Raises:
        CheckpointError: CKPT-011, CKPT-020, CKPT-022 to CKPT-024, CKPT-030, CKPT-031, or from `open_weights`.
        DataError: from `open_weights`.
    """
    added = target.is_dir() and source_path.is_dir() and target.samefile(source_path)
    if not added:
        require_absent(target)
    found = identify(source_path)
    encoder = _encoder(found, averaged)
    if encoder is not None:
        encoder_to_hf(encoder, target, like, max_shard_bytes)
        return
    source = open_weights(found, averaged=averaged)
    if added and not source.path.samefile(target):
        rivals = [file.name for file in target.glob("*.safetensors*")]
        require_addable(target, rivals, last=hf.CONFIG_NAME)
        _write_hf(source, added_files(target, hf.CONFIG_NAME, rivals), target, like, max_shard_bytes)
        log.info("The Hugging Face weights are beside the checkpoints in %s.", target)
        return
    write_as_hf(source, target, like, max_shard_bytes)


def _encoder(found: Found, averaged: bool) -> EncoderSource | None:
    encoder = open_encoder(found)
    if encoder is not None and averaged:
        raise no_average(found.asked, f"is {encoder.encoder.name}")
    return encoder


def write_as_hf(
    source: WeightSource, target: Path, like: Path | None = None, max_shard_bytes: int = HF_SHARD_BYTES
) -> None:
    """`convert_to_hf` of weights that are open already, into a new folder."""
    require_absent(target)
    _write_hf(source, new_folder(target), target, like, max_shard_bytes)


def _write_hf(
    source: WeightSource,
    place: AbstractContextManager[Path],
    target: Path,
    like: Path | None,
    max_shard_bytes: int,
) -> None:
    original = None if like is None else WeightFolder.open(like)
    config = known_config(source) if original is None else _agreed_config(source, original)
    shapes = _checked(source, config)
    _require_space(target, _entries(source, shapes))
    with place as folder:
        if original is not None:
            hf.write_like(folder, source, original, shapes)
        else:
            hf.write_new_folder(folder, _entries(source, shapes), config, max_shard_bytes)
        write_band(folder, source.path)
    log.info("Wrote %d tensors to %s.", len(shapes), target)


def convert_to_native(source_path: Path, target: Path, *, averaged: bool = False) -> None:
    """Write weights of any format, or an encoder, as one safetensors file in the original's names, dtypes untouched.

    Args:
        source_path: weights of any format, or an encoder (`mm.checkpoint.encoders`).
        target: must not exist, or be an empty folder.
        averaged: write the average of a training checkpoint's weights.

    Raises:
        CheckpointError: CKPT-011, CKPT-020, CKPT-023, CKPT-030, CKPT-031, or from `open_weights`.
        DataError: from `open_weights`.
    """
    require_absent(target)
    found = identify(source_path)
    encoder = _encoder(found, averaged)
    if encoder is not None:
        encoder_to_native(encoder, target)
        return
    write_as_native(open_weights(found, averaged=averaged), target)


def write_as_native(source: WeightSource, target: Path) -> None:
    """`convert_to_native` of weights that are open already."""
    require_absent(target)
    config = known_config(source)
    shapes = _checked(source, config)
    _require_space(target, _entries(source, shapes))
    with new_folder(target) as folder:
        native.write_native(folder, _entries(source, shapes), config)
        write_band(folder, source.path)
    log.info("Wrote %d tensors to %s.", len(shapes), target)


def zero_to_bf16(
    source_path: Path, target: Path, max_shard_bytes: int = BF16_SHARD_BYTES, *, averaged: bool = False
) -> None:
    """Write the weights of a training checkpoint in bf16 and native names, as VideoX-Fun's script of that name does.

    Args:
        source_path: a checkpoint of a training run, or its folder of checkpoints, of which the latest is taken.
        target: must not exist, or be an empty folder.
        max_shard_bytes: of a shard; several shards have an index.
        averaged: write the average of the weights.

    Raises:
        CheckpointError: CKPT-048 for other formats, and what `convert_to_native` raises.
    """
    require_absent(target)
    source = open_weights(source_path, averaged=averaged)
    if not isinstance(source, TrainingWeights):
        raise CheckpointError(
            "CKPT-048",
            f"{source.path} holds {source.label}, not a training checkpoint.",
            "Give the --save folder of a training run; convert other formats with --mode convert_to_native.",
        )
    config = known_config(source)
    shapes = _checked(source, config)
    entries = [Entry(name, torch.bfloat16, shape, partial(_in_bf16, source, name)) for name, shape in shapes.items()]
    _require_space(target, entries)
    with new_folder(target) as folder:
        native.write_native(folder, entries, config, max_shard_bytes)
        write_band(folder, source.path)
    log.info("Wrote %d tensors in bf16 to %s.", len(shapes), target)


def _in_bf16(source: WeightSource, name: str) -> torch.Tensor:
    return rounded(name, source.read(name), torch.bfloat16)


def known_config(source: WeightSource) -> WanConfig:
    """The configuration that weights have.

    Raises:
        CheckpointError: CKPT-023 where they have none.
    """
    config = source.config()
    if config is None:
        raise CheckpointError(
            "CKPT-023",
            f"{source.path} ({source.label}) does not say the model's configuration, and the number of heads cannot be "
            "seen in the weights.",
            "Give the original Hugging Face folder with --ckpt_path and --mode convert_to_hf.",
        )
    return config


def _agreed_config(source: WeightSource, original: WeightFolder) -> WanConfig:
    """The configuration of `original`; the source's own must be the same where it has one."""
    theirs, ours = original.config(), source.config()
    if ours is not None:
        remedy = "Give the folder that the training started from."
        expected = Expected(theirs, lambda name: Word(name, str(original.path)), "CKPT-024", CheckpointError, remedy)
        expected.require_config(source.path, ours)
    return theirs


def _checked(source: WeightSource, config: WanConfig) -> Shapes:
    """The model's tensors in its own order; the source must hold exactly these."""
    shapes = whole_shapes(config)
    require_exactly(source, shapes)
    return shapes


def _entries(source: WeightSource, shapes: Shapes) -> list[Entry]:
    kinds = source.kinds()
    return [Entry(name, kinds[name].dtype, kinds[name].shape, partial(source.read, name)) for name in shapes]


def _require_space(target: Path, entries: Sequence[Entry]) -> None:
    existing = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
    require_free_space(existing, sum(entry.num_bytes for entry in entries))
