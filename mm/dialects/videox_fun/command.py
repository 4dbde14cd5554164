"""A command line of VideoX-Fun, read whole: the extraction and the training that it means, and what comes around."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm.config.layerzero import ZeroConfig
from mm.config.model import WanConfig
from mm.config.place import ProcessPlace
from mm.config.run.extraction import ExtractionRun, SourceClip
from mm.config.run.live import LiveSection
from mm.config.run.origins import Origins, Word
from mm.config.run.training import TrainingRun
from mm.config.unread import Unread, UnreadError, if_read, is_given, read_or
from mm.dialects.launcher import Launch, read_launch
from mm.dialects.meaning import words_of
from mm.dialects.videox_fun.extraction import extraction_sections, live_section, parts_of, sees_images
from mm.dialects.videox_fun.flags import FullFlags, VideoxFlags
from mm.dialects.videox_fun.launch import place_of, sharding_of
from mm.dialects.videox_fun.metadata import count_rows
from mm.dialects.videox_fun.model_config import load_model_config
from mm.dialects.videox_fun.reading import Reading
from mm.dialects.videox_fun.scripts import SCRIPTS, Script
from mm.dialects.videox_fun.task import task_of
from mm.dialects.videox_fun.training import Facts, is_in_names, is_lora, precision_of, training_sections
from mm.dialects.videox_fun.validation import Clips, clips_of, validation_section

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
"""Names of checkpoints as VideoX-Fun writes them; the whole name, so that folders beside them are none."""
_OWN_CHECKPOINT = re.compile(r"iter_(\d+)")


@dataclass(frozen=True)
class Command:
    """A command line.

    Attributes:
        extraction, training: what it means, with what is wrong in it; all problems are the training's.
        writes: what stands beside the run's own checkpoints. place: of this process.
        clips: what is rendered between steps; None for nothing. step: to begin with, from 1.
        live: the training's section where features are made in its steps; it is in no section of `training` yet,
            because its rules read a file that is written when all else is known to be good.
    """

    extraction: ExtractionRun
    training: TrainingRun
    writes: Writes
    place: ProcessPlace
    clips: Clips | None
    step: int
    live: LiveSection | None


@dataclass(frozen=True)
class Writes:
    """Files beside a run's own checkpoints.

    Attributes:
        folder: --output_dir. most: as many are kept; None keeps all.
        adapters: LoRA files instead of a transformer. averaged: the average besides.
        bf16: in bf16.
    """

    folder: str
    most: int | None
    adapters: bool
    averaged: bool
    bf16: bool


def read_command(
    script: Script, argv: Sequence[str], environment: Mapping[str, str], shape_of: Callable[[str], WanConfig]
) -> Command:
    """Read a command line; not yet checked by the rules.

    Args:
        script: which is called. argv: its words. environment: the process's.
        shape_of: reads the shape of a model's folder, and raises an `MMError` where it cannot.
    """
    reading = Reading()
    launch, problems = read_launch(environment)
    reading.problems += problems
    place = reading.attempt(lambda: place_of(environment))
    flags = reading.flags(script, argv)
    facts = _facts(script, flags, launch, place, shape_of, reading)
    parts = if_read(
        lambda: parts_of(flags, facts.config, sees_images=if_read(lambda: sees_images(facts)) is True, reading=reading)
    )
    extraction = extraction_sections(script, flags, facts, parts, reading)
    training = training_sections(script, flags, facts)
    rendered = if_read(lambda: validation_section(flags, facts, reading))
    training = training.model_copy(update={"validation": rendered})
    clips = reading.attempt(lambda: clips_of(flags, facts, extraction, reading))
    live = reading.attempt(lambda: live_section(flags, reading))
    for rule in (
        _precision_is_here,
        _something_is_trained,
        _sampling_is_here,
        _images_are_seen_as_often,
        _reports_are_here,
    ):
        reading.attempt(lambda rule=rule: rule(flags, facts, reading))  # type: ignore[misc]
    words, world_size = _words(script, flags, facts), read_or(if_read(lambda: facts.world_size), 1)
    return Command(
        ExtractionRun.described(extraction, words, world_size),
        TrainingRun.described(training, words, world_size, tuple(reading.problems), tuple(reading.notes)),
        if_read(lambda: _writes(flags, facts)),
        place,
        clips,
        if_read(lambda: _first_step(flags, facts)),
        live,
    )


def _facts(
    script: Script,
    flags: VideoxFlags,
    launch: Launch,
    place: ProcessPlace,
    shape_of: Callable[[str], WanConfig],
    reading: Reading,
) -> Facts:
    shape = reading.attempt(lambda: shape_of(_said(flags.pretrained_model_name_or_path)))
    sharding, file = sharding_of(flags, launch, place, reading)
    return Facts(
        shape=shape,
        task=reading.attempt(lambda: task_of(script, flags, _known(shape), reading)),
        rows=reading.attempt(lambda: count_rows(_said(flags.train_data_meta))),
        config=reading.attempt(lambda: load_model_config(flags.config_path)),
        sharding=sharding,
        overlaps=if_read(lambda: file.zero_optimization.overlap_comm),
        launch=launch,
        place=place,
        resumes_from=reading.attempt(lambda: _resumes_from(flags, reading)),
    )


def _said(value: str) -> str:
    if isinstance(value, Unread):
        raise UnreadError
    return value


def _known(shape: WanConfig) -> WanConfig:
    if isinstance(shape, Unread):
        raise UnreadError
    return shape


def _precision_is_here(flags: VideoxFlags, facts: Facts, reading: Reading) -> None:
    """CFG-341: fp16. CFG-342: two precisions."""
    launched, said = facts.launch.mixed_precision, flags.mixed_precision
    if "fp16" in (said, launched) and said != "bf16":
        found = "--mixed_precision is fp16, whose range is too small for Wan."
        reading.wrong("CFG-341", found, "Give bf16, or no.")
    if is_given(said) and launched != "no" and launched != said:
        found = f"accelerate's mixed_precision is {launched}, and --mixed_precision is {said}."
        reading.wrong("CFG-342", found, "Make them agree.")


def _something_is_trained(flags: VideoxFlags, facts: Facts, reading: Reading) -> None:
    """CFG-348: nothing that is said to be trained. CFG-420: what can be in no parameter's name."""
    if not isinstance(flags, FullFlags):
        return
    whole, slower = flags.trainable_modules, flags.trainable_modules_low_learning_rate
    if whole is None:
        reading.wrong("CFG-348", "--trainable_modules is missing.", 'Give ".", which is all of the model.')
    for flag, words in (("--trainable_modules", whole), ("--trainable_modules_low_learning_rate", slower)):
        for word in words or ():
            if not is_in_names(word):
                found = f"{flag} {word!r} is in the name of no parameter of the model."
                reading.wrong("CFG-420", found, "Give parts of names, such as self_attn ffn.")


