"""The configuration files of the embedded default: those of the guide, with the tiny model's values and paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mm.config.data import data_source_line
from mm.config.tasks.frames import CLIP_TOKEN_LEN
from mm.config.tasks.registry import DEFAULT, FEATURE_TASKS
from mm.config.tasks.task import Sizes, Task
from mm.demo.clips import FPS, NUM_FRAMES, SIZE
from mm.demo.components import (
    FLOW_SHIFT,
    IMAGE_DIM,
    MODEL_NAMES,
    TRANSFORMER,
    encoders_of,
    latent_channels,
    sees_images,
    tiny_sizes,
)


def text_len(task: Task) -> int:
    """Tokens that captions are padded to.

    They have up to 8, and padding to 512 costs more than the video itself; but with images diffusers takes the last 512
    tokens for text, whatever they are.
    """
    return 512 if sees_images(task) else 32


def annotation_name(task: Task) -> str:
    """The data set's list, which has the columns and files of the task if it has some."""
    return f"data_{task.name}.json" if task.columns or task.media else "data.json"


def list_names(task: Task) -> dict[str, str]:
    """Names of the lists that clips of a task are generated from, by the key of inference_model.json.

    Start images that models can do without are left out: a control video says where things are.
    """
    found = {"image": f"images_{task.name}.txt"} if task.frames else {}
    for media in task.media:
        if media.required or media.from_clip != "first frame":
            key = media.listed.removesuffix("s")
            found[key] = f"{media.listed}.txt"
    return found


def write_configs(folder: Path, home: Path) -> None:
    """Write every configuration file of a run on the embedded default, under the same names for every task.

    Args:
        folder: where to write them, `configs` of the embedded default: those of text to video here, of the other tasks
            in folders of their names below.
        home: where the embedded default will stand; the files hold absolute paths below it.
    """
    home = home.absolute()
    for task in FEATURE_TASKS.values():
        below, features = ("", "features") if task is DEFAULT else (task.name, f"features_{task.name}")
        target = folder / below
        target.mkdir()
        for name, content in _files(home, task, home / "configs" / below, home / features).items():
            (target / name).write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
        lists = {
            "data.txt": data_source_line(home / "dataset", annotation_name(task)),
            "feature_data.txt": data_source_line(home / features),
        }
        for name, line in lists.items():
            (target / name).write_text(line + "\n", encoding="utf-8")


def _files(home: Path, task: Task, configs: Path, features: Path) -> dict[str, Any]:
    weights = home / "weights" / MODEL_NAMES[encoders_of(task).name]
    transformer = home / "weights" / MODEL_NAMES[task.name] / "transformer"
    clip = {"num_frames": NUM_FRAMES, "frame_interval": 1, "max_height": SIZE, "max_width": SIZE}
    tokenizer = {"from_pretrained": str(weights / "tokenizer"), "model_max_length": text_len(task)}
    vae = {"model_id": "wan_video_vae", "from_pretrained": str(weights / "vae"), "dtype": "fp32"}
    text_encoder = {"model_id": "UMT5", "from_pretrained": str(weights / "text_encoder"), "dtype": "fp32"}
    predictor = _predictor(task)
    processor = {"i2v_processor": {"image_encoder": str(weights / "image_encoder")}} if sees_images(task) else {}
    files: dict[str, Any] = {
        "data.json": {
            "dataset_param": {
                "dataset_type": "t2v",
                "basic_parameters": {"data_path": str(configs / "data.txt")},
                "preprocess_parameters": clip,
                "tokenizer_config": tokenizer,
            }
        },
        "model_wan.json": {"task": task.name, "ae": {**vae, **processor}, "text_encoder": text_encoder},
        "tools.json": {"sorafeature": {"save_path": str(features)}, "task": task.name},
        "feature_data.json": {
            "dataset_param": {
                "dataset_type": "t2v",
                "basic_parameters": {"data_path": str(configs / "feature_data.txt")},
                "preprocess_parameters": clip,
            }
        },
        "pretrain_model.json": {
            "task": task.trains,
            "predictor": predictor,
            "diffusion": {"shift": FLOW_SHIFT, "loss_weighting": "none"},
        },
    }
    if task.models_of is not None:
        return files
    given: dict[str, Any] = {key: str(home / name) for key, name in list_names(task).items()}
    if sees_images(task):
        given["image_encoder"] = {"from_pretrained": str(weights / "image_encoder"), "dtype": "fp32"}
    if task.columns:
        given["columns"] = {column.name: str(home / f"{column.name}.txt") for column in task.columns}
    files["inference_model.json"] = {
        "prompt": str(home / "prompts.txt"),
        "negative_prompt": "",
        "save_path": str(home / ("videos" if task is DEFAULT else f"videos_{task.name}")),
        "fps": FPS,
        "pipeline_config": {"input_size": [NUM_FRAMES, SIZE, SIZE]},
        "ae": vae,
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "predictor": {**predictor, "from_pretrained": str(transformer)},
        "diffusion": {"num_inference_steps": 20, "flow_shift": FLOW_SHIFT, "guidance_scale": 1.0},
        **given,
    }
    return files


def _predictor(task: Task) -> dict[str, Any]:
    shape, channels = TRANSFORMER, latent_channels(task)
    sizes = Sizes(channels, (1, 1, 1), IMAGE_DIM, CLIP_TOKEN_LEN)
    return {
        "model_id": "wandit",
        "dtype": "fp32",
        "model_type": task.trains,
        "patch_size": list(shape["patch_size"]),
        "text_len": text_len(task),
        "text_dim": shape["text_dim"],
        "in_dim": channels + task.channels(sizes),
        "out_dim": channels,
        "hidden_size": shape["num_attention_heads"] * shape["attention_head_dim"],
        "ffn_dim": shape["ffn_dim"],
        "num_heads": shape["num_attention_heads"],
        "num_layers": shape["num_layers"],
        "freq_dim": shape["freq_dim"],
        **tiny_sizes(task),
    }
