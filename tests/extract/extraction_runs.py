"""Runs of extraction on a small data set, in this process, and what they leave."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from mm.config.flags import as_words
from mm.config.model import WanConfig
from mm.config.rules.extraction import check_extraction
from mm.data.dataset import open_features
from mm.dialects.mindspeed.extraction import read_extraction
from mm.dialects.mindspeed.files import load_train_data
from mm.dialects.mindspeed.training import features
from mm.extract.run import ExtractReport, extract

ROOT = Path(__file__).parents[2]
MODEL = WanConfig(text_dim=32, hidden_size=32, ffn_dim=64, num_heads=2, num_layers=1)
ROWS: list[dict[str, Any]] = [
    {"path": "videos/1.mp4", "cap": "a red circle", "num_frames": 14, "resolution": {"height": 48, "width": 64}},
    {"path": "videos/2.mp4", "cap": ["a blue square", "blue"]},
    {"path": "more/1.mp4", "cap": ""},
    {"path": "more/3.mp4", "cap": "a square moving left"},
    {"path": "more/4.mp4", "cap": "a square moving right"},
]


def run(files: dict[str, Path], rank: int = 0, world_size: int = 1, **options: Any) -> ExtractReport:
    flags = as_words({"seed": 3, **options})
    described = read_extraction([*words(files), *flags])
    check_extraction(described)
    return extract(described, device=torch.device("cpu"), rank=rank, world_size=world_size)


def words(files: dict[str, Path]) -> list[str]:
    return [word for name, path in files.items() for word in (f"--{name.replace('_', '-')}", str(path))]


def times(store: Path) -> dict[str, int]:
    """When each shard was made; there are no others."""
    shards = {path.name: (path / "body.bin").stat().st_mtime_ns for path in (store / "shards").iterdir()}
    assert not [name for name in [*shards, *os.listdir(store)] if name.startswith(".")]
    return shards


def made(store: Path) -> int:
    """Number of shards."""
    shards = store / "shards"
    return sum(not name.startswith(".") for name in os.listdir(shards)) if shards.is_dir() else 0


def edit(path: Path, *keys: str, value: Any) -> None:
    content = json.loads(path.read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(content))


def opened(store: Path, tmp_path: Path, **preprocess: Any) -> Any:
    clip = {"num_frames": 9, "max_height": 32, "max_width": 48, **preprocess}
    (tmp_path / "data.txt").write_text(f"{store}\n")
    basic = {"data_path": str(tmp_path / "data.txt"), "data_storage_mode": "sorafeatured"}
    param = {"dataset_type": "t2v", "basic_parameters": basic, "preprocess_parameters": clip}
    (tmp_path / "feature_data.json").write_text(json.dumps({"dataset_param": param}))
    return open_features(features(load_train_data(tmp_path / "feature_data.json").dataset_param), MODEL)
