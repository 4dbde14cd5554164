"""MindSpeed-MM's word for each value of a training run, in both directions.

One table says which flag stands for which path of the sections; reading a command line, naming a value in a message
and writing what would change it all go through it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any

from mm.config.diffusion import DiffusionConfig
from mm.config.flags import Flags, flag_name
from mm.config.layerzero import ZeroConfig
from mm.config.model import WanConfig
from mm.config.run.origins import Origins, Word
from mm.config.unread import Unread, read_or
from mm.dialects.mindspeed.train_flags import TrainFlags

ZERO_FILE = "zero_config.yaml"
_NOT = {True: False, False: True}


@dataclass(frozen=True)
class Flag:
    """A flag that stands for a value.

    Attributes:
        field: its field. values: the flag's value for a value of the section, where they differ.
        absent: the section's value where the flag is not given.
    """

    field: str
    values: Mapping[Any, Any] = dataclass_field(default_factory=dict)
    absent: Any = None

    def read(self, flags: Flags) -> Any:
        """The section's value."""
        given = getattr(flags, self.field)
        if given is None or isinstance(given, Unread):
            return self.absent if given is None else given
        return next((value for value, spelled in self.values.items() if spelled == given), given)

    def spelled(self, value: Any) -> Any:
        """The flag's value."""
        return self.values.get(value, value) if self.values else value

    def word(self) -> Word:
        """Name of the flag."""
        return Word(flag_name(self.field), spelled=self.spelled)


MESH_FLAGS: dict[str, Flag] = {
    "parallel.tensor_size": Flag("tensor_model_parallel_size"),
    "parallel.context_size": Flag("context_parallel_size"),
    "parallel.sequence_parallel": Flag("sequence_parallel"),
    "parallel.context_algorithm": Flag(
        "context_parallel_algo",
        {"ulysses": "ulysses_cp_algo", "ring": "megatron_cp_algo", "hybrid": "hybrid_cp_algo"},
    ),
    "parallel.ulysses_size": Flag("ulysses_degree_in_cp"),
    "parallel.ring_overlap": Flag("use_cp_send_recv_overlap"),
    "parallel.ring_window": Flag("cp_window_size"),
}
TRAIN_FLAGS: dict[str, Flag] = {
    **MESH_FLAGS,
    "supervision.timeout_minutes": Flag("distributed_timeout_minutes"),
    "training.device": Flag("device"),
    "parallel.pipeline_size": Flag("pipeline_model_parallel_size"),
    "parallel.virtual_size": Flag("virtual_pipeline_model_parallel_size", absent=1),
    "parallel.variable_sizes": Flag("variable_seq_lengths"),
    "data.micro_batch_size": Flag("micro_batch_size"),
    "data.global_batch_size": Flag("global_batch_size"),
    "training.steps": Flag("train_iters"),
    "data.workers": Flag("num_workers"),
    "data.read_timeout": Flag("read_timeout"),
    "data.on_bad_sample": Flag("on_bad_sample"),
    "training.seed": Flag("seed"),
    "training.deterministic": Flag("deterministic_mode"),
    "memory.recompute": Flag("recompute_granularity"),
    "memory.method": Flag("recompute_method"),
    "memory.blocks": Flag("recompute_num_layers"),
    "memory.keep_attention": Flag("recompute_skip_core_attention"),
    "memory.keep_attention_blocks": Flag("recompute_num_layers_skip_core_attention"),
    "memory.keep": Flag("recompute_keep"),
    "memory.compile_blocks": Flag("compile_blocks"),
    "model.precision": Flag("bf16", {"bf16": True, "fp32": False}),
    "optimizer.lr": Flag("lr"),
    "optimizer.min_lr": Flag("min_lr"),
    "optimizer.decay": Flag("lr_decay_style"),
    "optimizer.decay_steps": Flag("lr_decay_iters"),
    "optimizer.warmup_steps": Flag("lr_warmup_iters"),
    "optimizer.warmup_init": Flag("lr_warmup_init"),
    "optimizer.weight_decay": Flag("weight_decay"),
    "optimizer.name": Flag("optimizer"),
    "optimizer.beta1": Flag("adam_beta1"),
    "optimizer.beta2": Flag("adam_beta2"),
    "optimizer.eps": Flag("adam_eps"),
    "optimizer.on_nonfinite": Flag("on_nonfinite"),
    "supervision.replica_hash_interval": Flag("check_replica_hash_interval"),
    "optimizer.clip_norm": Flag("clip_grad"),
    "optimizer.ema_decay": Flag("ema_decay"),
    "parallel.distributed_optimizer": Flag("use_distributed_optimizer"),
    "parallel.overlap_grad_reduce": Flag("overlap_grad_reduce"),
    "parallel.overlap_param_gather": Flag("overlap_param_gather"),
    "checkpoint.load": Flag("load"),
    "checkpoint.save": Flag("save"),
    "checkpoint.save_interval": Flag("save_interval"),
    "checkpoint.in_background": Flag("async_save"),
    "checkpoint.on_save_failure": Flag("on_save_failure"),
    "checkpoint.save_on_signal": Flag("save_on_signal"),
    "checkpoint.keep_latest": Flag("keep_latest"),
    "checkpoint.resume_policy": Flag("resume_policy"),
    "checkpoint.resume_changed": Flag("resume_changed"),
    "checkpoint.verify": Flag("verify_checkpoint"),
    "checkpoint.save_optimizer": Flag("no_save_optim", _NOT),
    "checkpoint.load_optimizer": Flag("no_load_optim", _NOT),
    "checkpoint.load_average": Flag("no_load_ema", _NOT),
    "checkpoint.same_seed": Flag("no_load_rng", _NOT),
    "checkpoint.weights_only": Flag("finetune"),
    "checkpoint.from_scratch": Flag("init_from_scratch"),
    "checkpoint.format": Flag("ckpt_format"),
    "supervision.hang_timeout": Flag("hang_timeout"),
    "supervision.straggler_interval": Flag("straggler_interval"),
    "logging.interval": Flag("log_interval"),
    "logging.tensorboard": Flag("tensorboard_dir"),
    "logging.progress_bar": Flag("no_progress_bar", _NOT),
}
"""Flags that each stand for one value, in the order of the command's help."""

