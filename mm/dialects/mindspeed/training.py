"""`mm train`'s flags and the files that they name, as a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mm.config.layerzero import ZeroConfig
from mm.config.layout import stage_rows
from mm.config.model import WanConfig
from mm.config.run.around import EvaluationSection, ValidationSection
from mm.config.run.checkpoint import AdapterSection
from mm.config.run.data import Clip, FeatureSet
from mm.config.run.encoders import TokenizerSection
from mm.config.run.experts import ExpertsSection
from mm.config.run.live import LiveSection
from mm.config.run.training import TrainingRun, TrainingSections
from mm.config.unread import UNREAD, built, if_read, read_or, whole
from mm.dialects.mindspeed.accepted_flags import ACCEPTED_TRAIN_FLAGS
from mm.dialects.mindspeed.as_done_here import training_as_done_here
from mm.dialects.mindspeed.contradictions import contradictions
from mm.dialects.mindspeed.data_json import FeatureDatasetParam, TrainData
from mm.dialects.mindspeed.extraction import tokenizer
from mm.dialects.mindspeed.files import read_pretrain_model, read_train_data
from mm.dialects.mindspeed.pretrain_json import PretrainModel
from mm.dialects.mindspeed.reading import Reading
from mm.dialects.mindspeed.retired_flags import RETIRED_TRAIN_FLAGS
from mm.dialects.mindspeed.train_flags import TrainFlags
from mm.dialects.mindspeed.words import TRAIN_FLAGS, training_origins
from mm.dialects.mindspeed.zero_file import load_zero
from mm.errors import Problem

FlagsT = TypeVar("FlagsT", bound=TrainFlags)


@dataclass(frozen=True)
class TrainFiles:
    """Contents of the files of a command line.

    Attributes:
        model: pretrain_model.json. data: feature_data.json.
        zero: zero_config.yaml, where layer-zero is asked for. held_out: the file of `--eval-data`, or None.
        problems: what is wrong in them, and in the command line.
        notes: lines for the log, of what they say that is how it is done here anyway.
    """

    model: PretrainModel
    data: TrainData
    zero: ZeroConfig | None = None
    held_out: TrainData | None = None
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()


def read_training(argv: Sequence[str], world_size: int) -> TrainingRun:
    """The run that the words after `mm train` ask for, with all that is wrong in them and in their files; not yet
    checked by the rules.
    """
    reading = Reading()
    flags = read_flags(TrainFlags, argv, "mm train", reading)
    return translate(flags, read_files(flags, reading), world_size)


def read_flags(kind: type[FlagsT], argv: Sequence[str], program: str, reading: Reading) -> FlagsT:
    """The words of a command that takes training's flags, of which what cannot be read is `UNREAD`."""
    given = reading.flags(kind, argv, program, accepted=ACCEPTED_TRAIN_FLAGS, retired=RETIRED_TRAIN_FLAGS)
    flags, notes = training_as_done_here(given)
    reading.notes["flags"] += notes
    return flags


def read_files(flags: TrainFlags, reading: Reading) -> TrainFiles:
    """The files that a command line names, of which what cannot be read is `UNREAD`.

    Args:
        flags: the command line. reading: what is wrong in it; gets what is wrong in the files.
    """
    model = read_pretrain_model(flags.mm_model, reading)
    data = read_train_data(flags.mm_data, reading)
    zero = reading.attempt(lambda: load_zero(flags))
    told = reading.told()
    held_out = reading.attempt(lambda: _held_out(flags, reading))
    return TrainFiles(model, data, zero, held_out, tuple(reading.problems), told)


def _held_out(flags: TrainFlags, reading: Reading) -> TrainData | None:
    if flags.eval_data is None or flags.eval_interval is None:  # one without the other is a contradiction
        return None
    return read_train_data(flags.eval_data, reading)


def translate(flags: TrainFlags, files: TrainFiles, world_size: int = 1) -> TrainingRun:
    """The run that a command line and its files describe on so many processes, with what is wrong in them."""
    model = files.model
    values: dict[str, dict[str, Any]] = {}
    for path, flag in TRAIN_FLAGS.items():
        section, name = path.split(".")
        values.setdefault(section, {})[name] = flag.read(flags)
    values["data"] |= _data(files.data)
    values["parallel"] |= {
        "stages": if_read(lambda: _stages(model)),
        "layerzero": if_read(lambda: _zero(flags, files.zero)),
    }
    values["checkpoint"]["resume_changed"] = if_read(lambda: tuple(flags.resume_changed))
    values["training"]["trainable"] = if_read(lambda: tuple(flags.trainable_modules or ()) or None)
    values["memory"]["offload"] = model.predictor.attention_async_offload
    if if_read(lambda: _precision_is_said_twice(flags, model)) is True:
        values["model"]["precision"] = UNREAD
    values["model"]["shape"] = if_read(lambda: whole(model.predictor, WanConfig.model_fields).wan())
    kinds: dict[str, Any] = {name: field.annotation for name, field in TrainingSections.model_fields.items()}
    sections = built(
        TrainingSections,
        {
            "objective": model.diffusion,
            "adapters": if_read(lambda: _adapters(flags)),
            "experts": if_read(lambda: _experts(flags)),
            "evaluation": if_read(lambda: _evaluation(flags, files.held_out)),
            "validation": if_read(lambda: _validation(flags)),
            "live": if_read(lambda: _live(flags)),
            **{name: built(kinds[name], given) for name, given in values.items()},
        },
    )
    says_dtype = if_read(lambda: model.predictor.dtype is not None)
    origins = training_origins(flags, says_dtype=read_or(says_dtype, False))
    problems = (*files.problems, *contradictions(flags, model))
    return TrainingRun.described(sections, origins, world_size, problems, files.notes)


