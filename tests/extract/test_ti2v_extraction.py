"""Extraction of Wan2.2's TI2V: latents of its own VAE, 48 channels of 16 x 16 pixels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKLWan
from feature_samples import write_clip
from PIL import Image
from store_content import listed, stored
from test_family_extraction import pixels as frames_of

import mm
from mm.cli import run as run_command
from mm.data.recipe import load_recipe
from mm.data.transforms import resize_and_crop
from mm.demo.components import load_vae
from mm.errors import ConfigError, DataError

HEIGHT, WIDTH = 32, 64


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    load_vae(16).save_pretrained(folder)
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Two videos of 48 x 64 and an image."""
    for name, frames in {"a": 14, "b": 17}.items():
        write_clip(tmp_path / f"set/{name}.mp4", num_frames=frames)
    colours = np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8)
    Image.fromarray(colours).save(tmp_path / "set/look.png")
    return tmp_path


def extract(home: Path, weights: Path, vae: Path, task: str = "ti2v", **changed: Any) -> Path:
    """Run an extraction with changes of its clip, or of its rows; returns the store."""
    rows = changed.pop("rows", [{"path": f"{name}.mp4", "cap": name} for name in "ab"])
    store = home / str(changed.pop("store", "store"))
    (home / "rows.json").write_text(json.dumps(rows))
    values = {
        "extraction": {"task": task, "seed": 3, "device": "cpu"},
        "data": {
            "path": str(home / "rows.json"),
            "folder": str(home / "set"),
            "clip": {"num_frames": 9, "height": HEIGHT, "width": WIDTH, **changed},
            "workers": 1,
        },
        "encoders": {
            "vae": {"from_pretrained": str(vae), "precision": "fp32"},
            "text": {"from_pretrained": str(weights / "text_encoder"), "precision": "fp32"},
            "tokenizer": {"from_pretrained": str(weights / "tokenizer")},
        },
        "output": {"path": str(store)},
    }
    (home / "run.yaml").write_text(yaml.safe_dump(values))
    run_command.main([str(home / "run.yaml")])
    return store


def test_latents_are_those_of_diffusers(home: Path, weights: Path, vae_folder: Path) -> None:
    """Normalised by the VAE's own 48 means and deviations; a caption and latents are all that a sample has.

    The first latent frame is that of the first frame alone, which is what generation makes of an image.
    """
    store = extract(home, weights, vae_folder)
    vae = AutoencoderKLWan.from_pretrained(vae_folder).eval()
    mean, std = (torch.tensor(vae.config[name]).view(1, 48, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    rows, tensors = listed(store), stored(store)
    assert {row["cap"] for row in rows} == {"a", "b"} and {row["task"] for row in rows} == {"ti2v"}
    for row in rows:
        found = tensors[row["sample"]]
        assert found.keys() == {"latents", "prompt", "prompt_mask"}
        assert (row["latent_shape"], row["sample_size"]) == ([48, 3, 2, 4], "9x32x64")
        clip = frames_of(home / "set" / row["path"], row["start_frame_idx"], (HEIGHT, WIDTH))[None]
        with torch.no_grad():
            expected, first = ((vae.encode(part).latent_dist.mode() - mean) / std for part in (clip, clip[:, :, :1]))
        torch.testing.assert_close(found["latents"], expected[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(found["latents"][:, :1], first[0], rtol=0, atol=1e-5)
    assert any(row["start_frame_idx"] for row in rows), "a clip that begins at 0 proves nothing of its frames"
    assert load_recipe(store).task == "ti2v"


def test_an_image_is_one_latent_frame(home: Path, weights: Path, vae_folder: Path) -> None:
    store = extract(home, weights, vae_folder, rows=[{"path": "look.png", "cap": "look"}], num_frames=1)
    [found] = stored(store).values()
    picture = torch.from_numpy(np.array(Image.open(home / "set/look.png"))).permute(2, 0, 1)[None]
    vae = AutoencoderKLWan.from_pretrained(vae_folder).eval()
    with torch.no_grad():
        mode = vae.encode(resize_and_crop(picture, HEIGHT, WIDTH).transpose(0, 1)[None]).latent_dist.mode()
    mean, std = (torch.tensor(vae.config[name]).view(1, 48, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    torch.testing.assert_close(found["latents"], ((mode - mean) / std)[0], rtol=0, atol=1e-5)
    assert found["latents"].shape == (48, 1, 2, 4)


def test_max_pixels_gives_multiples_of_32(home: Path, weights: Path, vae_folder: Path) -> None:
    """48 x 64 becomes 39 x 52 for 2048 pixels, of which 32 x 32 are whole tokens."""
    rule = {"rule": "max_pixels", "max_pixels": 2048, "multiple": 32}
    store = extract(home, weights, vae_folder, height=None, width=None, shape=rule)
    assert {tuple(row["latent_shape"]) for row in listed(store)} == {(48, 3, 2, 2)}
    with pytest.raises(ConfigError, match=r"CFG-211.*multiple is 16, not a multiple of 32"):
        extract(home, weights, vae_folder, height=None, width=None, shape={**rule, "multiple": 16})


def test_what_does_not_fit_is_named(home: Path, weights: Path, vae_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"CFG-051.*height is 48, not a multiple of 32\..*Use 32 or 64"):
        extract(home, weights, vae_folder, height=48)
    with pytest.raises(ConfigError, match=r"CFG-292.*take multiples of 32"):
        extract(home, weights, vae_folder, height=None, width=None, shape={"rule": "ratio_buckets", "side": 64})
    with pytest.raises(DataError, match=r"DATA-260.*8x8 pixels, Wan2.2 TI2V models for 16x16"):
        extract(home, weights, weights / "vae")
    with pytest.raises(DataError, match=r"DATA-260.*16x16 pixels, T2V models for 8x8"):
        extract(home, weights, vae_folder, task="t2v", store="other")
    with pytest.raises(DataError, match=r"DATA-260.*8x8 pixels, Wan2.2 TI2V models for 16x16"):
        mm.extract_features([(home / "set/a.mp4", "a")], weights, task="ti2v", size=(9, HEIGHT, WIDTH), device="cpu")
    given = [{"path": "a.mp4", "cap": "a", "first_frame": "look.png"}]
    with pytest.raises(DataError, match=r"DATA-250.*row 1 names files.*the clip's own first frame"):
        extract(home, weights, vae_folder, rows=given, store="given")
