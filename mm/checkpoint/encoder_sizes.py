"""Configuration of an encoder of the original release, as far as its tensors' shapes say it; the rest is published."""

from __future__ import annotations

import math
from typing import Any

from mm.checkpoint.encoder_kinds import CLIP, T5, VAE
from mm.checkpoint.encoders import EncoderSource
from mm.errors import CheckpointError

_CLIP_HEAD = 80
"""Width of a head of ViT-H/14, which no shape shows."""
_VAE_STAGES = ("0", "3", "6", "9")
"""Layers of the encoder by whose width a stage is known, one of each."""


def sizes_of(source: EncoderSource) -> dict[str, Any]:
    """Fields of config.json that the tensors of an original file tell.

    Raises:
        CheckpointError: CKPT-023 for sizes that do not belong together, CKPT-011 for a tensor that is not there.
    """
    found = {VAE.name: _of_vae, T5.name: _of_t5, CLIP.name: _of_clip}.get(source.encoder.name)
    if found is None:
        return {}
    try:
        return found(source)
    except KeyError as error:
        message = f"{source.path} ({source.encoder.name}) lacks {error.args[0]}."
        raise CheckpointError("CKPT-011", message, "Use the whole file of the release.") from None


def _of_vae(source: EncoderSource) -> dict[str, Any]:
    base = _shape(source, "encoder.conv1.weight")[0]
    widths = [_shape(source, f"encoder.downsamples.{stage}.residual.2.weight")[0] for stage in _VAE_STAGES]
    channels = _shape(source, "conv2.weight")[0]
    if channels != 16 or any(width % base for width in widths):
        raise _odd(source, f"{channels} latent channels and widths {widths} of {base}")
    return {"base_dim": base, "z_dim": channels, "dim_mult": [width // base for width in widths]}


def _of_t5(source: EncoderSource) -> dict[str, Any]:
    vocabulary, width = _shape(source, "token_embedding.weight")
    buckets, heads = _shape(source, "blocks.0.pos_embedding.embedding.weight")
    inner = _shape(source, "blocks.0.attn.q.weight")[0]
    if inner % heads:
        raise _odd(source, f"attention of width {inner} with {heads} heads")
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": inner // heads,
        "d_ff": _shape(source, "blocks.0.ffn.gate.0.weight")[0],
        "num_layers": source.num_layers,
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


def _of_clip(source: EncoderSource) -> dict[str, Any]:
    width, _, patch, _ = _shape(source, "visual.patch_embedding.weight")
    side = math.isqrt(_shape(source, "visual.pos_embedding")[1] - 1)
    if width % _CLIP_HEAD:
        raise _odd(source, f"a width of {width}, which is no multiple of a head's {_CLIP_HEAD}")
    return {
        "hidden_size": width,
        "intermediate_size": _shape(source, "visual.transformer.0.mlp.0.weight")[0],
        "num_hidden_layers": source.num_layers,
        "num_attention_heads": width // _CLIP_HEAD,
        "patch_size": patch,
        "image_size": side * patch,
        "projection_dim": _shape(source, "visual.head")[1],
    }


def _shape(source: EncoderSource, name: str) -> tuple[int, ...]:
    return source.kinds[name].shape


def _odd(source: EncoderSource, what: str) -> CheckpointError:
    message = f"{source.path} is {source.encoder.name} of {what}, and no published one is."
    return CheckpointError("CKPT-023", message, "Use the encoder in the layout of diffusers, with its config.json.")