def _sampling_is_here(flags: VideoxFlags, facts: Facts, reading: Reading) -> None:
    """CFG-341: densities of noise levels that have no effect."""
    scheme = flags.weighting_scheme
    if scheme in ("logit_normal", "mode") and flags.uniform_sampling:
        found = f"--weighting_scheme {scheme} has no effect with --uniform_sampling."
        reading.wrong("CFG-341", found, "Remove one of them.")
    steps = facts.config.scheduler_kwargs.num_train_timesteps
    if flags.train_sampling_steps != steps:
        found = f"--train_sampling_steps is {flags.train_sampling_steps}, and the schedule has {steps}."
        reading.wrong("CFG-341", found, "Make them agree; the model's timesteps are its schedule's.")
    for name, owner in (("logit_mean", "logit_normal"), ("logit_std", "logit_normal"), ("mode_scale", "mode")):
        if name in flags.model_fields_set and scheme != owner:
            reading.notes.append(f"--{name} changes nothing: it is of --weighting_scheme {owner}")
    if "motion_sub_loss_ratio" in flags.model_fields_set and not flags.motion_sub_loss:
        reading.notes.append("--motion_sub_loss_ratio changes nothing: it is of --motion_sub_loss")


def _images_are_seen_as_often(flags: VideoxFlags, facts: Facts, reading: Reading) -> None:
    """CFG-341: videos that come more often than the images of the same file."""
    if flags.video_repeat > 1 and facts.rows.images and facts.rows.videos:
        found = f"--video_repeat {flags.video_repeat} repeats the videos of a file that lists images too."
        reading.wrong("CFG-341", found, "Give 1; or put the rows of the videos into the file as often as they count.")


def _reports_are_here(flags: VideoxFlags, facts: Facts, reading: Reading) -> None:
    """CFG-341: trackers."""
    if flags.report_to not in ("tensorboard", "all"):
        found = f"--report_to is {flags.report_to}; what a run says goes to TensorBoard and metrics.jsonl."
        reading.wrong("CFG-341", found, "Give tensorboard.")


