"""Wan's encoders: what they are called, which names of tensors are theirs, and their published sizes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from mm.wan.name_pairs import Pair
from mm.wan.names_clip import clip_pairs
from mm.wan.names_t5 import t5_pairs
from mm.wan.names_vae import vae_22_pairs, vae_pairs
from mm.wan.prefixes import common_prefix, unwrapped
from mm.wan.shards import DIFFUSERS_FILE

TRANSFORMERS_FILE = "model.safetensors"


@dataclass(frozen=True)
class Encoder:
    """Facts about one of the encoders.

    Attributes:
        name: for messages. file: of its weights in the original release, without a suffix.
        hf_file: of its weights in a folder.
        mark, hf_mark: names that it alone has, in the original and elsewhere; the group counts layers.
        pairs: its tensors, by the number of layers.
        build: a model on the meta device and the text of its config.json, from a config.json's content or, for None, of
            the published size.
    """

    name: str
    file: str
    hf_file: str
    mark: str
    hf_mark: str
    pairs: Callable[[int], list[Pair]]
    build: Callable[[Mapping[str, Any] | None], tuple[nn.Module, str]]


class EncoderNames(NamedTuple):
    """Encoder that some names are of, whether they are those of the original, and the number of its layers."""

    encoder: Encoder
    original: bool
    num_layers: int


def encoder_of(names: Iterable[str]) -> EncoderNames | None:
    """The encoder that has tensors of these names, or None."""
    listed = list(names)
    prefix = common_prefix(listed)  # DiffSynth's `model.`, of the VAE
    bare = [unwrapped(name.removeprefix(prefix)) for name in listed]
    for encoder in ENCODERS:
        for original, mark in ((True, encoder.mark), (False, encoder.hf_mark)):
            layers = {int(match[1] or 0) for name in bare if (match := re.fullmatch(mark, name))}
            if layers:
                return EncoderNames(encoder, original, max(layers) + 1)
    return None


def _numbers(*lines: str) -> list[float]:
    return [float(word) for line in lines for word in line.split()]


def _build_vae(published: Mapping[str, Any], values: Mapping[str, Any] | None) -> tuple[nn.Module, str]:
    from diffusers import AutoencoderKLWan  # only where an encoder is converted: it takes seconds to import

    model = AutoencoderKLWan(**published) if values is None else AutoencoderKLWan.from_config(dict(values))
    return model, model.to_json_string()


def _build_t5(values: Mapping[str, Any] | None) -> tuple[nn.Module, str]:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(**_T5) if values is None else UMT5Config.from_dict(dict(values))
    config.architectures = ["UMT5EncoderModel"]
    return UMT5EncoderModel(config), config.to_json_string(use_diff=False)


def _build_clip(values: Mapping[str, Any] | None) -> tuple[nn.Module, str]:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(**_CLIP) if values is None else CLIPVisionConfig.from_dict(dict(values))
    config.architectures = ["CLIPVisionModelWithProjection"]
    return CLIPVisionModelWithProjection(config), config.to_json_string(use_diff=False)


_VAE: dict[str, Any] = {}
"""What diffusers' class has by itself."""
_VAE_22: dict[str, Any] = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": _numbers(
        "-.2289 -.0052 -.1323 -.2339 -.2799 .0174 .1838 .1557 -.1382 .0542 .2813 .0891 .1570 -.0098 .0375 -.1825",
        "-.2246 -.1207 -.0698 .5109 .2665 -.2108 -.2158 .2502 -.2055 -.0322 .1109 .1567 -.0729 .0899 -.2799 -.1230",
        "-.0313 -.1649 .0117 .0723 -.2839 -.2083 -.0520 .3748 .0152 .1957 .1433 -.2944 .3573 -.0548 -.1681 -.0667",
    ),
    "latents_std": _numbers(
        ".4765 1.0364 .4514 1.1677 .5313 .4990 .4818 .5013 .8158 1.0344 .5894 1.0901 .6885 .6165 .8454 .4978",
        ".5759 .3523 .7135 .6804 .5833 1.4146 .8986 .5659 .7069 .5338 .4889 .4917 .4069 .4999 .6866 .4093",
        ".5709 .6065 .6415 .4944 .5726 1.2042 .5458 1.6887 .3971 1.0600 .3943 .5537 .5444 .4089 .7468 .7744",
    ),
}
"""Of Wan2.2's TI2V-5B (wan/modules/vae2_2.py)."""
_T5: dict[str, Any] = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
"""UMT5-XXL (google/umt5-xxl), with the vocabulary of Wan's file."""
_CLIP: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
    "projection_dim": 1024,
    "hidden_act": "gelu",
}
"""The visual half of laion/CLIP-ViT-H-14-laion2B-s32B-b79K."""

VAE = Encoder(
    "the video VAE",
    "Wan2.1_VAE",
    DIFFUSERS_FILE,
    r"decoder\.upsamples\.(0)\.residual\.0\.gamma",
    r"decoder\.up_blocks\.(0)\.upsamplers\.0\.resample\.1\.weight",
    lambda _: vae_pairs(),
    partial(_build_vae, _VAE),
)
VAE_22 = Encoder(
    "the video VAE of Wan2.2",
    "Wan2.2_VAE",
    DIFFUSERS_FILE,
    r"decoder\.upsamples\.(0)\.upsamples\.0\.residual\.0\.gamma",
    r"decoder\.up_blocks\.(0)\.upsampler\.resample\.1\.weight",
    lambda _: vae_22_pairs(),
    partial(_build_vae, _VAE_22),
)
T5 = Encoder(
    "the text encoder UMT5",
    "models_t5_umt5-xxl-enc-bf16",
    TRANSFORMERS_FILE,
    r"blocks\.(\d+)\.ffn\.gate\.0\.weight",
    r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.q\.weight",
    t5_pairs,
    _build_t5,
)
CLIP = Encoder(
    "the image encoder CLIP",
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14",
    TRANSFORMERS_FILE,
    r"visual\.transformer\.(\d+)\.attn\.to_qkv\.weight",
    r"(?:vision_model\.)?encoder\.layers\.(\d+)\.self_attn\.q_proj\.weight",
    clip_pairs,
    _build_clip,
)
ENCODERS = (VAE, VAE_22, T5, CLIP)
