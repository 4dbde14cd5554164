"""A command line of VideoX-Fun as a training run."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mm.config.diffusion import DiffusionConfig
from mm.config.layerzero import ZeroConfig
from mm.config.model import WanConfig
from mm.config.place import ProcessPlace
from mm.config.run.checkpoint import AdapterSection
from mm.config.run.data import ConditionDropout, FeatureSet
from mm.config.run.training import TrainingSections
from mm.config.tasks.task import Task
from mm.config.unread import UnreadError, built, if_read
from mm.dialects.launcher import Launch
from mm.dialects.videox_fun.flags import FullFlags, LoRAFlags, VideoxFlags
from mm.dialects.videox_fun.launch import Sharding
from mm.dialects.videox_fun.metadata import Rows
from mm.dialects.videox_fun.model_config import ModelConfig
from mm.dialects.videox_fun.scripts import Script

FEATURES = "features"
"""The store of a run's features, in its --output_dir."""
LISTING = "data.jsonl"
_DROPPED = 0.1  # share of samples that are trained without their caption, and without each condition
_EMA_DECAY = 0.9999
_ALL = "."
_LOW_RATE = 0.5  # of the others'
_LEAST_LR = 1e-7  # where the polynomial schedule ends
LINEARS = ("q", "k", "v", "o", "ffn.0", "ffn.2")
IMAGE_LINEARS = ("k_img", "v_img")


@dataclass(frozen=True)
class Facts:
    """Facts of a command's files and its launcher; any of them may be unread.

    Attributes:
        shape: of the model. task: of the features. rows: of the metadata. config: of --config_path.
        sharding: what replicas share. overlaps: reduce gradients while others are computed.
        launch: the launcher's word. place: of this process.
        resumes_from: a folder of checkpoints to go on from, or None.
    """

    shape: WanConfig
    task: Task
    rows: Rows
    config: ModelConfig
    sharding: Sharding
    overlaps: bool
    launch: Launch
    place: ProcessPlace
    resumes_from: str | None

    @property
    def world_size(self) -> int:
        """Processes, each a replica."""
        return self.place.world_size


Values = Mapping[str, Callable[[], Any]]


def training_values(script: Script, flags: VideoxFlags, facts: Facts) -> dict[str, Any]:
    """Values of the training's sections by path; what cannot be read is `UNREAD`."""
    makers: dict[str, Callable[[], Any]] = {
        "training.steps": lambda: _steps(flags, facts),
        "training.seed": lambda: 1234 if flags.seed is None else flags.seed,
        "training.device": lambda: "cpu" if facts.launch.cpu else None,
        "training.trainable": lambda: _trainable(flags),
        "model.shape": lambda: facts.shape,
        "model.precision": lambda: precision_of(flags, facts.launch),
        **_data(script, flags, facts),
        **_optimizer(flags, facts),
        "parallel.distributed_optimizer": lambda: facts.sharding == "optimizer",
        "parallel.overlap_grad_reduce": lambda: facts.sharding == "optimizer" and facts.overlaps,
        "parallel.layerzero": lambda: _layerzero(facts),
        **_memory(flags, facts),
        **_checkpoint(flags, facts),
        "logging.norms_interval": lambda: 1 if isinstance(flags, FullFlags) and flags.report_model_info else None,
        "logging.tensorboard": lambda: os.path.join(flags.output_dir, flags.logging_dir),
    }
    return {path: if_read(make) for path, make in makers.items()}


def training_sections(script: Script, flags: VideoxFlags, facts: Facts) -> TrainingSections:
    """The training's sections."""
    by_section: dict[str, dict[str, Any]] = {}
    for path, value in training_values(script, flags, facts).items():
        section, name = path.split(".")
        by_section.setdefault(section, {})[name] = value
    kinds: dict[str, Any] = {name: field.annotation for name, field in TrainingSections.model_fields.items()}
    sections: dict[str, Any] = {name: built(kinds[name], values) for name, values in by_section.items()}
    sections["objective"] = if_read(lambda: _objective(flags, facts))
    sections["adapters"] = if_read(lambda: _adapters(flags, facts))
    return built(TrainingSections, sections)


def precision_of(flags: VideoxFlags, launch: Launch) -> str:
    """Precision of the run, by the script's flag or else the launcher's; fp16 is a problem elsewhere."""
    said = flags.mixed_precision or launch.mixed_precision
    return "bf16" if said in ("bf16", "fp16") else "fp32"


