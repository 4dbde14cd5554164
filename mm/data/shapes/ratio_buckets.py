"""VideoX-Fun's buckets: 40 ratios of height to width, each with the size that it has at a square of 512.

Source: `videox_fun/data/bucket_sampler.py` and the collate functions of its trainers.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch

from mm.config.data import SIZE_MULTIPLE
from mm.config.run.shapes import RatioBuckets
from mm.data.shapes.shape import Shape, Size, centred, draw

BASE = 512
_NOT_HIGHER = (
    *((256, width) for width in (1024, 992, 960, 928)),
    *((288, 896), (288, 864), (288, 832), (320, 800), (320, 768), (352, 736), (352, 704), (352, 672), (384, 672)),
    *((384, 640), (416, 608), (416, 576), (448, 576), (448, 544), (480, 544), (480, 512), (512, 512)),
)
_LACKING = 672, 352  # the one size whose transpose alone is in the table
BUCKETS: dict[float, Size] = {
    round(height / width, 2): (height, width)
    for height, width in (*_NOT_HIGHER, *((width, height) for height, width in reversed(_NOT_HIGHER[:-1])))
    if (height, width) != _LACKING
}
"""Sizes at `BASE`, by ratio."""
RANDOM_RATIOS = (0.42, 0.5, 0.57, 0.68, 0.78, 0.88, 0.94, 1.0, 1.07, 1.13, 1.29, 1.46, 1.75, 2.0, 2.4)
RANDOM_RATIO_WEIGHTS = (1, 2, 4, 4, 4, 4, 8, 8, 8, 4, 4, 4, 4, 2, 1)
_DOWNSAMPLING = ((1536, "1 1.25 1.5 2 2.5 3"), (1024, "1 1.25 1.5 2"), (768, "1 1.25 1.5"), (0, "1"))
_LARGE = 512  # sides of images below it are not made as small as those of videos


def ratio_buckets_shape(
    rule: RatioBuckets, source: Size, num_frames: int, *, is_image: bool, chance: torch.Generator
) -> Shape:
    """The shape by buckets.

    Args:
        rule: the rule. source: of the picture.
        num_frames: the most of a video. is_image: whether it is a clip of one frame.
        chance: of this sample.
    """
    sides = sides_of(rule, is_image=is_image)
    side = sides[draw(chance, full_weights(rule.full_share, len(sides)))] if rule.vary_side else sides[0]
    return bucket_shape(source, side, 1 if is_image else num_frames, random_ratio=rule.random_ratio, chance=chance)


def sides_of(rule: RatioBuckets, *, is_image: bool) -> list[Fraction]:
    """The sides that a video or an image may get, the whole one first."""
    image_side = rule.image_side or rule.side
    if not rule.vary_side:
        return [Fraction(image_side if is_image else rule.side)]
    return image_sides(image_side, rule.side) if is_image else smaller_sides(rule.side)


def smaller_sides(side: int) -> list[Fraction]:
    """Sides that one is varied to, itself first."""
    ratios = next(ratios for least, ratios in _DOWNSAMPLING if side >= least)
    return [side / Fraction(ratio) for ratio in ratios.split()]


def image_sides(side: int, video_side: int) -> list[Fraction]:
    """Sides that an image's is varied to, the videos' among them."""
    sides = smaller_sides(side)
    if side >= _LARGE and video_side < side and video_side not in sides:
        sides.append(Fraction(video_side))
    return sides


def full_weights(full_share: float, number: int) -> list[float]:
    """Weights of the whole side and of the others, which are alike."""
    return [full_share, *[(1 - full_share) / (number - 1)] * (number - 1)] if number > 1 else [1.0]


def bucket_shape(
    source: Size, side: Fraction, num_frames: int, *, random_ratio: bool, chance: torch.Generator
) -> Shape:
    """The shape by the nearest ratio, or a drawn one, at a side."""
    ratio = RANDOM_RATIOS[draw(chance, RANDOM_RATIO_WEIGHTS)] if random_ratio else closest_ratio(source)
    target = bucket_size(ratio, side)
    return centred(num_frames, target, _cover_rounded_down(source, target))


def closest_ratio(source: Size) -> float:
    """Ratio of the bucket nearest to the picture's height by width, the smaller of two."""
    own = source[0] / source[1]
    return min(BUCKETS, key=lambda ratio: abs(ratio - own))


def bucket_size(ratio: float, side: Fraction) -> Size:
    """Size of a bucket for squares of `side`, rounded down to whole tokens."""
    height, width = BUCKETS[ratio]
    return _tokens(height * side / BASE), _tokens(width * side / BASE)


def most_pixels(sides: Sequence[Fraction]) -> int:
    """Pixels of the largest bucket."""
    sizes = [bucket_size(ratio, side) for ratio in BUCKETS for side in sides]
    return max(height * width for height, width in sizes)


def _tokens(pixels: Fraction) -> int:
    return int(pixels // SIZE_MULTIPLE) * SIZE_MULTIPLE


def _cover_rounded_down(source: Size, target: Size) -> Size:
    height, width = source
    if height * target[1] > target[0] * width:
        return height * target[1] // width, target[1]
    return target[0], width * target[0] // height
