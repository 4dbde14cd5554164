"""`mm train`'s flags and the files that they name, as a training run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from mm.config.data import FeatureDatasetParam, TrainData
from mm.config.flags import parse_flags
from mm.config.layerzero import ZeroConfig
from mm.config.layout import stage_rows
from mm.config.run.around import EvaluationSection, ValidationSection
from mm.config.run.checkpoint import AdapterSection
from mm.config.run.data import Clip, FeatureSet
from mm.config.run.model import ModelSection
from mm.config.run.training import TrainingRun, TrainingSections, training_run
from mm.dialects.mindspeed.accepted import Note, said
from mm.dialects.mindspeed.accepted_flags import take_accepted
from mm.dialects.mindspeed.contradictions import contradictions
from mm.dialects.mindspeed.data_files import load_train_data
from mm.dialects.mindspeed.model_files import load_pretrain_model
from mm.dialects.mindspeed.train_flags import RETIRED_TRAIN_FLAGS, PretrainModel, TrainFlags
from mm.dialects.mindspeed.words import TRAIN_FLAGS, training_origins
from mm.dialects.mindspeed.zero_file import load_zero
from mm.errors import ConfigError, Problem, raise_all

FlagsT = TypeVar("FlagsT", bound=TrainFlags)
ReadT = TypeVar("ReadT")


@dataclass(frozen=True)
class TrainFiles:
    """What the files of a command line hold.

    Attributes:
        model: pretrain_model.json. data: feature_data.json.
        zero: zero_config.yaml, where layer-zero is asked for. held_out: the file of `--eval-data`, or None.
        notes: lines for the log, of what they say that is how it is done here anyway.
    """

    model: PretrainModel
    data: TrainData
    zero: ZeroConfig | None = None
    held_out: TrainData | None = None
    notes: tuple[str, ...] = ()


def read_training(argv: Sequence[str], world_size: int) -> TrainingRun:
    """The run that the words after `mm train` ask for, not yet checked by the rules.

    Raises:
        ConfigError: for words, keys and values that cannot be read.
    """
    flags = read_flags(TrainFlags, argv, "mm train")
    return translate(flags, read_files(flags), world_size)


def read_flags(kind: type[FlagsT], argv: Sequence[str], program: str) -> FlagsT:
    """Read the words of a command that takes training's flags.

    Raises:
        ConfigError: what `mm.config.flags.parse_flags` raises; in the same round what is wrong in the files that the
            words name.
    """
    words, _ = take_accepted(argv)
    try:
        return parse_flags(kind, words, program=program, retired=RETIRED_TRAIN_FLAGS)
    except ConfigError as error:
        raise_all(ConfigError, [*error.problems, *_problems_of_files(words)])
        raise


def _problems_of_files(words: Sequence[str]) -> list[Problem]:
    """What is wrong in the files that exist of a command line that cannot be read."""
    readers: dict[str, Callable[[Path], Any]] = {"--mm-model": load_pretrain_model, "--mm-data": load_train_data}
    problems: list[Problem] = []
    for flag, value in pairwise(words):
        path = Path(value)
        if flag in readers and path.is_file():
            _attempt(partial(readers[flag], path), problems)
    return problems


def read_files(flags: TrainFlags, accepted: Sequence[Note] = ()) -> TrainFiles:
    """Read the files that a command line names.

    Args:
        flags: the command line. accepted: what `take_accepted` took out of it.

    Raises:
        ConfigError: what is wrong in any of them, all at once.
    """
    problems: list[Problem] = []
    notes: dict[str, list[Note]] = {flags.mm_model: [], flags.mm_data: []}
    model = _attempt(lambda: load_pretrain_model(Path(flags.mm_model), notes[flags.mm_model]), problems)
    data = _attempt(lambda: load_train_data(Path(flags.mm_data), notes[flags.mm_data]), problems)
    zero = _attempt(lambda: load_zero(flags), problems)
    held_out = None
    if flags.eval_data is not None and flags.eval_interval is not None:  # else the rules tell
        held_out = _attempt(lambda: load_train_data(Path(str(flags.eval_data))), problems)
    raise_all(ConfigError, problems)
    assert model is not None and data is not None  # noqa: S101  a file that is not read is a problem
    told = tuple(said(file, found) for file, found in {"flags": accepted, **notes}.items() if found)
    return TrainFiles(model, data, zero, held_out, told)


def translate(flags: TrainFlags, files: TrainFiles, world_size: int = 1) -> TrainingRun:
    """The run that a command line and its files describe on so many processes; what contradicts itself is noted."""
    model, zero = files.model, files.zero
    values: dict[str, dict[str, Any]] = {}
    for path, flag in TRAIN_FLAGS.items():
        section, name = path.split(".")
        values.setdefault(section, {})[name] = flag.read(flags)
    values["data"] |= _data(files.data)
    values["parallel"] |= {"stages": _stages(model), "layerzero": _zero(flags, zero)}
    values["checkpoint"]["resume_changed"] = tuple(flags.resume_changed)
    values["memory"]["offload"] = model.predictor.attention_async_offload
    kinds = {name: field.annotation for name, field in TrainingSections.model_fields.items()}
    built = {name: kinds[name](**given) for name, given in values.items() if name != "model"}  # type: ignore[misc]
    sections = TrainingSections(
        model=ModelSection(shape=model.predictor.wan(), precision=values["model"]["precision"]),
        objective=model.diffusion,
        adapters=_adapters(flags),
        evaluation=_evaluation(flags, files.held_out),
        validation=_validation(flags),
        **built,
    )
    origins = training_origins(flags, says_dtype=model.predictor.dtype is not None)
    return training_run(sections, origins, world_size, list(contradictions(flags, model)), files.notes)


def _data(data: TrainData) -> Mapping[str, Any]:
    clip, loading = data.dataset_param.preprocess_parameters, data.dataloader_param
    return {
        "features": features(data.dataset_param),
        "caption_dropout": clip.cfg,
        "shuffle": loading.shuffle,
        "pin_memory": loading.pin_memory,
    }


def features(param: FeatureDatasetParam) -> FeatureSet:
    """The features that `dataset_param` names."""
    basic, clip = param.basic_parameters, param.preprocess_parameters
    return FeatureSet(
        path=basic.data_path,
        folder=basic.data_folder,
        clip=Clip(
            num_frames=clip.num_frames,
            frame_interval=clip.frame_interval,
            height=clip.max_height,
            width=clip.max_width,
        ),
        tokenizer=param.tokenizer_config,
    )


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
    return AdapterSection(
        rank=max(1, rank),
        alpha=alpha if alpha > 0 else 1.0,
        targets=flags.lora_target_modules or ["q"],
        base=flags.load_base_model or "missing",
        base_dtype=flags.lora_base_dtype,
    )


def _evaluation(flags: TrainFlags, held_out: TrainData | None) -> EvaluationSection | None:
    if flags.eval_interval is None or held_out is None:
        return None
    return EvaluationSection(interval=flags.eval_interval, features=features(held_out.dataset_param))


def _validation(flags: TrainFlags) -> ValidationSection | None:
    interval, prompts, config = flags.validation_interval, flags.validation_prompts, flags.validation_config
    if interval is None or prompts is None or config is None:
        return None  # CFG-124 tells of some without the others
    return ValidationSection(interval=interval, prompts=prompts, images=flags.validation_images, config=config)


def _attempt(read: Callable[[], ReadT], problems: list[Problem]) -> ReadT | None:
    try:
        return read()
    except ConfigError as error:
        problems += error.problems
        return None