def is_lora(flags: VideoxFlags) -> bool:
    """True where adapters are trained."""
    return isinstance(flags, LoRAFlags)


def _samples_of_step(flags: VideoxFlags, facts: Facts) -> int:
    return flags.train_batch_size * flags.gradient_accumulation_steps * facts.world_size


def _trainable(flags: VideoxFlags) -> tuple[str, ...] | None:
    """Words for what is trained; None where that is all of the model, or adapters."""
    if not isinstance(flags, FullFlags):
        return None
    whole, slower = flags.trainable_modules or [], flags.trainable_modules_low_learning_rate or []
    if any(not is_in_names(word) for word in (*whole, *slower)):
        raise UnreadError
    if _ALL in whole and not slower:
        return None
    return (*whole, *(f"{word}:{_LOW_RATE}" for word in slower)) or None


def is_in_names(word: str) -> bool:
    """Tell whether names of parameters could have a text in them."""
    return bool(word) and ":" not in word and not any(character.isspace() for character in word)


def samples_of_pass(flags: VideoxFlags, rows: Rows) -> int:
    """Samples of one pass over the data: each video --video_repeat times, where that is above 0."""
    return rows.images + rows.videos * max(1, flags.video_repeat)


def steps_of_pass(flags: VideoxFlags, facts: Facts) -> int:
    """Steps of one pass over the data."""
    return math.ceil(samples_of_pass(flags, facts.rows) / _samples_of_step(flags, facts))


def _steps(flags: VideoxFlags, facts: Facts) -> int:
    if flags.max_train_steps is not None:
        return flags.max_train_steps
    return flags.num_train_epochs * steps_of_pass(flags, facts)


def passes_of(flags: VideoxFlags, facts: Facts) -> int:
    """Passes over the data that the training makes."""
    return math.ceil(_steps(flags, facts) * _samples_of_step(flags, facts) / samples_of_pass(flags, facts.rows))


def _data(script: Script, flags: VideoxFlags, facts: Facts) -> Values:
    return {
        "data.features": lambda: _features(flags),
        "data.caption_dropout": lambda: _DROPPED,
        "data.condition_dropout": lambda: _dropout(script, facts),
        "data.min_bucket": lambda: "repeat" if flags.train_batch_size > 1 else "error",
        "data.micro_batch_size": lambda: flags.train_batch_size,
        "data.global_batch_size": lambda: _samples_of_step(flags, facts),
        "data.workers": lambda: flags.dataloader_num_workers,
    }


def _features(flags: VideoxFlags) -> FeatureSet:
    folder = os.path.join(flags.output_dir, FEATURES)
    return FeatureSet(path=os.path.join(folder, LISTING), folder=folder)


def _dropout(script: Script, facts: Facts) -> ConditionDropout:
    if not script.drops_conditions:
        return ConditionDropout()
    return ConditionDropout(**dict.fromkeys(facts.shape.task.dropped, _DROPPED))


def _optimizer(flags: VideoxFlags, facts: Facts) -> Values:
    return {
        "optimizer.lr": lambda: flags.learning_rate * (_samples_of_step(flags, facts) if flags.scale_lr else 1),
        "optimizer.min_lr": lambda: _LEAST_LR if flags.lr_scheduler == "polynomial" else 0.0,
        "optimizer.decay": lambda: _decay(flags.lr_scheduler),
        "optimizer.decay_steps": lambda: _decay_steps(flags, facts),
        "optimizer.warmup_steps": lambda: 0 if flags.lr_scheduler == "constant" else flags.lr_warmup_steps,
        "optimizer.weight_decay": lambda: flags.adam_weight_decay,
        "optimizer.beta1": lambda: flags.adam_beta1,
        "optimizer.beta2": lambda: flags.adam_beta2,
        "optimizer.eps": lambda: flags.adam_epsilon,
        "optimizer.clip_norm": lambda: flags.max_grad_norm,
        "optimizer.initial_clip_ratio": lambda: _clipping(flags, "initial_grad_norm_ratio"),
        "optimizer.abnormal_clip_start": lambda: _clipping(flags, "abnormal_norm_clip_start"),
        "optimizer.ema_decay": lambda: _EMA_DECAY if isinstance(flags, FullFlags) and flags.use_ema else None,
    }


