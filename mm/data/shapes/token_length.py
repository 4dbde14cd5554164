"""VideoX-Fun's training by token length: the larger the side, the fewer the frames.

The number of frames is that of its guide: as many as have the pixels of `num_frames` at `token_side`, rounded down to
4k + 1; 49, 21 and 9 at 512, 768 and 1024. Its code rounds otherwise: 13 at 1024, which is more than there may be.
"""

from __future__ import annotations

from fractions import Fraction

import torch

from mm.config.run.shapes import TokenLength
from mm.data.shapes.frames import whole_latents
from mm.data.shapes.ratio_buckets import bucket_shape, full_weights, image_sides
from mm.data.shapes.shape import Shape, Size, draw

STEP = 128
_MOST_GROWTH = 1.25  # a clip is made that much larger than its file has it, and no more


def token_length_shape(
    rule: TokenLength, source: Size, num_frames: int, *, is_image: bool, chance: torch.Generator
) -> Shape:
    """The shape by token length; its arguments are those of `ratio_buckets_shape`."""
    if is_image:
        sides = image_sides(rule.max_side, rule.min_side)
        side = sides[draw(chance, full_weights(rule.full_share, len(sides)))]
        return bucket_shape(source, side, 1, random_ratio=rule.random_ratio, chance=chance)
    video_side = _video_side(rule, source, chance)
    frames = frames_at(rule, video_side, num_frames)
    return bucket_shape(source, Fraction(video_side), frames, random_ratio=rule.random_ratio, chance=chance)


def frames_at(rule: TokenLength, side: int, num_frames: int) -> int:
    """The frames of a clip at a side, 4k + 1."""
    return whole_latents(min(num_frames, num_frames * rule.token_side**2 // side**2))


def video_sides(rule: TokenLength) -> list[int]:
    """The sides that are drawn from, ascending."""
    return sorted({*range(rule.min_side, rule.max_side + 1, STEP), rule.max_side})


def _video_side(rule: TokenLength, source: Size, chance: torch.Generator) -> int:
    sides = _that_fit(rule, source)
    weights = [1.0] * len(sides)
    if rule.token_side_share is not None and len(sides) > 1:
        nearest = min(range(len(sides)), key=lambda index: abs(sides[index] - rule.token_side))
        weights = [(1 - rule.token_side_share) / (len(sides) - 1)] * len(sides)
        weights[nearest] = rule.token_side_share
    return sides[draw(chance, weights)]


def _that_fit(rule: TokenLength, source: Size) -> list[int]:
    """Sides that the source need not be enlarged much for; the smallest where it is smaller than all."""
    shrunk = min(1.0, rule.max_side / min(source))
    own = shrunk * (source[0] + source[1]) / 2
    sides = video_sides(rule)
    return [side for side in sides if side < _MOST_GROWTH * own] or sides[:1]
