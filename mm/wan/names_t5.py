"""Names of Wan2.1's text encoder: the original (models_t5_umt5-xxl-enc-bf16.pth) and transformers' UMT5EncoderModel.

Source: the published weights of both.
"""

from __future__ import annotations

from mm.wan.name_pairs import Pair, same

_WEIGHT = ("weight",)
EMBEDDING, TIED_EMBEDDING = "shared.weight", "encoder.embed_tokens.weight"
"""One tensor, which files of transformers hold under the first name, the second or both."""
BLOCK = (
    *((f"attn.{name}", f"layer.0.SelfAttention.{name}") for name in "qkvo"),
    ("pos_embedding.embedding", "layer.0.SelfAttention.relative_attention_bias"),
    ("norm1", "layer.0.layer_norm"),
    ("ffn.gate.0", "layer.1.DenseReluDense.wi_0"),
    ("ffn.fc1", "layer.1.DenseReluDense.wi_1"),
    ("ffn.fc2", "layer.1.DenseReluDense.wo"),
    ("norm2", "layer.1.layer_norm"),
)
"""Modules inside a block, after `blocks.N.` and `encoder.block.N.`; each has a weight alone."""


def t5_pairs(num_layers: int) -> list[Pair]:
    """All tensors of an encoder of so many blocks, ten each and two."""
    pairs = [Pair("token_embedding.weight", (EMBEDDING,))]
    for index in range(num_layers):
        for native, hf in BLOCK:
            pairs += same(f"blocks.{index}.{native}", f"encoder.block.{index}.{hf}", _WEIGHT)
    return [*pairs, *same("norm", "encoder.final_layer_norm", _WEIGHT)]