ADAPTER_FLAGS: dict[str, Flag] = {
    "adapters.rank": Flag("lora_r"),
    "adapters.alpha": Flag("lora_alpha"),
    "adapters.targets": Flag("lora_target_modules"),
    "adapters.base": Flag("load_base_model"),
    "adapters.base_dtype": Flag("lora_base_dtype"),
}
EVALUATION_FLAGS: dict[str, Flag] = {
    "evaluation.interval": Flag("eval_interval"),
    "validation.interval": Flag("validation_interval"),
    "validation.prompts": Flag("validation_prompts"),
    "validation.images": Flag("validation_images"),
    "validation.config": Flag("validation_config"),
}
EXTRACT_FLAGS: dict[str, Flag] = {
    "extraction.seed": Flag("seed"),
    "extraction.device": Flag("device"),
    "data.workers": Flag("num_workers"),
    "data.read_timeout": Flag("decode_timeout"),
    "data.on_bad_sample": Flag("on_bad_sample"),
    "output.overwrite": Flag("overwrite"),
    "supervision.timeout_minutes": Flag("distributed_timeout_minutes"),
}
"""Flags of extraction that each stand for one value."""
_SECTIONS = {
    "adapters": Word("--lora-r"),
    "evaluation": Word("--eval-interval"),
    "validation": Word("--validation-interval"),
    "evaluation.features": Word("--eval-data"),
}
_CLIP = {"num_frames": "num_frames", "frame_interval": "frame_interval", "height": "max_height", "width": "max_width"}


