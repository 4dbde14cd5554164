"""Stores whose features are made in training, and the same extracted before it: files for both."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from feature_samples import write_clip
from PIL import Image

MODELS = {"t2v": "Wan2.1-T2V-Tiny-Diffusers", "i2v": "Wan2.1-I2V-Tiny-Diffusers"}
CAPTIONS = ("a red circle", "a blue square", "", "a green circle moving left")


def write_media(folder: Path, *, videos: int, images: int = 0) -> Path:
    """Videos that are longer than a clip, and images, as VideoX-Fun lists them; returns the table."""
    rows: list[dict[str, Any]] = []
    for number in range(videos):
        name = f"{number}.mp4"
        write_clip(folder / name, num_frames=14 + number, height=64, width=64)
        rows.append({"file_path": name, "text": CAPTIONS[number % 4], "type": "video"})
    for number in range(images):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append({"file_path": f"{number}.png", "text": CAPTIONS[-1 - number % 4], "type": "image"})
    (folder / "metadata.json").write_text(json.dumps(rows))
    return folder / "metadata.json"


def write_extraction(demo: Path, table: Path, store: Path, task: str = "t2v", **values: Any) -> Path:
    """run.yaml of an extraction to a store, beside it; values by path replace others."""
    weights = demo / "weights" / MODELS[task]
    tokens = {"t2v": 32, "i2v": 512}[task]
    run: dict[str, Any] = {
        "extraction": {"task": task, "seed": 3, "device": "cpu"},
        "data": {
            "path": str(table), "folder": str(table.parent), "format": "videox-fun", "workers": 1,
            "clip": {"num_frames": 9, "height": 64, "width": 64},
        },
        "encoders": {
            "vae": {"from_pretrained": str(weights / "vae"), "precision": "fp32"},
            "text": {"from_pretrained": str(weights / "text_encoder"), "precision": "fp32"},
            "tokenizer": {"from_pretrained": str(weights / "tokenizer"), "model_max_length": tokens},
        },
        "output": {"path": str(store)},
    }  # fmt: skip
    if task == "i2v":
        run["encoders"]["image"] = {"from_pretrained": str(weights / "image_encoder")}
    for path, value in values.items():
        section, name = path.split("__")
        run[section][name] = value
    file = store.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(run))
    return file


def write_feature_data(demo: Path, store: Path, task: str = "t2v", **loading: Any) -> Path:
    """feature_data.json that trains on a store, beside it."""
    below = "" if task == "t2v" else task
    content = json.loads((demo / "configs" / below / "feature_data.json").read_text())
    listed = store.with_suffix(".txt")
    listed.write_text(f"{store}\n")
    content["dataset_param"]["basic_parameters"] = {"data_path": str(listed)}
    content["dataset_param"]["preprocess_parameters"]["cfg"] = loading.pop("cfg", 0.0)
    if loading:
        content["dataloader_param"] = loading
    file = store.with_suffix(".features.json")
    file.write_text(json.dumps(content))
    return file
