"""Floating-point operations of one training step, for TFLOP/s and MFU."""

from __future__ import annotations

from mm.config.model import WanConfig


def forward_flops(config: WanConfig, tokens: int) -> int:
    """Operations of one forward of one sample, a multiply-add counted as two.

    For each block, with s video tokens, C text and image tokens, width D and feed-forward width f: linear layers on
    video tokens s(12 D^2 + 4 D f) (self attention q,k,v,o 8 D^2, cross attention q,o 4 D^2, feed-forward 4 D f), cross
    attention's k,v of text and images 4 D^2 C, self attention 4 s^2 D, cross attention 4 s C D. Embedders, head and
    elementwise work are left out; on the published models they are below 0.1%.

    Args:
        config: the model's shape.
        tokens: s, tokens of one sample after patching.
    """
    d, f, c = config.hidden_size, config.ffn_dim, config.text_len + config.image_tokens
    linear = tokens * (12 * d * d + 4 * d * f) + 4 * d * d * c
    attention = 4 * tokens * tokens * d + 4 * tokens * c * d
    return config.num_layers * (linear + attention)


def train_flops(config: WanConfig, tokens: int) -> int:
    """Model FLOPs of forward and backward of one sample: three forwards, without any recomputation."""
    return 3 * forward_flops(config, tokens)
