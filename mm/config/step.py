"""What the steps of a training run mean: the values that decide what is computed, whatever the layout.

Checkpoints record them, so that a run that goes on with others says so. Who computes what, how often something is
saved or told and how many processes read are not among them: they change no step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import SerializerFunctionWrapHandler, model_serializer

from mm.config.base import Section
from mm.config.data import TrainData
from mm.config.diffusion import DiffusionConfig
from mm.config.flags import flag_name
from mm.config.optimizer import DEFAULTS, OptimizerName
from mm.config.train import ResumeChange, TrainFlags

CHANGES: tuple[ResumeChange, ...] = get_args(ResumeChange)


class ScheduleSettings(Section):
    """The learning rate; the fields are the flags of the same names, lr_decay_iters with its default filled in."""

    lr: float
    min_lr: float
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"]
    lr_decay_iters: int
    lr_warmup_iters: int
    lr_warmup_init: float


class OptimizerSettings(Section):
    """The optimizer and clipping; the fields are the flags of the same names, with the optimizer's defaults filled in.

    What checkpoints record of AdamW does not name it, as it did not when there was one.
    """

    optimizer: OptimizerName = "adamw"
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_eps: float | None = None
    clip_grad: float

    @model_serializer(mode="wrap")
    def _recorded(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = write(self)
        left_out = {"optimizer": "adamw", "adam_eps": None}
        return {name: value for name, value in values.items() if name not in left_out or value != left_out[name]}


class DataSettings(Section):
    """A data set of features.

    Attributes:
        num_samples: its size.
        identity: `mm.data.dataset.FeatureDataset.identity`, which knows no paths.
        shuffle: whether each epoch has an order of its own.
    """

    num_samples: int
    identity: str
    shuffle: bool = True


class StepSettings(Section):
    """Everything that decides what the steps of a run compute.

    Attributes:
        global_batch_size: samples of a step, of all replicas.
        schedule, optimizer: as above. objective: every key of `diffusion` in pretrain_model.json.
        caption_dropout: share of captions left out (`cfg` in feature_data.json).
        data: the features. held_out: those of `--eval-data`, which no step sees.
        bf16: precision of model and activations. ema_decay: of the average, or None.
    """

    global_batch_size: int
    schedule: ScheduleSettings
    optimizer: OptimizerSettings
    objective: dict[str, Any]
    caption_dropout: float
    data: DataSettings
    held_out: DataSettings | None
    bf16: bool
    ema_decay: float | None


def step_settings(
    flags: TrainFlags,
    diffusion: DiffusionConfig,
    data: TrainData,
    *,
    dp_size: int,
    features: DataSettings,
    held_out: DataSettings | None,
) -> StepSettings:
    """The settings of a run on `dp_size` replicas."""
    schedule = {name: getattr(flags, name) for name in ScheduleSettings.model_fields}
    return StepSettings(
        global_batch_size=flags.samples_of_step(dp_size),
        schedule=ScheduleSettings(**{**schedule, "lr_decay_iters": flags.lr_decay_iters or flags.train_iters}),
        optimizer=_optimizer_settings(flags),
        objective=diffusion.model_dump(mode="json"),
        caption_dropout=data.dataset_param.preprocess_parameters.cfg,
        data=features,
        held_out=held_out,
        bf16=flags.bf16,
        ema_decay=flags.ema_decay,
    )


def _optimizer_settings(flags: TrainFlags) -> OptimizerSettings:
    default = DEFAULTS[flags.optimizer]
    return OptimizerSettings(
        optimizer=flags.optimizer,
        weight_decay=flags.weight_decay,
        adam_beta1=default.beta1 if flags.adam_beta1 is None else flags.adam_beta1,
        adam_beta2=default.beta2 if flags.adam_beta2 is None else flags.adam_beta2,
        adam_eps=default.eps if flags.adam_eps is None else flags.adam_eps,
        clip_grad=flags.clip_grad,
    )


@dataclass(frozen=True, slots=True)
class Change:
    """One value that differs.

    Attributes:
        kind: what --resume-changed calls it; None where no step depends on it.
        name: what the user calls it. before, now: both values as the user would write them.
    """

    kind: ResumeChange | None
    name: str
    before: str
    now: str

    def __str__(self) -> str:
        return f"{self.name} was {self.before} and is {self.now}"


def changes(before: StepSettings, now: StepSettings) -> Iterator[Change]:
    """Every value that differs between a checkpoint's settings and a run's."""
    yield from _of_flags("batch", before, now, ["global_batch_size"])
    yield from _of_flags("schedule", before.schedule, now.schedule)
    if before.optimizer.optimizer != now.optimizer.optimizer:  # whose numbers then say nothing to each other
        yield from _of_flags("optimizer", before.optimizer, now.optimizer, ["optimizer", "weight_decay", "clip_grad"])
    else:
        yield from _of_flags("optimizer", before.optimizer, now.optimizer)
    for key in {**before.objective, **now.objective}:
        name = f"diffusion.{key} of --mm-model"
        yield from _differing("objective", name, before.objective.get(key), now.objective.get(key))
    yield from _differing("objective", "cfg of --mm-data", before.caption_dropout, now.caption_dropout)
    yield from _of_data("data", "--mm-data", before.data, now.data)
    yield from _differing("data", "shuffle of --mm-data", before.data.shuffle, now.data.shuffle)
    if before.held_out is not None and now.held_out is not None:
        yield from _of_data(None, "--eval-data", before.held_out, now.held_out)
    yield from _of_flags("precision", before, now, ["bf16"])
    if before.ema_decay is not None and now.ema_decay is not None:  # CKPT-085 and CKPT-086 are about the others
        yield from _of_flags("average", before, now, ["ema_decay"])


_GIVEN = {True: "given", False: "absent"}
"""How a flag without a value is told; a file has true and false."""


def _of_flags(kind: ResumeChange, before: Section, now: Section, fields: list[str] | None = None) -> Iterator[Change]:
    for field in fields or list(type(now).model_fields):
        name = flag_name(field) + " (default: --train-iters)" * (field == "lr_decay_iters")
        values = getattr(before, field), getattr(now, field)
        yield from _differing(kind, name, *(_GIVEN.get(v, v) if isinstance(v, bool) else v for v in values))


def _of_data(kind: ResumeChange | None, name: str, before: DataSettings, now: DataSettings) -> Iterator[Change]:
    if (before.num_samples, before.identity) != (now.num_samples, now.identity):
        texts = (f"{side.num_samples} samples (identity {side.identity})" for side in (before, now))
        yield Change(kind, f"the data set of {name}", *texts)


def _differing(kind: ResumeChange, name: str, before: Any, now: Any) -> Iterator[Change]:
    if before != now:
        yield Change(kind, name, _said(before), _said(now))


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