def _clipping(flags: VideoxFlags, name: str) -> float | int | None:
    """A flag of how gradients are clipped at first and far off; its default is of those that are clipped at all."""
    if not isinstance(flags, FullFlags) or (flags.max_grad_norm == 0 and name not in flags.model_fields_set):
        return None
    value: float | int = getattr(flags, name)
    return value


def _decay(scheduler: str) -> str:
    """Shape of the decay; a cosine with restarts has one cycle in VideoX-Fun, and a polynomial the power 1."""
    by_name = {"linear": "linear", "polynomial": "linear", "cosine": "cosine", "cosine_with_restarts": "cosine"}
    return by_name.get(scheduler, "constant")


def _decay_steps(flags: VideoxFlags, facts: Facts) -> int | None:
    """None takes all steps; a constant rate may warm up for longer than the training lasts."""
    if flags.lr_scheduler != "constant_with_warmup":
        return None
    steps = _steps(flags, facts)
    return flags.lr_warmup_steps + 1 if flags.lr_warmup_steps >= steps else None


def _objective(flags: VideoxFlags, facts: Facts) -> DiffusionConfig:
    scheduler = facts.config.scheduler_kwargs
    values: dict[str, Any] = {
        "shift": scheduler.shift,
        "num_train_timesteps": flags.train_sampling_steps,
        "loss_weighting": flags.weighting_scheme if flags.weighting_scheme in ("sigma_sqrt", "cosmap") else "none",
        "timestep_slices": "step" if flags.uniform_sampling else None,
        "motion_loss_ratio": flags.motion_sub_loss_ratio if flags.motion_sub_loss else None,
    }
    if flags.weighting_scheme == "logit_normal" and not flags.uniform_sampling:
        # VideoX-Fun counts the schedule from noise to data, and sigma goes the other way
        values |= {"timestep_sampling": "logit_normal", "logit_mean": -flags.logit_mean, "logit_std": flags.logit_std}
    if flags.weighting_scheme == "mode" and not flags.uniform_sampling:
        values |= {"timestep_sampling": "mode", "mode_scale": flags.mode_scale}
    return built(DiffusionConfig, values)


def _layerzero(facts: Facts) -> ZeroConfig | None:
    return ZeroConfig(zero3_size=facts.world_size) if facts.sharding == "parameters" else None


def _memory(flags: VideoxFlags, facts: Facts) -> Values:
    def blocks() -> int | None:
        """Blocks to recompute by --selective_ac, which asks for a share of them."""
        share = flags.selective_ac if isinstance(flags, FullFlags) else 0.0
        return round(share * facts.shape.num_layers) if share and not flags.gradient_checkpointing else None

    def recomputes() -> bool:
        return flags.gradient_checkpointing or blocks() is not None

    return {
        "memory.recompute": lambda: "full" if recomputes() else None,
        "memory.method": lambda: ("uniform" if blocks() is None else "block") if recomputes() else None,
        "memory.blocks": blocks,
    }


def _checkpoint(flags: VideoxFlags, facts: Facts) -> Values:
    def weights() -> str | None:
        if facts.resumes_from is not None:
            return facts.resumes_from
        return None if is_lora(flags) else flags.transformer_path or flags.pretrained_model_name_or_path

    return {
        "checkpoint.load": weights,
        "checkpoint.save": lambda: flags.output_dir,
        "checkpoint.save_interval": lambda: flags.checkpointing_steps,
        "checkpoint.keep_latest": lambda: flags.checkpoints_total_limit,
    }


def _adapters(flags: VideoxFlags, facts: Facts) -> AdapterSection | None:
    if not isinstance(flags, LoRAFlags):
        return None
    base, every = flags.transformer_path or flags.pretrained_model_name_or_path, [*LINEARS]
    if facts.shape.image_dim:
        every += IMAGE_LINEARS
    targets = every if flags.target_name is None else [word.strip() for word in flags.target_name.split(",")]
    skip = [] if flags.lora_skip_name is None else [word.strip() for word in flags.lora_skip_name.split(",")]
    values = {"rank": flags.rank, "alpha": flags.network_alpha, "targets": targets, "skip": skip, "base": base}
    return built(AdapterSection, values)
