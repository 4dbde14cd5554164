"""The section `optimizer`: the update of a step and its learning rate."""

from __future__ import annotations

from dataclasses import asdict
from typing import Literal

from pydantic import Field

from mm.config.base import Section
from mm.config.optimizer import DEFAULTS, OptimizerName


class OptimizerSection(Section):
    """The optimizer, its schedule, and what guards an update.

    Attributes:
        name: which optimizer.
        lr: peak learning rate. min_lr: at the end of the decay. decay: the decay's shape.
        decay_steps: steps until min_lr; None means all of the training.
        warmup_steps: of linear warm-up. warmup_init: learning rate at their start.
        weight_decay: decoupled; none on biases and norms.
        beta1, beta2: decays of its averages; eps: AdamW's epsilon; None takes the optimizer's own.
        clip_norm: largest global gradient norm; 0 turns clipping off.
        abnormal_clip_start: steps after which a norm far above the limit is clipped below it (`mm.optim.clipping`).
        initial_clip_ratio: the first step's limit is so many times `clip_norm`; it falls to that until these steps are
            over. None is 1.
        ema_decay: average the weights: after each step average = D average + (1-D) weights; None keeps no average.
        on_nonfinite: a loss or gradient that is not finite: `stop`, or `skip:K`, which leaves out up to K in a row.
    """

    name: OptimizerName = "adamw"
    lr: float = Field(gt=0)
    min_lr: float = Field(0.0, ge=0)
    decay: Literal["constant", "linear", "cosine", "inverse-square-root"] = "constant"
    decay_steps: int | None = Field(None, ge=1)
    warmup_steps: int = Field(0, ge=0)
    warmup_init: float = Field(0.0, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    beta1: float | None = Field(None, ge=0, lt=1)
    beta2: float | None = Field(None, ge=0, lt=1)
    eps: float | None = Field(None, gt=0)
    clip_norm: float = Field(1.0, ge=0)
    initial_clip_ratio: float | None = Field(None, gt=0)
    abnormal_clip_start: int | None = Field(None, ge=0)
    ema_decay: float | None = Field(None, gt=0, lt=1)
    on_nonfinite: str = Field("stop", pattern=r"^(stop|skip:[1-9][0-9]*)$")

    def filled(self) -> OptimizerSection:
        """The section with the optimizer's own numbers where none are given."""
        own = {name: value for name, value in asdict(DEFAULTS[self.name]).items() if getattr(self, name) is None}
        return self.model_copy(update=own)

    @property
    def skipped_steps_in_a_row(self) -> int:
        """Updates that may be left out in a row."""
        policy, _, most = self.on_nonfinite.partition(":")
        return int(most) if policy == "skip" else 0
