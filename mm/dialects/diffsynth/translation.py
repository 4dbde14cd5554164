"""A command line of DiffSynth-Studio's train.py, as an extraction and the training on its features."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mm.config.diffusion import DiffusionConfig
from mm.config.layerzero import ZeroConfig
from mm.config.model import WanConfig
from mm.config.run.around import TrainingSection
from mm.config.run.checkpoint import CheckpointSection
from mm.config.run.data import ConditionDropout, DataSection, FeatureSet
from mm.config.run.encoders import (
    EncodersSection,
    ImageEncoderSection,
    TextEncoderSection,
    TokenizerSection,
    VideoEncoderSection,
)
from mm.config.run.extraction import (
    ExtractionRun,
    ExtractionSection,
    ExtractionSections,
    SourceClip,
    SourceSection,
    StoreSection,
)
from mm.config.run.memory import MemorySection
from mm.config.run.model import ModelSection
from mm.config.run.optimizer import OptimizerSection
from mm.config.run.parallel import ParallelSection
from mm.config.run.shapes import FrameRule, MaxPixels
from mm.config.run.training import TrainingRun, TrainingSections
from mm.config.tasks.task import Source
from mm.config.unread import UNREAD, UnreadError, broken, built, if_read, is_given, read_or
from mm.dialects.diffsynth.inputs import ModelInputs, columns_of, input_problems, inputs_of, named_inputs
from mm.dialects.diffsynth.named_models import PATHS, models_word
from mm.dialects.diffsynth.sharding import Launcher, launcher_notes
from mm.dialects.diffsynth.train_flags import DiffSynthFlags
from mm.dialects.diffsynth.trained import adapters_of, trainable_of, trained_problems
from mm.dialects.diffsynth.words import origins_of
from mm.dialects.underscored import ReadFlags
from mm.errors import Problem

_WORKERS = 2
KEPT_CHECKPOINTS = 2


@dataclass(frozen=True)
class FoundModels:
    """The models that a command line names, by what is in their files.

    Attributes:
        transformer: path of its weights. shape: of it.
        vae, text, tokenizer, image: paths; no image encoder where none is named.
        joins: the transformer is released in two parts, which are to be joined at its path.
    """

    transformer: str
    shape: WanConfig
    vae: str
    text: str
    tokenizer: str
    image: str | None = None
    joins: bool = False


@dataclass(frozen=True)
class MetadataTable:
    """The metadata of a data set: how many rows, and what columns the first one has."""

    rows: int
    columns: frozenset[str]


@dataclass(frozen=True)
class Places:
    """Places of what a run writes.

    Attributes:
        output: the user's folder, which gets the files of each epoch.
    """

    output: Path

    @property
    def features(self) -> Path:
        """The store of features."""
        return self.output / "features"

    @property
    def listing(self) -> Path:
        """The file that names the store to training."""
        return self.output / "features.txt"

    @property
    def model(self) -> Path:
        """The transformer, where it is released in two parts."""
        return self.output / "model"

    @property
    def checkpoints(self) -> Path:
        """The run's own checkpoints, metrics and TensorBoard's files."""
        return self.output / "checkpoints"


@dataclass(frozen=True)
class DiffSynthRun:
    """Both stages of a command line, and how its files are written.

    Attributes:
        extraction, training: the stages, not yet checked by the rules. steps_of_file: steps from one file to the next.
        places: where all of it goes. prefix: what the names in the files do without. by_epoch: files are counted so.
    """

    extraction: ExtractionRun
    training: TrainingRun
    places: Places
    steps_of_file: int
    prefix: str
    by_epoch: bool


@dataclass(frozen=True)
class _Known:
    """Values that both stages need, each `UNREAD` where it could not be read.

    Attributes:
        places: of what is written. inputs: of the model. samples_of_step: of all processes.
        steps_of_epoch: one epoch has. interval: steps from one file to the next.
    """

    places: Places
    inputs: ModelInputs
    samples_of_step: int
    steps_of_epoch: int
    interval: int


def translate(
    flags: DiffSynthFlags,
    read: ReadFlags,
    found: FoundModels,
    table: MetadataTable,
    launcher: Launcher,
    world_size: int = 1,
) -> DiffSynthRun:
    """Both stages that a command line describes, with what is wrong in it.

    Args:
        flags: the command line. read: what reading it and what it names gave.
        found: the models. table: the metadata; `UNREAD` where either could not be read.
        launcher: accelerate's word. world_size: the processes that were started.
    """
    rows = if_read(lambda: table.rows)
    is_lora = if_read(lambda: flags.lora_base_model is not None)
    origins = origins_of(read_or(if_read(lambda: models_word(flags)), PATHS), is_lora=read_or(is_lora, False))
    known = _known(flags, found, rows, launcher, world_size)
    notes = (*read.notes, *launcher_notes(launcher), *read_or(if_read(lambda: known.inputs.notes), ()))
    device: Literal["cpu"] | None = "cpu" if launcher.cpu else None
    stage = {
        "extraction": built(ExtractionSection, {"task": if_read(lambda: known.inputs.task), "device": device}),
        "data": _source(flags, table),
        "encoders": if_read(lambda: _encoders(found)),
        "output": built(StoreSection, {"path": if_read(lambda: str(known.places.features))}),
    }
    extraction = built(ExtractionSections, stage)
    training = _training(flags, found, known, _parallel(launcher, world_size), device)
    problems = (*read.problems, *_problems(flags, found, launcher))
    return DiffSynthRun(
        ExtractionRun.described(extraction, origins, world_size, problems, notes),
        TrainingRun.described(training, origins, world_size, problems),
        known.places,
        known.interval,
        flags.remove_prefix_in_ckpt,
        if_read(lambda: flags.save_steps is None),
    )


def _known(flags: DiffSynthFlags, found: FoundModels, rows: int, launcher: Launcher, world_size: int) -> _Known:
    samples = if_read(lambda: world_size * (flags.gradient_accumulation_steps or launcher.accumulation or 1))
    steps_of_epoch = if_read(lambda: math.ceil(rows * flags.dataset_repeat / samples))
    return _Known(
        if_read(lambda: Places(Path(flags.output_path))),
        if_read(lambda: inputs_of(found.shape, named_inputs(flags))),
        samples,
        steps_of_epoch,
        if_read(lambda: flags.save_steps or steps_of_epoch),
    )


def _training(
    flags: DiffSynthFlags, found: FoundModels, known: _Known, parallel: ParallelSection, device: Literal["cpu"] | None
) -> TrainingSections:
    base, shape, workers = found.transformer, found.shape, flags.dataset_num_workers
    data = {
        "features": built(FeatureSet, {"path": if_read(lambda: str(known.places.listing))}),
        "condition_dropout": if_read(lambda: ConditionDropout(**dict.fromkeys(known.inputs.dropped, 1.0))),
        "global_batch_size": known.samples_of_step,
        "workers": _WORKERS if workers is None else workers,
    }
    checkpoint = {
        "load": if_read(lambda: base if flags.lora_base_model is None else flags.lora_checkpoint),
        "save": if_read(lambda: str(known.places.checkpoints)),
        "save_interval": known.interval,
        "save_on_signal": True,
        "keep_latest": KEPT_CHECKPOINTS,
    }
    training = {
        "steps": if_read(lambda: known.steps_of_epoch * flags.num_epochs),
        "trainable": if_read(lambda: trainable_of(flags, shape)),
        "device": device,
    }
    optimizer = {"lr": flags.learning_rate, "weight_decay": flags.weight_decay, "clip_norm": 0.0}
    sections = {
        "training": built(TrainingSection, training),
        "model": built(ModelSection, {"shape": shape, "precision": "bf16"}),
        "data": built(DataSection, data),
        "objective": if_read(lambda: _objective(flags, known.inputs.first_frame_share)),
        "optimizer": built(OptimizerSection, optimizer),
        "parallel": parallel,
        "memory": if_read(lambda: _memory(flags)),
        "adapters": if_read(lambda: adapters_of(flags, shape, base)),
        "checkpoint": built(CheckpointSection, checkpoint),
    }
    return built(TrainingSections, sections)


def _problems(flags: DiffSynthFlags, found: FoundModels, launcher: Launcher) -> Iterator[Problem]:
    """Problems of the command line itself."""

    def of_inputs(flags: DiffSynthFlags) -> Iterator[Problem]:
        return input_problems(found.shape, named_inputs(flags), _file_keys(flags))

    def of_what_is_trained(flags: DiffSynthFlags) -> Iterator[Problem]:
        return trained_problems(flags, found.shape)

    def of_launcher(flags: DiffSynthFlags) -> Iterator[Problem]:
        return _accumulations_agree(flags, launcher)

    rules = (_sizes_are_both_said, _boundaries_leave_steps, of_inputs, of_what_is_trained, of_launcher)
    return broken(rules, flags)


def _boundaries_leave_steps(flags: DiffSynthFlags) -> Iterator[Problem]:
    """CFG-447: boundaries between which there are none."""
    first, end = flags.min_timestep_boundary, flags.max_timestep_boundary
    count = len(DiffusionConfig().levels())
    if int(first * count) >= int(end * count):
        found = f"--min_timestep_boundary {first} and --max_timestep_boundary {end} leave no steps between them."
        yield Problem("CFG-447", found, "Give a larger --max_timestep_boundary; 0 and 1 take all steps.")


def _accumulations_agree(flags: DiffSynthFlags, launcher: Launcher) -> Iterator[Problem]:
    """CFG-388: two numbers of steps, where accelerate's is none that it fills in itself."""
    ours, theirs = flags.gradient_accumulation_steps, launcher.accumulation
    if is_given(ours) and theirs not in (None, 1, ours):
        found = f"accelerate's gradient_accumulation_steps is {theirs}, and --gradient_accumulation_steps {ours}."
        yield Problem("CFG-388", found, "Make them agree, or give one of them.")