def _precision_is_said_twice(flags: TrainFlags, model: PretrainModel) -> bool:
    """Tell whether flag and file disagree (CFG-022), so that neither is known to be meant."""
    dtype = model.predictor.dtype
    return dtype is not None and (dtype == "bf16") != flags.bf16


def _data(data: TrainData) -> Mapping[str, Any]:
    clip, loading = data.dataset_param.preprocess_parameters, data.dataloader_param
    return {
        "features": features(data.dataset_param),
        "caption_dropout": clip.cfg,
        "condition_dropout": clip.condition_dropout,
        "shuffle": loading.shuffle,
        "pin_memory": loading.pin_memory,
        "mixture": loading.mixture,
    }


def features(param: FeatureDatasetParam) -> FeatureSet:
    """The features that `dataset_param` names."""
    basic, clip = param.basic_parameters, param.preprocess_parameters
    taken = {
        "num_frames": clip.num_frames,
        "frame_interval": clip.frame_interval,
        "height": clip.max_height,
        "width": clip.max_width,
    }
    values = {
        "path": basic.data_path,
        "folder": basic.data_folder,
        "storage": basic.storage,
        "clip": built(Clip, taken),
        "tokenizer": if_read(lambda: _tokenizer(param)),
    }
    return built(FeatureSet, values)


def _tokenizer(param: FeatureDatasetParam) -> TokenizerSection | None:
    return None if param.tokenizer_config is None else tokenizer(param.tokenizer_config)


def _stages(model: PretrainModel) -> list[list[int]] | None:
    listed = model.predictor.pipeline_num_layers
    return None if listed is None else [list(row) for row in stage_rows(listed)]


def _zero(flags: TrainFlags, zero: ZeroConfig | None) -> ZeroConfig | None:
    """A group of one where only one of the two flags is given, of which CFG-045 tells."""
    return zero or (ZeroConfig(zero3_size=1) if flags.layerzero else None)


def _adapters(flags: TrainFlags) -> AdapterSection | None:
    """Stand-ins take the place of what is missing or out of range, of which CFG-102 to CFG-104 tell."""
    if not flags.lora:
        return None
    rank, alpha = flags.lora_r or 1, flags.lora_alpha or 1.0
    values = {
        "rank": max(1, rank),
        "alpha": alpha if alpha > 0 else 1.0,
        "targets": flags.lora_target_modules or ["q"],
        "skip": flags.lora_skip_modules,
        "base": flags.load_base_model or "missing",
        "base_dtype": flags.lora_base_dtype,
    }
    return built(AdapterSection, values)


def _experts(flags: TrainFlags) -> ExpertsSection | None:
    if flags.expert_boundary is None:
        return None  # CFG-315 tells of others without it
    values = {
        "boundary": flags.expert_boundary,
        "load": flags.load_low_noise,
        "base": flags.load_base_model_low_noise,
        "steps_in_a_row": flags.expert_steps,
        "offload": flags.offload_expert,
    }
    return built(ExpertsSection, values)


def _evaluation(flags: TrainFlags, held_out: TrainData | None) -> EvaluationSection | None:
    if flags.eval_interval is None or held_out is None:
        return None
    return built(EvaluationSection, {"interval": flags.eval_interval, "features": features(held_out.dataset_param)})


def _validation(flags: TrainFlags) -> ValidationSection | None:
    interval, prompts, config = flags.validation_interval, flags.validation_prompts, flags.validation_config
    if interval is None or prompts is None or config is None:
        return None  # CFG-124 tells of some without the others
    values = {"interval": interval, "prompts": prompts, "images": flags.validation_images, "config": config}
    values["other_expert"] = flags.validation_other_expert
    return built(ValidationSection, values)


def _live(flags: TrainFlags) -> LiveSection | None:
    if not flags.live:
        return None  # CFG-245 tells of a budget without it
    return built(LiveSection, {"extractions": tuple(flags.live), "budget": flags.live_budget})
