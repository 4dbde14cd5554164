"""Names of Wan2.1's image encoder: the visual half of the original, and transformers' CLIPVisionModelWithProjection.

The original (models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth) also has a text tower and a temperature, which no
Wan model uses. It has q, k and v in one matrix, the head transposed, and axes of one around the embeddings. Source: the
published weights of both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm.wan.name_pairs import Pair, same

PREFIX = "vision_model."
"""In front of all names but the head's; newer transformers leaves it out of models without a head."""
UNUSED = ("textual.", "log_scale")
"""What names of the original that are no part of the image encoder begin with."""


_OF_A_LAYER = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}


def clip_pairs(num_layers: int) -> list[Pair]:
    """All tensors of an encoder of so many layers, twelve each (sixteen in transformers) and eight."""
    embeddings = f"{PREFIX}embeddings"
    pairs = [
        *same("visual.patch_embedding", f"{embeddings}.patch_embedding", ("weight",)),
        Pair("visual.cls_embedding", (f"{embeddings}.class_embedding",), _flat, _as_token),
        Pair("visual.pos_embedding", (f"{embeddings}.position_embedding.weight",), _without_batch, _with_batch),
        *same("visual.pre_norm", f"{PREFIX}pre_layrnorm"),
        *same("visual.post_norm", f"{PREFIX}post_layernorm"),
        Pair("visual.head", ("visual_projection.weight",), _transposed, _transposed_back),
    ]
    for index in range(num_layers):
        native, hf = f"visual.transformer.{index}", f"{PREFIX}encoder.layers.{index}"
        for kind in ("weight", "bias"):
            names = tuple(f"{hf}.self_attn.{name}_proj.{kind}" for name in "qkv")
            pairs.append(Pair(f"{native}.attn.to_qkv.{kind}", names, _thirds, torch.cat))
        pairs += [pair for ours, theirs in _OF_A_LAYER.items() for pair in same(f"{native}.{ours}", f"{hf}.{theirs}")]
    return pairs


def _thirds(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.chunk(3)


def _flat(tensor: Tensor) -> tuple[Tensor, ...]:
    return (tensor.flatten(),)


def _as_token(tensors: tuple[Tensor, ...]) -> Tensor:
    return tensors[0].view(1, 1, -1)


def _without_batch(tensor: Tensor) -> tuple[Tensor, ...]:
    return (tensor.squeeze(0),)


def _with_batch(tensors: tuple[Tensor, ...]) -> Tensor:
    return tensors[0].unsqueeze(0)


def _transposed(tensor: Tensor) -> tuple[Tensor, ...]:
    return (tensor.t(),)


def _transposed_back(tensors: tuple[Tensor, ...]) -> Tensor:
    return tensors[0].t()
