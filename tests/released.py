"""Tiny models in the files and names of the released ones, `owner/name/...`, with random weights."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from mm.checkpoint.encoder_kinds import CLIP, T5, VAE, Encoder
from mm.checkpoint.encoders import encoder_to_native, open_encoder
from mm.checkpoint.identify import identify
from mm.config.model import WanConfig
from mm.config.tasks.registry import TASKS
from mm.config.tasks.task import Sizes, Source
from mm.demo.components import TEXT_DIM, make_text_encoder, make_tokenizer
from mm.wan.config_json import wan_config_to_original
from mm.wan.model import WanModel

COMMON, COMMON_OF_IMAGES = "Wan-AI/Wan2.1-T2V-1.3B", "Wan-AI/Wan2.1-I2V-14B-480P"
TRANSFORMER = "diffusion_pytorch_model.safetensors"
CLIP_WIDTH, CLIP_TOKENS = 80, 257
_HIDDEN = 32


def released_config(task: str, num_layers: int = 2) -> WanConfig:
    """Shape of the tiny transformer of a task."""
    declared = TASKS[task]
    seen = bool(declared.made_by(Source.IMAGE_ENCODER))
    images = {"img_dim": CLIP_WIDTH, "clip_token_len": CLIP_TOKENS} if seen else {}
    side = {"vace_layers": (0, 1)} if "vace_layers" in declared.sizes else {}
    channels = declared.channels(Sizes(16, (1, 1, 1), CLIP_WIDTH if seen else 0, CLIP_TOKENS if seen else 0))
    return WanConfig(
        model_type=task, text_dim=TEXT_DIM, in_dim=16 + channels, hidden_size=_HIDDEN, ffn_dim=64, num_heads=2,
        num_layers=num_layers, freq_dim=32, **images, **side,
    )  # fmt: skip


def write_release(folder: Path, model_id: str, task: str, *, shards: int = 1, num_layers: int = 2) -> Path:
    """A transformer in native names with its config.json, in as many files.

    Returns:
        The model's folder.
    """
    wan, home = released_config(task, num_layers), folder / model_id
    home.mkdir(parents=True, exist_ok=True)
    source = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(parameter.shape, generator=source) * (0.2 if parameter.dim() > 1 else 0.05)
        for name, parameter in WanModel(wan).named_parameters()
    }
    names = list(weights)
    for index in range(shards):
        file = TRANSFORMER if shards == 1 else f"diffusion_pytorch_model-{index + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: weights[name].contiguous() for name in names[index::shards]}, home / file)
    (home / "config.json").write_text(json.dumps(wan_config_to_original(wan)))
    return home


def write_encoders(folder: Path) -> None:
    """Small encoders of shapes that are known, `t5`, `vae` and `clip` in the layouts of transformers and diffusers."""
    torch.manual_seed(0)
    make_text_encoder(len(make_tokenizer())).save_pretrained(folder / "t5")
    AutoencoderKLWan(base_dim=4).save_pretrained(folder / "vae")
    clip_config = CLIPVisionConfig(
        hidden_size=CLIP_WIDTH, intermediate_size=64, num_hidden_layers=3, num_attention_heads=1, patch_size=14,
        image_size=224, projection_dim=8, hidden_act="gelu",
    )  # fmt: skip
    CLIPVisionModelWithProjection(clip_config).save_pretrained(folder / "clip")


def write_common_files(folder: Path, encoders: Path | None = None) -> None:
    """The files that releases share: UMT5 and its tokenizer, the VAE, and CLIP, made of folders of `write_encoders`."""
    common, images = folder / COMMON, folder / COMMON_OF_IMAGES
    common.mkdir(parents=True, exist_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    make_tokenizer().save_pretrained(common / "google" / "umt5-xxl")
    scratch = folder / ".scratch"
    if encoders is None:
        write_encoders(scratch)
    for part, encoder, home in (("t5", T5, common), ("vae", VAE, common), ("clip", CLIP, images)):
        _as_torch_file((encoders or scratch) / part, encoder, home)
    if encoders is None:
        shutil.rmtree(scratch)


def _as_torch_file(folder: Path, encoder: Encoder, home: Path) -> None:
    """An encoder as the release has it: a file of torch.save in native names."""
    source = open_encoder(identify(folder))
    assert source is not None
    encoder_to_native(source, folder / "native")
    torch.save(load_file(folder / "native" / f"{encoder.file}.safetensors"), home / f"{encoder.file}.pth")
