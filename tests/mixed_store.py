"""Features of images, short and long clips of several sizes in one store, for the embedded default."""

import json
from pathlib import Path

import torch

from mm.data.features import EMPTY_PROMPT_ID, Feature, Origin, feature_name, text_hash, write_feature
from mm.data.listing import FeatureRow, write_listing
from mm.data.recipe import load_recipe, save_recipe

LATENTS = ((1, 8, 8), (3, 4, 6), (1, 6, 4), (5, 8, 8), (2, 4, 4), (3, 8, 6))
"""F, H, W in turn: of 16, 18, 6, 80, 8 and 36 tokens."""
LONGEST = 80


def write_mixed(demo: Path, folder: Path, num_samples: int = 12) -> Path:
    """A store of random latents and captions in `folder`; returns a feature_data.json that names it."""
    store, recipe = folder / "mixed", load_recipe(demo / "features")
    text_dim = json.loads((demo / "configs" / "pretrain_model.json").read_text())["predictor"]["text_dim"]
    (store / "features").mkdir(parents=True)
    save_recipe(store, recipe)
    rows = []
    for number in range(num_samples):
        sample, latents, random = f"{number}.mp4", LATENTS[number % len(LATENTS)], torch.Generator().manual_seed(number)
        prompt = torch.randn(1 + number % 7, text_dim, generator=random)
        written = Feature(torch.randn(16, *latents, generator=random), prompt, start_frame=0)
        file = f"features/{feature_name(sample)}"
        write_feature(store / file, written, Origin(sample, recipe.key, text_hash("x"), "v"), recipe.max_text_tokens)
        frames, height, width = 4 * latents[0] - 3, 8 * latents[1], 8 * latents[2]
        rows.append(
            FeatureRow(
                sample=sample, file=file, path=sample, cap="x", start_frame_idx=0, sample_num_frames=frames,
                sample_size=f"{frames}x{height}x{width}", latent_shape=(16, *latents), text_tokens=len(prompt),
            )
        )  # fmt: skip
    empty = Feature(None, torch.full((1, text_dim), 0.5))
    origin = Origin(EMPTY_PROMPT_ID, recipe.key, text_hash(""), "")
    write_feature(store / "features" / "empty_prompt.safetensors", empty, origin, recipe.max_text_tokens)
    write_listing(store, rows)
    content = json.loads((demo / "configs" / "feature_data.json").read_text())
    content["dataset_param"]["basic_parameters"] |= {"data_path": str(store / "data.jsonl"), "data_folder": str(store)}
    (folder / "feature_data.json").write_text(json.dumps(content))
    return folder / "feature_data.json"
