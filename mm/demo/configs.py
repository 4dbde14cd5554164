"""The configuration files of the embedded default: those of the guide, with the tiny model's values and paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mm.demo.clips import FPS, NUM_FRAMES, SIZE
from mm.demo.components import FLOW_SHIFT, MODEL_NAME, TRANSFORMER

TEXT_LEN = 32  # tokens; the captions have up to 8, and padding to 512 would cost more than the video itself


def write_configs(folder: Path, home: Path) -> None:
    """Write every configuration file of a run on the embedded default.

    Args:
        folder: where to write them, `configs` of the embedded default.
        home: where the embedded default will stand; the files hold absolute paths below it.
    """
    folder.mkdir()
    home = home.absolute()
    weights = home / "weights" / MODEL_NAME
    for name, content in _files(home, weights).items():
        (folder / name).write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
    (folder / "data.txt").write_text(f"{home / 'dataset'},data.json\n", encoding="utf-8")
    (folder / "feature_data.txt").write_text(f"{home / 'features'}\n", encoding="utf-8")


def _files(home: Path, weights: Path) -> dict[str, Any]:
    configs = home / "configs"
    clip = {"num_frames": NUM_FRAMES, "frame_interval": 1, "max_height": SIZE, "max_width": SIZE}
    tokenizer = {"from_pretrained": str(weights / "tokenizer"), "model_max_length": TEXT_LEN}
    vae = {"model_id": "wan_video_vae", "from_pretrained": str(weights / "vae"), "dtype": "fp32"}
    text_encoder = {"model_id": "UMT5", "from_pretrained": str(weights / "text_encoder"), "dtype": "fp32"}
    predictor = {
        "model_id": "wandit",
        "dtype": "fp32",
        "model_type": "t2v",
        "patch_size": list(TRANSFORMER["patch_size"]),
        "text_len": TEXT_LEN,
        "text_dim": TRANSFORMER["text_dim"],
        "in_dim": TRANSFORMER["in_channels"],
        "out_dim": TRANSFORMER["out_channels"],
        "hidden_size": TRANSFORMER["num_attention_heads"] * TRANSFORMER["attention_head_dim"],
        "ffn_dim": TRANSFORMER["ffn_dim"],
        "num_heads": TRANSFORMER["num_attention_heads"],
        "num_layers": TRANSFORMER["num_layers"],
        "freq_dim": TRANSFORMER["freq_dim"],
    }
    return {
        "data.json": {
            "dataset_param": {
                "dataset_type": "t2v",
                "basic_parameters": {"data_path": str(configs / "data.txt")},
                "preprocess_parameters": clip,
                "tokenizer_config": tokenizer,
            }
        },
        "model_wan.json": {"task": "t2v", "ae": vae, "text_encoder": text_encoder},
        "tools.json": {"sorafeature": {"save_path": str(home / "features")}, "task": "t2v"},
        "feature_data.json": {
            "dataset_param": {
                "dataset_type": "t2v",
                "basic_parameters": {"data_path": str(configs / "feature_data.txt")},
                "preprocess_parameters": clip,
            }
        },
        "pretrain_model.json": {
            "task": "t2v",
            "predictor": predictor,
            "diffusion": {"shift": FLOW_SHIFT, "loss_weighting": "none"},
        },
        "inference_model.json": {
            "prompt": str(home / "prompts.txt"),
            "negative_prompt": "",
            "save_path": str(home / "videos"),
            "fps": FPS,
            "pipeline_config": {"input_size": [NUM_FRAMES, SIZE, SIZE]},
            "ae": vae,
            "tokenizer": tokenizer,
            "text_encoder": text_encoder,
            "predictor": {**predictor, "from_pretrained": str(weights / "transformer")},
            "diffusion": {"num_inference_steps": 20, "flow_shift": FLOW_SHIFT, "guidance_scale": 1.0},
        },
    }
