"""The script that made the VAE asset runs, and its two short cuts change no number."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file

from mm.demo import components

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo_vae", ROOT / "tools" / "train_demo_vae.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture()
def vae(recipe: ModuleType) -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(**recipe.MODELS[8])


@torch.no_grad()
def reconstruct(vae: AutoencoderKLWan, x: torch.Tensor) -> torch.Tensor:
    return vae.decode(vae.encode(x).latent_dist.mode()).sample


def test_newest_tap_gives_the_numbers_of_the_causal_convolution(recipe: ModuleType, vae: AutoencoderKLWan):
    x = recipe.pictures(0, 2)
    whole = reconstruct(vae, x)
    with recipe.newest_tap_only():
        short = reconstruct(vae, x)
    assert torch.equal(reconstruct(vae, x), whole)  # and the class is as before
    assert (short - whole).abs().max() < 1e-5


def test_second_stage_starts_as_a_vae_that_repeats_the_last_frame_of_every_chunk(
    recipe: ModuleType, vae: AutoencoderKLWan
):
    recipe.start_as_picture_vae(vae)
    clip = recipe.clips(0, 1)
    decoded = reconstruct(vae, clip)
    for shown, frames in [(0, [0]), (4, [1, 2, 3, 4]), (8, [5, 6, 7, 8])]:
        picture = reconstruct(vae, clip[:, :, shown : shown + 1])
        for frame in frames:
            assert (decoded[:, :, frame] - picture[:, :, 0]).abs().max() < 1e-5


@pytest.mark.parametrize(("stride", "name", "channels"), [(8, "tiny_vae", 16), (16, "tiny_vae_16", 48)])
def test_recipe_writes_an_asset_with_the_tensors_of_the_shipped_one(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stride: int, name: str, channels: int
):
    words = ["--out", str(tmp_path), "--picture-steps", "2", "--clip-steps", "1", "--stride", str(stride)]
    monkeypatch.setattr(sys, "argv", ["x", *words])
    monkeypatch.setattr(recipe, "CLIPS_TO_MEASURE", 1)
    recipe.main()
    made, shipped = (load_file(folder / f"{name}.safetensors") for folder in (tmp_path, ASSETS))
    assert {n: (t.shape, t.dtype) for n, t in made.items()} == {n: (t.shape, t.dtype) for n, t in shipped.items()}
    configs = [json.loads((folder / f"{name}.json").read_text()) for folder in (tmp_path, ASSETS)]
    assert [set(c) for c in configs] == [set(configs[0])] * 2
    assert len(configs[0]["latents_mean"]) == len(configs[0]["latents_std"]) == channels
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{name}.json", f"{name}.safetensors"]


ASSETS = Path(components.__file__).parent / "assets"
