"""Floating-point operations of one training step, for TFLOP/s and MFU."""

from __future__ import annotations

from mm.config.model import WanConfig


def train_flops(config: WanConfig, tokens: int, *, trained_share: float = 1.0) -> int:
    """Model FLOPs of forward and backward of one sample, without any recomputation: three forwards.

    A multiply-add counts as two. In a forward, for each block, with s video tokens, C text and image tokens, width D
    and feed-forward width f: linear layers on video tokens s(12 D^2 + 4 D f) (self attention q,k,v,o 8 D^2, cross
    attention q,o 4 D^2, feed-forward 4 D f), cross attention's k,v of text and images 4 D^2 C, self attention 4 s^2 D,
    cross attention 4 s C D. A side block has these too, and the linear of its hint 2 s D^2; the first one has another
    such linear. Embedders, head and elementwise work are left out; on the published models they are below
    0.1%.

    Frozen linears have no gradient of their weights: they count two forwards, attention three. Adapters are left out:
    of rank r they add about r (D + f) / (D f) of a linear. Where all that is trained lies behind a block, its backward
    is counted although there is none.

    Args:
        config: the model's shape.
        tokens: s, tokens of one sample after patching, those in front of the video's too.
        trained_share: share of the linears' weights that are trained, about.
    """
    linears = _linear_flops(config, tokens)
    return 2 * linears + round(trained_share * linears) + 3 * _attention_flops(config, tokens)


def _linear_flops(config: WanConfig, tokens: int) -> int:
    d, f, c = config.hidden_size, config.ffn_dim, config.text_len + config.image_tokens
    projections = len(config.side_blocks) + 1 if config.side_blocks else 0
    return _blocks(config) * (tokens * (12 * d * d + 4 * d * f) + 4 * d * d * c) + projections * 2 * tokens * d * d


def _attention_flops(config: WanConfig, tokens: int) -> int:
    d, c = config.hidden_size, config.text_len + config.image_tokens
    return _blocks(config) * (4 * tokens * tokens * d + 4 * tokens * c * d)


def _blocks(config: WanConfig) -> int:
    return config.num_layers + len(config.side_blocks)
