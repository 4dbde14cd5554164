"""Meaning of a training run's steps: the values that decide what is computed, whatever the layout.

Checkpoints record them, so that a run that goes on with others says so. Who computes what, how often something is
saved or told and how many processes read are not among them: they change no step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from mm.config.base import Section
from mm.config.optimizer import OptimizerName
from mm.config.run.checkpoint import ResumeChange
from mm.config.run.origins import Origins
from mm.config.run.training import TrainingRun
from mm.config.trainable import patterns_of


class ScheduleSettings(Section):
    """The learning rate, with Megatron's names; lr_decay_iters with its default filled in."""

    lr: float
    min_lr: float
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"]
    lr_decay_iters: int
    lr_warmup_iters: int
    lr_warmup_init: float


class OptimizerSettings(Section):
    """The optimizer and clipping, with Megatron's names and the optimizer's defaults filled in.

    What checkpoints record of AdamW does not name it, as it did not when there was one; likewise with a limit of the
    gradient norm that never changes.
    """

    optimizer: OptimizerName = "adamw"
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_eps: float | None = None
    clip_grad: float
    initial_clip_ratio: float | None = None
    abnormal_clip_start: int | None = None

    @model_serializer(mode="wrap")
    def _recorded(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = write(self)
        left_out = {"optimizer": "adamw", "adam_eps": None, "initial_clip_ratio": None, "abnormal_clip_start": None}
        return {name: value for name, value in values.items() if name not in left_out or value != left_out[name]}


AS_LISTED = "as they are listed"
"""Order of samples that are not shuffled."""


class DataSettings(Section):
    """A data set of features.

    Attributes:
        num_samples: its size.
        identity: `mm.data.dataset.FeatureDataset.identity`, which knows no paths.
        shuffle: whether each epoch has an order of its own.
        plan: what decides the order, `mm.data.planning.describe_plan`; None in checkpoints that do not record it.
    """

    num_samples: int
    identity: str
    shuffle: bool = True
    plan: str | None = None

    @property
    def order(self) -> str:
        """The plan; of checkpoints that do not record it, what it was then."""
        return self.plan or ("lists of random permutations" if self.shuffle else AS_LISTED)


class StepSettings(Section):
    """Everything that decides what the steps of a run compute.

    Attributes:
        global_batch_size: samples of a step, of all replicas.
        schedule, optimizer: as above. objective: every key of that section.
        caption_dropout: share of captions left out. condition_dropout: shares above zero of other conditions.
        data: the features. held_out: those of its evaluation, which no step sees.
        bf16: precision of model and activations. ema_decay: of the average, or None.
        pack_tokens: tokens of packed sequences, or None. The only one that decides nothing but rounding.
        expert_steps: of one of two experts, how many steps it has in a row; None where every step is of this model.
        trainable: words for the parameters that are trained, or None.
    """

    global_batch_size: int
    schedule: ScheduleSettings
    optimizer: OptimizerSettings
    objective: dict[str, Any]
    caption_dropout: float
    condition_dropout: dict[str, float] = Field(default_factory=dict)
    data: DataSettings
    held_out: DataSettings | None
    bf16: bool
    ema_decay: float | None
    pack_tokens: int | None = None
    expert_steps: int | None = None
    trainable: list[str] | None = None

    @model_serializer(mode="wrap")
    def _recorded(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = write(self)
        for name in ("expert_steps", "trainable"):  # as it was before there were such
            if values[name] is None:
                del values[name]
        return values


SCHEDULE = {
    "lr": "lr",
    "min_lr": "min_lr",
    "lr_decay_style": "decay",
    "lr_decay_iters": "decay_steps",
    "lr_warmup_iters": "warmup_steps",
    "lr_warmup_init": "warmup_init",
}
_CLIPPING = {
    "clip_grad": "clip_norm",
    "initial_clip_ratio": "initial_clip_ratio",
    "abnormal_clip_start": "abnormal_clip_start",
}
OPTIMIZER = {
    "optimizer": "name",
    "weight_decay": "weight_decay",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "adam_eps": "eps",
    **_CLIPPING,
}
"""Names in checkpoints, which keep Megatron's, and in the section `optimizer`."""


def step_settings(
    run: TrainingRun, *, dp_size: int, features: DataSettings, held_out: DataSettings | None
) -> StepSettings:
    """The settings of a run on `dp_size` replicas."""
    update = run.optimizer.filled()
    schedule, optimizer = (
        {theirs: getattr(update, ours) for theirs, ours in names.items()} for names in (SCHEDULE, OPTIMIZER)
    )
    schedule["lr_decay_iters"] = run.optimizer.decay_steps or run.training.steps
    return StepSettings(
        global_batch_size=run.samples_of_step(dp_size),
        schedule=ScheduleSettings(**schedule),
        optimizer=OptimizerSettings(**optimizer),
        objective=run.objective.model_dump(mode="json"),
        caption_dropout=run.data.caption_dropout,
        condition_dropout=run.data.condition_dropout.rates,
        data=features,
        held_out=held_out,
        bf16=run.model.precision == "bf16",
        ema_decay=run.optimizer.ema_decay,
        pack_tokens=run.data.pack_tokens,
        expert_steps=None if run.experts is None else run.experts.steps_in_a_row,
        trainable=None if run.training.trainable is None else list(run.training.trainable),
    )


def trains_the_same(before: StepSettings | None, now: StepSettings) -> bool:
    """Tell whether two runs train the same parameters, whatever their factors; None trains all of them."""
    words = (None if side is None else side.trainable for side in (before, now))
    then, today = (None if one is None else {pattern.text for pattern in patterns_of(one)} for one in words)
    return then == today


@dataclass(frozen=True, slots=True)
class Change:
    """One value that differs.

    Attributes:
        kind: what `checkpoint.resume_changed` calls it; None where no step depends on it.
        name: what the user calls it. before, now: both values as the user would write them.
    """

    kind: ResumeChange | None
    name: str
    before: str
    now: str

    def __str__(self) -> str:
        return f"{self.name} was {self.before} and is {self.now}"


def changes(before: StepSettings, now: StepSettings, words: Origins) -> Iterator[Change]:
    """Every value that differs between a checkpoint's settings and a run's, which `words` names."""
    yield from _of_values("batch", before, now, {"global_batch_size": "data.global_batch_size"}, words)
    schedule, optimizer = ({name: f"optimizer.{ours}" for name, ours in of.items()} for of in (SCHEDULE, OPTIMIZER))
    if before.optimizer.optimizer != now.optimizer.optimizer:  # whose numbers then say nothing to each other
        optimizer = {name: optimizer[name] for name in ("optimizer", "weight_decay", *_CLIPPING)}
    yield from _of_values("schedule", before.schedule, now.schedule, schedule, words)
    yield from _of_values("optimizer", before.optimizer, now.optimizer, optimizer, words)
    for key in {**before.objective, **now.objective}:
        name = words[f"objective.{key}"].of()
        yield from _differing("objective", name, before.objective.get(key), now.objective.get(key))
    dropout, shuffle = words["data.caption_dropout"].of(), words["data.shuffle"].of()
    yield from _differing("objective", dropout, before.caption_dropout, now.caption_dropout)
    for key in sorted({*before.condition_dropout, *now.condition_dropout}):
        rates = (side.condition_dropout.get(key, 0.0) for side in (before, now))
        yield from _differing("objective", words[f"data.condition_dropout.{key}"].of(), *rates)
    steps_in_a_row = words["experts.steps_in_a_row"].of()
    yield from _differing("objective", steps_in_a_row, before.expert_steps, now.expert_steps)
    if trains_the_same(before, now) and before.trainable != now.trainable:  # CFG-423 is about the others
        said = (" ".join(side.trainable or ()) for side in (before, now))
        yield Change("optimizer", words["training.trainable"].name, *said)
    yield from _of_data("data", words.whole("data.features"), before.data, now.data)
    yield from _differing("data", shuffle, before.data.shuffle, now.data.shuffle)
    if before.data.shuffle == now.data.shuffle:
        yield from _differing("data", "the sampling plan", before.data.order, now.data.order)
    if before.held_out is not None and now.held_out is not None:
        yield from _of_data(None, words.whole("evaluation.features"), before.held_out, now.held_out)
    yield from _precision(before, now, words)
    if before.pack_tokens != now.pack_tokens:
        budgets = (_GIVEN[False] if side.pack_tokens is None else str(side.pack_tokens) for side in (before, now))
        yield Change(None, words["data.pack_tokens"].name, *budgets)
    if before.ema_decay is not None and now.ema_decay is not None:  # CKPT-085 and CKPT-086 are about the others
        yield from _of_values("average", before, now, {"ema_decay": "optimizer.ema_decay"}, words)


_GIVEN = {True: "given", False: "absent"}
"""How a flag without a value is told; a file has true and false."""


def _of_values(
    kind: ResumeChange, before: Section, now: Section, paths: Mapping[str, str], words: Origins
) -> Iterator[Change]:
    for field, path in paths.items():
        steps = f" (default: {words['training.steps'].name})"
        name = words[path].name + steps * (field == "lr_decay_iters")
        yield from _differing(kind, name, getattr(before, field), getattr(now, field))


def _precision(before: StepSettings, now: StepSettings, words: Origins) -> Iterator[Change]:
    if before.bf16 != now.bf16:
        word = words["model.precision"]
        then, today = (word.spelled("bf16" if side.bf16 else "fp32") for side in (before, now))
        yield Change("precision", word.name, *(_GIVEN.get(value, str(value)) for value in (then, today)))


def _of_data(kind: ResumeChange | None, name: str, before: DataSettings, now: DataSettings) -> Iterator[Change]:
    if (before.num_samples, before.identity) != (now.num_samples, now.identity):
        texts = (f"{side.num_samples} samples (identity {side.identity})" for side in (before, now))
        yield Change(kind, f"the data set of {name}", *texts)


def _differing(kind: ResumeChange, name: str, before: Any, now: Any) -> Iterator[Change]:
    if before != now:
        yield Change(kind, name, _said(before), _said(now))


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