def training_origins(flags: TrainFlags, *, says_dtype: bool = False) -> Origins:
    """The words of a command line and of the files that it names.

    Args:
        flags: the command line. says_dtype: pretrain_model.json says the precision as well.
    """
    model, zero = read_or(flags.mm_model, "pretrain_model.json"), read_or(flags.layerzero_config, None) or ZERO_FILE
    tables = {**TRAIN_FLAGS, **ADAPTER_FLAGS, **EVALUATION_FLAGS}
    words = {path: flag.word() for path, flag in MESH_FLAGS.items()} | {"parallel.layerzero": Word("--layerzero")}
    words |= {path: flag.word() for path, flag in tables.items()} | _SECTIONS
    if "load_base_model" not in flags.model_fields_set and read_or(flags.load_base_model, None) is not None:
        words["adapters.base"] = Word("--load")  # see mm.dialects.mindspeed.as_done_here
    words |= _keys_of_model(model)
    words |= _keys_of_data("data.features", read_or(flags.mm_data, "feature_data.json"), "--mm-data")
    held_out = read_or(flags.eval_data, None) or "held-out features"
    words |= _keys_of_data("evaluation.features", held_out, "--eval-data")
    words |= {f"parallel.layerzero.{name}": Word(name, zero) for name in ZeroConfig.model_fields}
    also: dict[str, tuple[Word, ...]] = {
        "parallel.layerzero": (Word("--layerzero-config", spelled=lambda _: ZERO_FILE),)
    }
    if says_dtype:
        also["model.precision"] = (Word("dtype", model, is_json=True),)
    return Origins(words, also=also)


def mesh_words(zero_file: str | None) -> dict[str, Word]:
    """The words about how a model lies on the processes, which training and generation share."""
    words = {path: flag.word() for path, flag in MESH_FLAGS.items()}
    words["parallel.layerzero"] = Word("--layerzero")
    return words | {
        f"parallel.layerzero.{name}": Word(name, zero_file or ZERO_FILE) for name in ZeroConfig.model_fields
    }


def _keys_of_model(file: str) -> dict[str, Word]:
    def key(name: str, parent: str, **more: Any) -> Word:
        return Word(name, file, f"{parent}.{name}", "--mm-model", is_json=True, **more)

    words = {f"model.shape.{name}": key(name, "predictor") for name in WanConfig.model_fields}
    words["parallel.stages"] = key("pipeline_num_layers", "predictor", spelled=listed_stages)
    words["memory.offload"] = key("attention_async_offload", "predictor")
    return words | {f"objective.{name}": key(name, "diffusion") for name in DiffusionConfig.model_fields}


def _keys_of_data(path: str, file: str, file_word: str) -> dict[str, Word]:
    def key(name: str, parent: str = "") -> Word:
        return Word(name, file, f"{parent}.{name}" if parent else name, file_word, is_json=True)

    clip, basic = "dataset_param.preprocess_parameters", "dataset_param.basic_parameters"
    words = {f"{path}.clip.{ours}": key(theirs, clip) for ours, theirs in _CLIP.items()}
    words |= {f"{path}.path": key("data_path", basic), f"{path}.folder": key("data_folder", basic)}
    words[f"{path}.tokenizer"] = key("tokenizer_config", "dataset_param")
    for name in ("from_pretrained", "model_max_length"):
        words[f"{path}.tokenizer.{name}"] = key(name, "dataset_param.tokenizer_config")
    if path == "data.features":
        words["data.caption_dropout"] = Word("cfg", file, "cfg", file_word, is_json=True)
        words["data.shuffle"] = Word("shuffle", file, "shuffle", file_word, is_json=True)
        words["data.pin_memory"] = key("pin_memory", "dataloader_param")
    return words


def listed_stages(rows: Any) -> Any:
    """`pipeline_num_layers`: a flat list where each rank has one model chunk."""
    return rows[0] if rows and len(rows) == 1 else rows
