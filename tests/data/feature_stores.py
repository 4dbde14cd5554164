"""Small stores of one file a sample, and the files of one feature."""

import json
from pathlib import Path
from typing import Any

import torch

from mm.config.model import WanConfig
from mm.config.run.data import FeatureSet
from mm.data.features import EMPTY_PROMPT_ID, Feature, Origin, feature_name, text_hash, write_feature
from mm.data.listing import FeatureRow, write_listing
from mm.data.recipe import Recipe, save_recipe
from mm.dialects.mindspeed.data_json import TrainData
from mm.dialects.mindspeed.training import features

MODEL = WanConfig(text_dim=8, hidden_size=32, ffn_dim=64, num_heads=2, num_layers=1)
ORIGIN = Origin("videos/a.mp4", "key", text_hash("a"), "video")
RECIPE = Recipe(
    vae="v",
    text_encoder="t",
    tokenizer="k",
    height=64,
    width=64,
    num_frames=9,
    min_num_frames=None,
    frame_interval=1,
    vae_dtype="fp32",
    text_dtype="fp32",
    tile_size=None,
    tile_stride=(18, 16),
    max_text_tokens=512,
    seed=1,
)


def feature(seed: int = 0, tokens: int = 3, shape: tuple[int, ...] = (16, 3, 8, 8)) -> Feature:
    random = torch.Generator().manual_seed(seed)
    return Feature(torch.randn(shape, generator=random), torch.randn(tokens, 8, generator=random), start_frame=4)


def write_store(
    folder: Path, num_samples: int, shapes: tuple[tuple[int, ...], ...] = ((16, 3, 8, 8),), recipe: Recipe = RECIPE
) -> Path:
    (folder / "features").mkdir(parents=True)
    save_recipe(folder, recipe)
    rows = []
    for index in range(num_samples):
        sample = f"videos/{index}.mp4"
        item = feature(index, tokens=1 + index % 5, shape=shapes[index % len(shapes)])
        name = feature_name(sample)
        assert item.latents is not None
        write_feature(folder / "features" / name, item, Origin(sample, recipe.key, text_hash("x"), "v"), 512)
        rows.append(
            FeatureRow(
                sample=sample,
                file=f"features/{name}",
                path=sample,
                cap="x",
                start_frame_idx=0,
                sample_num_frames=9,
                sample_size="9x64x64",
                latent_shape=tuple(item.latents.shape),
                text_tokens=len(item.prompt),
            )
        )
    empty = Feature(None, torch.full((1, 8), 7.0))
    empty_origin = Origin(EMPTY_PROMPT_ID, recipe.key, text_hash(""), "")
    write_feature(folder / "features" / "empty_prompt.safetensors", empty, empty_origin, 512)
    write_listing(folder, rows)
    return folder


def train_data(folder: Path, **preprocess: Any) -> TrainData:
    clip = {"num_frames": 9, "max_height": 64, "max_width": 64, **preprocess}
    values = {
        "dataset_param": {
            "dataset_type": "t2v",
            "basic_parameters": {"data_path": str(folder / "data.jsonl"), "data_folder": str(folder)},
            "preprocess_parameters": clip,
        }
    }
    return TrainData.model_validate_json(json.dumps(values))


def feature_set(folder: Path, **preprocess: Any) -> FeatureSet:
    return features(train_data(folder, **preprocess).dataset_param)


def metadata() -> dict[str, str]:
    return {"made_from": json.dumps({**{f: getattr(ORIGIN, f) for f in Origin.__slots__}, "start_frame": 0})}


def tensors() -> dict[str, torch.Tensor]:
    mask = torch.zeros(512, dtype=torch.uint8)
    mask[:3] = 1
    return {"latents": torch.zeros(16, 3, 8, 8), "prompt": torch.zeros(3, 8), "prompt_mask": mask}
