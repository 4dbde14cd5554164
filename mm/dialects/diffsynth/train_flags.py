"""The arguments of DiffSynth-Studio's train.py for Wan, with its names and defaults, each with its meaning here.

Those of the guide and those that came later, such as `--extra_inputs`, which stands for all of `--input_contains_*`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from mm.config.flags import Flags
from mm.dialects.meaning import refused, taken, used

_WEIGHTS_WAIT = "the model lies on the device for all of the training"
_NO_SERVICE = "reports to a service, and none is asked here"
_FILES = "Remove it: checkpoints/metrics.jsonl and TensorBoard's files below --output_path have all numbers."
_SHARD = "Remove it; ZeRO-2 or ZeRO-3 of accelerate's configuration shares the memory among the processes."
_CONTAINS = "the same as this name in --extra_inputs"


class DiffSynthFlags(Flags):
    """Train a Wan2.1 transformer, or a LoRA of it, on a folder of videos and images with DiffSynth-Studio's arguments.

    Features are made first, into OUTPUT_PATH/features, and taken from there by the next start of the same command.
    """

    may_be_empty: ClassVar[frozenset[str]] = frozenset(
        {"dataset_base_path", "lora_target_modules", "remove_prefix_in_ckpt"}
    )
    groups: ClassVar[Mapping[str, str]] = {
        "dataset_base_path": "data set",
        "model_paths": "models",
        "learning_rate": "training",
        "trainable_models": "trained modules",
        "extra_inputs": "further inputs of the model",
        "use_gradient_checkpointing": "memory",
        "find_unused_parameters": "how it works here anyway",
        "fp8_models": "not here",
    }

    dataset_base_path: str = used("data.folder", default="", description="folder that the data set's paths start from")
    dataset_metadata_path: str = used(
        "data.path", default=..., description="metadata.csv, .json or .jsonl: video or image, prompt, further columns"
    )
    height: int | None = used(
        "data.clip.height", ge=1, description="of all samples; without height and width each keeps its own size"
    )
    width: int | None = used("data.clip.width", ge=1, description="as --height")
    max_pixels: int = used(
        "data.clip.shape.max_pixels",
        "data.clip.shape",
        default=1920 * 1080,
        ge=256,
        description="without --height and --width: larger pictures are made as small",
    )
    num_frames: int = used("data.clip.num_frames", default=81, ge=1, description="first frames of each video")
    data_file_keys: str = used(
        "data.file_keys", default="image,video", description="columns of the metadata whose cells are paths"
    )
    dataset_repeat: int = used("training.steps", default=1, ge=1, description="passes over the data set in an epoch")
    dataset_num_workers: int | None = used(
        "data.workers", ge=0, description="processes that read, for each process that trains; default: 2"
    )

    model_paths: str | None = used("checkpoint.load", description="JSON: paths, those of one model's shards in a list")
    model_id_with_origin_paths: str | None = used(
        "checkpoint.load",
        description="ID:PATTERN,ID:PATTERN: released models below ./models, and which of their files",
    )
    tokenizer_path: str | None = used(
        "encoders.tokenizer.from_pretrained", description="folder; default: google/umt5-xxl of the released models"
    )

    learning_rate: float = used("optimizer.lr", default=1e-4, gt=0, description="from the first step on")
    num_epochs: int = used("training.steps", default=1, ge=1, description="epochs")
    weight_decay: float = used("optimizer.weight_decay", default=0.01, ge=0, description="of AdamW; none on biases")
    gradient_accumulation_steps: int | None = used(
        "data.global_batch_size",
        ge=1,
        description="samples of each process in one step; default: what accelerate's configuration says, or 1",
    )
    output_path: str = used(
        "checkpoint.save",
        "output.path",
        "data.features.path",
        default="./models",
        description="gets epoch-N.safetensors, features/, and checkpoints/, from which the same command goes on",
    )
    save_steps: int | None = used(
        "checkpoint.save_interval", ge=1, description="steps between step-N.safetensors, in the place of epochs"
    )
    remove_prefix_in_ckpt: str = used(
        default="pipe.dit.", description="taken off the names of the tensors in these files; several with commas"
    )
    min_timestep_boundary: float = used(
        "objective.band_below", default=0.0, ge=0, le=1, description="share of the noisiest steps that are left out"
    )
    max_timestep_boundary: float = used(
        "objective.band_from", default=1.0, ge=0, le=1, description="share of the steps that is kept, noisiest first"
    )
    task: Literal["sft"] = used(default="sft", description="training on a data set")

    trainable_models: str | None = used(
        "training.trainable", description="models that are trained whole, such as dit; the others are frozen"
    )
    lora_base_model: str | None = used("adapters.base", description="the model that gets LoRA, such as dit")
    lora_target_modules: str = used(
        "adapters.targets", default="q,k,v,o,ffn.0,ffn.2", description="its linears that get it; empty: all of blocks"
    )
    lora_rank: int = used("adapters.rank", "adapters.alpha", default=32, ge=1, description="of LoRA; its alpha too")
    lora_checkpoint: str | None = used(description="LoRA to start from")

    extra_inputs: str | None = used(
        "extraction.task", description="what the model is given: input_image, end_image, control_video, ..."
    )
    input_contains_input_image: bool = used(default=False, description=_CONTAINS)
    input_contains_end_image: bool = used(default=False, description=_CONTAINS)
    input_contains_control_video: bool = used(default=False, description=_CONTAINS)
    input_contains_reference_image: bool = used(default=False, description=_CONTAINS)
    input_contains_vace_video: bool = used(default=False, description=_CONTAINS)
    input_contains_vace_reference_image: bool = used(default=False, description=_CONTAINS)
    input_contains_motion_bucket_id: bool = used(default=False, description=_CONTAINS)

    use_gradient_checkpointing: bool = taken("blocks are always computed again in backward", False)
    use_gradient_checkpointing_offload: bool = used(
        "memory.offload", default=False, description="what blocks keep for backward waits in host memory"
    )

    find_unused_parameters: bool = taken("each parameter gets its gradient in each step", False)
    initialize_model_on_cpu: bool = taken("weights are read straight into place", False)
    enable_tensorboard_log: bool = taken("TensorBoard's files are always written, below checkpoints", False)
    enable_csv_log: bool = taken("all numbers of a step are in checkpoints/metrics.jsonl", False)

    fp8_models: str | None = refused(
        "keeps frozen models in 8 bits", "Remove it; the encoders are not on the device in a step."
    )
    offload_models: str | None = refused(
        "drops models from memory", "Remove it; the encoders are not on the device in a step."
    )
    quant_options: str | None = refused("is of libraries that are not used here", "Remove it.")
    enable_model_cpu_offload: bool = refused(f"is not done: {_WEIGHTS_WAIT}", _SHARD, False)
    enable_optimizer_cpu_offload: bool = refused("is not done: its state lies on the device", _SHARD, False)
    cpu_offload_split_threshold: str | None = refused(f"is not done: {_WEIGHTS_WAIT}", _SHARD)
    customized_optimizer: str | None = refused("names an optimizer of another package", "Remove it, for AdamW.")
    preset_lora_path: str | None = refused(
        "merges a LoRA first", "Merge it with mm convert --mode merge_lora, and name the result in --model_paths."
    )
    preset_lora_model: str | None = refused("merges a LoRA first", "Remove it with --preset_lora_path.")
    resume_from_checkpoint: str | None = refused(
        "takes weights alone, without optimizer and place in the data",
        "Remove it: the same command goes on from OUTPUT_PATH/checkpoints. To start from weights name them in "
        "--model_paths, a LoRA in --lora_checkpoint.",
    )
    audio_processor_path: str | None = refused("is of models with sound", "Remove it; Wan2.1 has none.")
    enable_swanlab_log: bool = refused(_NO_SERVICE, _FILES, False)
    enable_wandb_log: bool = refused(_NO_SERVICE, _FILES, False)
    swanlab_project: str | None = refused(_NO_SERVICE, _FILES)
    wandb_project: str | None = refused(_NO_SERVICE, _FILES)
    tensorboard_project: str | None = taken("TensorBoard's files lie below checkpoints")
    csv_project: str | None = taken("all numbers of a step are in checkpoints/metrics.jsonl")