def _sizes_are_both_said(flags: DiffSynthFlags) -> Iterator[Problem]:
    """CFG-387: one side of a size."""
    given = {"--height": flags.height, "--width": flags.width}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 1:
        there = next(name for name in given if name not in missing)
        found = f"{there} is given without {missing[0]}, and samples keep their own size only where neither is."
        yield Problem("CFG-387", found, "Give both, or neither.")
    if not missing and "max_pixels" in flags.model_fields_set:
        found = "--max_pixels has no effect beside --height and --width, the size of all samples."
        yield Problem("CFG-387", found, "Remove it, or both of the others.")


def _file_keys(flags: DiffSynthFlags) -> tuple[str, ...]:
    words = (word.strip() for word in flags.data_file_keys.split(","))
    return tuple(word for word in words if word and word not in ("image", "video"))


def _source(flags: DiffSynthFlags, table: MetadataTable) -> SourceSection:
    clip: dict[str, Any] = {
        "num_frames": flags.num_frames,
        "height": if_read(lambda: UNREAD if flags.height is None and flags.width is not None else flags.height),
        "width": if_read(lambda: UNREAD if flags.width is None and flags.height is not None else flags.width),
        "shape": if_read(lambda: _shape(flags)),
        "frames": FrameRule(start="first"),
    }
    values = {
        "path": flags.dataset_metadata_path,
        "folder": if_read(lambda: flags.dataset_base_path or "."),
        "format": "diffsynth",
        "file_keys": if_read(lambda: _file_keys(flags)),
        "left_out": if_read(lambda: tuple(sorted(table.columns - columns_of(named_inputs(flags))))),
        "clip": built(SourceClip, clip),
        "workers": if_read(lambda: max(1, flags.dataset_num_workers or _WORKERS)),
    }
    return built(SourceSection, values)


