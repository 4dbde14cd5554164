"""The flags of VideoX-Fun's trainers of Wan2.1, with its names and defaults, each with its meaning here.

One class a kind of script: `FullFlags` trains the model, `LoRAFlags` adapters, and those of control have two flags
more. Fields are the flags of the same names; `mm.dialects.meaning` says what becomes of each.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from mm.config.diffusion import LARGEST_MODE_SCALE, MODE_SCALE
from mm.config.flags import Flags
from mm.config.run.shapes import LARGEST_SIDE, SMALLEST_SIDE
from mm.dialects.meaning import refused, taken, used

_DEAD = "no trainer of Wan2.1 reads it"
_ENCODED = "features are made before the steps, so that no encoder is on the device in one"
_NO_HUB = "weights are read from folders alone"


class VideoxFlags(Flags):
    """Flags of all of the scripts."""

    may_be_empty: ClassVar[frozenset[str]] = frozenset({"train_data_dir"})
    underscores: ClassVar[bool] = True

    config_path: str | None = used("objective.shift")
    pretrained_model_name_or_path: str = used("model", "checkpoint.load", "adapters.base", default=...)
    transformer_path: str | None = used("checkpoint.load")
    vae_path: str | None = used("encoders.vae.from_pretrained")
    train_data_dir: str | None = used("data.folder")
    train_data_meta: str = used("data.path", default=...)
    output_dir: str = used("checkpoint.save", "output.path", "data.features.path", default="sd-model-finetuned")
    logging_dir: str = used("logging.tensorboard", default="logs")
    revision: str | None = taken(_NO_HUB)
    non_ema_revision: str | None = taken(_NO_HUB)
    variant: str | None = taken(_DEAD)
    cache_dir: str | None = taken(_DEAD)
    push_to_hub: bool = taken(_DEAD, False)
    hub_token: str | None = taken(_DEAD)
    hub_model_id: str | None = taken(_DEAD)
    tracker_project_name: str | None = taken("a run is named by its folder")
    report_to: str = used(default="tensorboard")

    enable_bucket: bool = used(default=False)
    random_ratio_crop: bool = used(default=False)
    random_frame_crop: bool = used("data.clip.frames.shorter_share", default=False)
    random_hw_adapt: bool = used(default=False)
    training_with_video_token_length: bool = used(default=False)
    keep_all_node_same_token_length: bool = taken("replicas are given micro-batches of equal cost", False)
    auto_tile_batch_size: bool = refused(
        "would train on short clips several times in one step",
        "Remove it; --gradient_accumulation_steps makes steps larger.",
        False,
    )
    token_sample_size: int = used("data.clip.shape.token_side", default=512, ge=SMALLEST_SIDE, le=LARGEST_SIDE)
    video_sample_size: int = used(
        "data.clip.shape.min_side", "data.clip.shape.side", default=512, ge=SMALLEST_SIDE, le=LARGEST_SIDE
    )
    image_sample_size: int = used(
        "data.clip.shape.max_side", "data.clip.shape.image_side", default=512, ge=SMALLEST_SIDE, le=LARGEST_SIDE
    )
    fix_sample_size: list[int] | None = used("data.clip.height", "data.clip.width")
    video_sample_stride: int = used("data.clip.frame_interval", default=4, ge=1)
    video_sample_n_frames: int = used("data.clip.num_frames", default=17, ge=1)
    video_repeat: int = used(default=0, ge=0)
    tokenizer_max_length: int = used("encoders.tokenizer.model_max_length", default=512, ge=1, le=512)
    enable_text_encoder_in_dataloader: bool = taken(_ENCODED, False)
    dataloader_num_workers: int = used("data.workers", default=0, ge=0)
    random_flip: bool = taken(_DEAD, False)
    max_train_samples: str | None = taken(_DEAD)

    train_batch_size: int = used("data.micro_batch_size", default=16, ge=1)
    gradient_accumulation_steps: int = used("data.global_batch_size", default=1, ge=1)
    num_train_epochs: int = used("training.steps", default=100, ge=1)
    max_train_steps: int | None = used("training.steps", ge=1)
    learning_rate: float = used("optimizer.lr", default=1e-4, gt=0)
    scale_lr: bool = used(default=False)
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = used("optimizer.decay", default="constant")
    lr_warmup_steps: int = used("optimizer.warmup_steps", default=500, ge=0)
    use_8bit_adam: bool = refused(
        "keeps AdamW's moments in 8 bits, which is not here",
        "Remove it. To save their memory, shard them over the processes with ZeRO-2 (--use_deepspeed), train adapters "
        "with the _lora script, or use mm train --optimizer lion, which keeps one moment in place of two.",
        False,
    )
    use_came: bool = refused(
        "takes the optimizer CAME, which is not here",
        "Remove it: AdamW is used. To save memory, shard its moments over the processes with ZeRO-2 (--use_deepspeed), "
        "or use mm train --optimizer lion, which keeps one in place of two.",
        False,
    )
    adam_beta1: float = used("optimizer.beta1", default=0.9, ge=0, lt=1)
    adam_beta2: float = used("optimizer.beta2", default=0.999, ge=0, lt=1)
    adam_weight_decay: float = used("optimizer.weight_decay", default=1e-2, ge=0)
    adam_epsilon: float = used("optimizer.eps", default=1e-8, gt=0)
    max_grad_norm: float = used("optimizer.clip_norm", default=1.0, ge=0)

    uniform_sampling: bool = used("objective.timestep_slices", default=False)
    train_sampling_steps: int = used("objective.num_train_timesteps", default=1000, ge=2)
    weighting_scheme: Literal["sigma_sqrt", "logit_normal", "mode", "cosmap", "none"] = used(
        "objective.loss_weighting", "objective.timestep_sampling", default="none"
    )
    logit_mean: float = used("objective.logit_mean", default=0.0)
    logit_std: float = used("objective.logit_std", default=1.0, gt=0)
    mode_scale: float = used("objective.mode_scale", default=MODE_SCALE, ge=-1, le=LARGEST_MODE_SCALE)
    motion_sub_loss: bool = used(default=False)
    motion_sub_loss_ratio: float = used("objective.motion_loss_ratio", default=0.25, gt=0, le=1)
    snr_loss: bool = taken(_DEAD, False)
    noise_offset: str | None = taken(_DEAD)
    prediction_type: str | None = taken(_DEAD)
    input_perturbation: str | None = taken(_DEAD)

    mixed_precision: Literal["no", "fp16", "bf16"] | None = used("model.precision")
    gradient_checkpointing: bool = used("memory.recompute", "memory.method", default=False)
    vae_mini_batch: str | None = taken("extraction encodes clip by clip")
    low_vram: bool = taken(_ENCODED, False)
    multi_stream: bool = taken(_ENCODED, False)
    allow_tf32: bool = taken("products of fp32 matrices stay exact", False)
    use_deepspeed: bool = used("parallel.distributed_optimizer", default=False)
    use_fsdp: bool = used("parallel.layerzero", default=False)
    local_rank: str | None = taken("the launcher's variables say the rank")

    checkpointing_steps: int = used("checkpoint.save_interval", default=500, ge=1)
    checkpoints_total_limit: int | None = used("checkpoint.keep_latest", ge=1)
    resume_from_checkpoint: str | None = used("checkpoint.resume")
    validation_prompts: list[str] | None = used("validation.prompts", "validation.config")
    validation_paths: list[str] | None = used("validation.images")
    validation_epochs: int | None = used(ge=1)
    validation_steps: int | None = used("validation.interval", ge=1)
    seed: int | None = used("training.seed", "extraction.seed", ge=0)

    feature_draws: int | None = used("extraction.draws", ge=1)
    live: bool = used("live.extractions", default=False)
    live_budget: str | None = used("live.budget")
    overwrite_features: bool = used("output.overwrite", default=False)


class FullFlags(VideoxFlags):
    """Flags of the scripts that train the model itself."""

    trainable_modules: list[str] | None = used("training.trainable")
    trainable_modules_low_learning_rate: list[str] | None = used()
    initial_grad_norm_ratio: float = used("optimizer.initial_clip_ratio", default=5.0, gt=0)
    abnormal_norm_clip_start: int = used("optimizer.abnormal_clip_start", default=1000, ge=0)
    use_ema: bool = used("optimizer.ema_decay", default=False)
    report_model_info: bool = used("logging.norms_interval", default=False)
    selective_ac: float = used("memory.blocks", default=0.0, ge=0, le=1)


class LoRAFlags(VideoxFlags):
    """Flags of the scripts that train adapters."""

    rank: int = used("adapters.rank", default=128, ge=1)
    network_alpha: float = used("adapters.alpha", default=64.0, gt=0)
    target_name: str | None = used("adapters.targets")
    lora_skip_name: str | None = used("adapters.skip")
    use_peft_lora: bool = taken("files have their alpha, in names that every tool reads", False)
    train_text_encoder: bool = refused("trains the text encoder", "Remove it; Wan's stays as it is.", False)
    save_state: bool = taken("a run's state is always kept, in iter_* folders of --output_dir", False)
    use_ema: bool = taken(_DEAD.replace("Wan2.1", "adapters"), False)


class FullControlFlags(FullFlags):
    """Flags of train_control.py."""

    train_mode: str | None = used("extraction.task")
    control_ref_image: Literal["first_frame", "random"] = used(default="first_frame")
    add_full_ref_image_in_self_attention: bool = used(default=False)


class LoRAControlFlags(LoRAFlags):
    """Flags of train_control_lora.py."""

    train_mode: str | None = used("extraction.task")
    control_ref_image: Literal["first_frame", "random"] = used(default="first_frame")
    add_full_ref_image_in_self_attention: bool = used(default=False)


class FullPlainFlags(FullFlags):
    """Flags of train.py."""

    train_mode: str = used("extraction.task", default="normal")


class LoRAPlainFlags(LoRAFlags):
    """Flags of train_lora.py."""

    train_mode: str = used("extraction.task", default="normal")