def _resumes_from(flags: VideoxFlags, reading: Reading) -> str | None:
    """A folder of checkpoints elsewhere to go on from. What is in --output_dir is gone on with without a word of it.

    Keeps CFG-349 for a run in --output_dir that nothing says to go on with, and for a checkpoint that is not there or
    not the newest one.
    """
    asked, folder = flags.resume_from_checkpoint, flags.output_dir
    there = _steps_in(folder)
    if not is_given(asked):
        if there:
            found = f"--output_dir {folder} holds a run, at step {there[-1]}."
            remedy = "Give --resume_from_checkpoint=latest to go on with it, or another --output_dir."
            reading.wrong("CFG-349", found, remedy)
        return None
    if asked == "latest":
        if not there:
            reading.notes.append(f"--resume_from_checkpoint=latest: {folder} has no checkpoint, so that the run begins")
        return None
    path = Path(asked)
    place = folder if path.name == asked else str(path.parent)
    match, steps = CHECKPOINT.fullmatch(path.name), _steps_in(place)
    if match is None or int(match[1]) not in steps:
        known = ", ".join(f"checkpoint-{step}" for step in steps) or "none"
        found = f"--resume_from_checkpoint {asked} is no checkpoint of {place}; it has {known}."
        reading.wrong("CFG-349", found, "Name one of these, or latest.")
        return None
    if int(match[1]) != steps[-1]:
        found = f"--resume_from_checkpoint {asked} is not the newest of {place}, which is checkpoint-{steps[-1]}."
        remedy = f"Name that one; or move iter_* folders after step {match[1]} away."
        reading.wrong("CFG-349", found, remedy)
    return None if os.path.realpath(place) == os.path.realpath(folder) else place


def _first_step(flags: VideoxFlags, facts: Facts) -> int:
    """The step after the newest checkpoint of the run that is gone on with, from 1."""
    elsewhere = facts.resumes_from
    done = _steps_in(elsewhere if is_given(elsewhere) else flags.output_dir)
    return done[-1] + 1 if done and is_given(flags.resume_from_checkpoint) else 1


def _steps_in(folder: str) -> list[int]:
    """Steps of a run's own checkpoints."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(int(match[1]) for name in names if (match := _OWN_CHECKPOINT.fullmatch(name)))


def _writes(flags: Any, facts: Facts) -> Writes:
    lora = is_lora(flags)
    return Writes(
        flags.output_dir,
        flags.checkpoints_total_limit,
        adapters=lora,
        averaged=not lora and flags.use_ema,
        bf16=precision_of(flags, facts.launch) == "bf16",
    )


def _words(script: Script, flags: VideoxFlags, facts: Facts) -> Origins:
    """The user's word for each value."""
    words = words_of(script.flags)
    if is_lora(flags):
        words["checkpoint.load"] = Word("--resume_from_checkpoint")
    # Rules about clips name the file of a word first.
    line = "the command line"
    for path in [path for path in words if path.startswith("data.clip.")]:
        words[path] = Word(words[path].name, line)
    words["data.clip.min_num_frames"] = Word("the fewest frames", line)
    words |= {"data.path": Word("--train_data_meta", line), "data.folder": Word("--train_data_dir", line)}
    words["data.clip.shape"] = Word("--enable_bucket", line)
    words |= {
        f"data.clip.{name}": Word(name, line) for name in SourceClip.model_fields if f"data.clip.{name}" not in words
    }
    model = os.path.join(read_or(flags.pretrained_model_name_or_path, "the model"), "config.json")
    words |= {f"model.shape.{name}": Word(name, model, is_json=True) for name in WanConfig.model_fields}
    config = read_or(flags.config_path, None) or "wan_civitai.yaml"
    words["objective.shift"] = Word("scheduler_kwargs.shift", config)
    words |= {f"parallel.layerzero.{name}": Word("--zero_stage") for name in ZeroConfig.model_fields}
    words |= {"parallel.layerzero": Word("--zero_stage 3"), "parallel.distributed_optimizer": Word("--zero_stage 2")}
    words |= {"training.device": Word("accelerate launch --cpu"), "extraction.device": Word("accelerate launch --cpu")}
    parts = {
        "encoders.text": "the text encoder",
        "encoders.tokenizer": "the tokenizer",
        "encoders.image": "the image encoder",
    }
    words |= {f"{path}.from_pretrained": Word(name, model) for path, name in parts.items()}
    return Origins(words)


def script_of(name: str) -> Script | None:
    """The script of a path that ends as one of them does."""
    plain = name.replace(os.sep, "/")
    return next((script for path, script in SCRIPTS.items() if plain == path or plain.endswith(f"/{path}")), None)