def _shape(flags: DiffSynthFlags) -> MaxPixels | None:
    """Each sample's own size, where none is given."""
    if flags.height is not None or flags.width is not None:
        return None
    return MaxPixels(rule="max_pixels", max_pixels=flags.max_pixels)


def _encoders(found: FoundModels) -> EncodersSection:
    """Precisions are the release's: its VAE in fp32, its text encoder in bf16."""
    image = None
    if found.shape.task.made_by(Source.IMAGE_ENCODER) and found.image is not None:
        image = ImageEncoderSection(from_pretrained=found.image, precision="fp32")
    return EncodersSection(
        vae=VideoEncoderSection(from_pretrained=found.vae, precision="fp32"),
        text=TextEncoderSection(from_pretrained=found.text, precision="bf16"),
        tokenizer=TokenizerSection(from_pretrained=found.tokenizer, model_max_length=found.shape.text_len),
        image=image,
    )


def _objective(flags: DiffSynthFlags, first_frame_share: float | None) -> DiffusionConfig:
    """The default loss, on the part of the grid that the two boundaries leave, noisiest first."""
    plain = DiffusionConfig()
    levels = plain.levels()
    first, end = (int(share * len(levels)) for share in (flags.min_timestep_boundary, flags.max_timestep_boundary))
    if first >= end:
        raise UnreadError  # of which the user is told
    below = levels[first - 1] if first > 0 else None
    least = None if end == len(levels) else levels[end - 1] if end > 0 else 1.0
    return built(DiffusionConfig, {"band_from": least, "band_below": below, "first_frame_share": first_frame_share})


def _parallel(launcher: Launcher, world_size: int) -> ParallelSection:
    if launcher.shards_parameters:
        return ParallelSection(layerzero=ZeroConfig(zero3_size=world_size))
    shares = launcher.shards_optimizer
    return ParallelSection(distributed_optimizer=shares, overlap_grad_reduce=shares)


def _memory(flags: DiffSynthFlags) -> MemorySection:
    """Blocks are always computed again; with offload all but their attention, and what they keep waits on the host."""
    if flags.use_gradient_checkpointing_offload:
        return MemorySection(recompute="full", method="uniform", keep_attention=True, offload=True)
    return MemorySection(recompute="full", method="uniform")
