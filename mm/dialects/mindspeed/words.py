"""MindSpeed-MM's word for each value of a training run: flags (`sets` in their fields) and keys of files."""

from __future__ import annotations

from typing import Any

from mm.config.diffusion import DiffusionConfig
from mm.config.layerzero import ZeroConfig
from mm.config.model import WanConfig
from mm.config.run.data import ConditionDropout, Mixture
from mm.config.run.origins import Origins, Word
from mm.config.storage import Storage
from mm.config.unread import read_or
from mm.dialects.mindspeed.extract_files import ExtractFlags
from mm.dialects.mindspeed.flag_paths import Flag, flags_by_path
from mm.dialects.mindspeed.mesh_flags import MeshFlags
from mm.dialects.mindspeed.train_flags import TrainFlags

ZERO_FILE = "zero_config.yaml"


MESH_FLAGS = flags_by_path(MeshFlags)
_SHARED = {
    "supervision.timeout_minutes": Flag("distributed_timeout_minutes"),
    "training.device": Flag("device"),
}
"""Flags that stand for a value of another section in generation."""
_OPTIONAL = ("adapters", "experts", "evaluation", "validation", "live")
"""Sections that are there where their flags are given."""
ALL_TRAIN_FLAGS = _SHARED | flags_by_path(TrainFlags)
TRAIN_FLAGS = {path: flag for path, flag in ALL_TRAIN_FLAGS.items() if path.partition(".")[0] not in _OPTIONAL}
EXTRACT_FLAGS = flags_by_path(ExtractFlags)
_SECTIONS = {
    "adapters": Word("--lora-r"),
    "experts": Word("--expert-boundary"),
    "evaluation": Word("--eval-interval"),
    "validation": Word("--validation-interval"),
    "live": Word("--live"),
    "evaluation.features": Word("--eval-data"),
}
_CLIP = {"num_frames": "num_frames", "frame_interval": "frame_interval", "height": "max_height", "width": "max_width"}


def training_origins(flags: TrainFlags, *, says_dtype: bool = False) -> Origins:
    """The words of a command line and of the files that it names.

    Args:
        flags: the command line. says_dtype: pretrain_model.json says the precision as well.
    """
    model, zero = read_or(flags.mm_model, "pretrain_model.json"), read_or(flags.layerzero_config, None) or ZERO_FILE
    words = {path: flag.word() for path, flag in MESH_FLAGS.items()} | {"parallel.layerzero": Word("--layerzero")}
    words |= {path: flag.word() for path, flag in ALL_TRAIN_FLAGS.items()} | _SECTIONS
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
    words |= {f"{path}.clip{part}": key("preprocess_parameters", "dataset_param") for part in ("", ".shape")}
    words |= {f"{path}.path": key("data_path", basic), f"{path}.folder": key("data_folder", basic)}
    words[f"{path}.storage"] = key("storage", basic)
    words |= {f"{path}.storage.{name}": key(name, f"{basic}.storage") for name in Storage.model_fields}
    words[f"{path}.tokenizer"] = key("tokenizer_config", "dataset_param")
    for name in ("from_pretrained", "model_max_length"):
        words[f"{path}.tokenizer.{name}"] = key(name, "dataset_param.tokenizer_config")
    if path == "data.features":
        words["data.caption_dropout"] = Word("cfg", file, "cfg", file_word, is_json=True)
        words["data.condition_dropout"] = key("condition_dropout", clip)
        for name in ConditionDropout.model_fields:
            words[f"data.condition_dropout.{name}"] = key(name, f"{clip}.condition_dropout")
        words["data.shuffle"] = Word("shuffle", file, "shuffle", file_word, is_json=True)
        words["data.pin_memory"] = key("pin_memory", "dataloader_param")
        words["data.mixture"] = key("mixture", "dataloader_param")
        for name in Mixture.model_fields:
            words[f"data.mixture.{name}"] = key(name, "dataloader_param.mixture")
    return words


def listed_stages(rows: Any) -> Any:
    """`pipeline_num_layers`: a flat list where each rank has one model chunk."""
    return rows[0] if rows and len(rows) == 1 else rows
