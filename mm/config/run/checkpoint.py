"""The sections `adapters` and `checkpoint`: what is trained of the model, where it starts, what is kept of it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mm.config.base import Section

ResumeChange = Literal["batch", "schedule", "optimizer", "objective", "data", "precision", "average"]
"""Parts of what a step means, any of which a resumed run may be told to change."""


class AdapterSection(Section):
    """LoRA: adapters are trained, the base model is frozen but for what `training.trainable` names.

    Attributes:
        rank: width of the adapters. alpha: over rank it scales an update.
        targets: the linears that get adapters, by the end of their names.
        skip: those of them that get none all the same, by words anywhere in their native names.
        base: the frozen model's weights, in any known format.
        base_dtype: keep the frozen weights of the blocks' linears in 8 bits; None keeps the run's precision.
    """

    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)
    targets: list[str] = Field(min_length=1)
    skip: list[str] = Field(default_factory=list)
    base: str = Field(min_length=1)
    base_dtype: Literal["int8", "fp8"] | None = None


class CheckpointSection(Section):
    """Weights that a run starts from, and checkpoints that it writes.

    Attributes:
        load: weights to start from in any known format, or a folder of training checkpoints; with adapters: theirs.
        from_scratch: start from random weights on purpose.
        weights_only: take only the weights of `load`; start at step 0.
        save: folder for checkpoints and metrics; a run found there is resumed.
        save_interval: steps between checkpoints; the last step always saves.
        in_background: steps wait for a host copy only.
        on_save_failure: where the disk refuses a checkpoint that is not the last.
        save_on_signal: SIGTERM or SIGUSR1: save at the end of the step and leave with exit code 75.
        keep_latest: complete checkpoints to keep; None keeps all.
        save_optimizer: without it no run can be resumed.
        format: torch_dist: the layout-free sharded format; torch: MindSpeed-MM's files, of weights alone.
        resume_policy: a damaged newest checkpoint: fall back to the one before, or stop.
        resume_changed: what may be another than the checkpoint's.
        verify: before a checkpoint is used: compare its files' sizes, or also hash their contents.
        load_optimizer, load_average: take these too of what is resumed. same_seed: refuse another seed than its.
    """

    load: str | None = None
    from_scratch: bool = False
    weights_only: bool = False
    save: str | None = None
    save_interval: int | None = Field(None, ge=1)
    in_background: bool = False
    on_save_failure: Literal["stop", "warn"] = "stop"
    save_on_signal: bool = False
    keep_latest: int | None = Field(None, ge=1)
    save_optimizer: bool = True
    format: Literal["torch_dist", "torch"] = "torch_dist"
    resume_policy: Literal["newest", "strict"] = "newest"
    resume_changed: tuple[ResumeChange, ...] = ()
    verify: Literal["size", "full"] = "size"
    load_optimizer: bool = True
    load_average: bool = True
    same_seed: bool = True
