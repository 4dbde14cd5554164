"""SimpleTuner's sizes: one edge or area, the picture's aspect or one that is cropped to, aligned sides.

Source: `MultiaspectImage` and `TrainingSample` of SimpleTuner, and its page on data sets. Here every resize keeps the
aspect: SimpleTuner adds the same number of pixels to both sides with `pixel`, and stretches to a cropped aspect.
"""

from __future__ import annotations

from math import sqrt

import torch

from mm.config.run.shapes import AspectWeight, Resolution
from mm.data.shapes.shape import Shape, Size, centre, cover, draw, left_out

_MEGAPIXEL = 1e6


def resolution_shape(rule: Resolution, source: Size, num_frames: int, *, chance: torch.Generator) -> Shape:
    """The shape by edge or area.

    Raises:
        DataError: DATA-160 for a sample that the rule leaves out.
    """
    _check_source(rule, source)
    target = _target(rule, source, chance)
    covering = _cropped_from(rule, source, target)
    return Shape(num_frames, *target, covering, _corner(rule, covering, target, chance))


def target_size(rule: Resolution, aspect: float) -> Size:
    """Size for an aspect (width by height), which is rounded to the rule's decimals."""
    aspect = round(aspect, rule.rounding)
    if rule.rule == "pixel":
        edge = rule.resolution
        height, width = (edge, int(edge * aspect)) if aspect >= 1 else (int(edge / aspect), edge)
        return _aligned(height, rule), _aligned(width, rule)
    edge = _aligned(int(sqrt(_area(rule, rule.resolution))), rule)
    return _aligned(edge / sqrt(aspect), rule), _aligned(edge * sqrt(aspect), rule)


def covering_size(source: Size, target: Size) -> Size:
    """Size of the source's aspect that covers the target, rounded down as SimpleTuner does.

    The target's shorter side is taken first; what the other then lacks is added to it, and to the first by the aspect.
    """
    height, width = target
    aspect = source[1] / source[0]
    if width < height:
        found = width, int(width / aspect)
        lacking = max(0, height - found[1])
        return found[1] + lacking, found[0] + int(lacking * aspect)
    found = int(height * aspect), height
    lacking = max(0, width - found[0])
    return found[1] + int(lacking / aspect), found[0] + lacking


def most_pixels(rule: Resolution) -> int:
    """Pixels of the largest size that is not left out."""
    aspects = _cropped_aspects(rule)
    least, most = (min(aspects), max(aspects)) if aspects else (rule.minimum_aspect_ratio, rule.maximum_aspect_ratio)
    # a side is at most half a multiple longer than the aspect has it, and the aspect at most half a decimal wider
    slack, decimal = rule.alignment / 2, 10**-rule.rounding
    widest = max(most + decimal, 1 / max(least - decimal, decimal), 1.0)
    if rule.rule == "pixel":
        edge = rule.resolution
        return int((edge + slack) * (edge * widest + slack))
    edge = sqrt(_area(rule, rule.resolution)) + slack
    return int((edge * sqrt(widest) + slack) * (edge / sqrt(widest) + slack))


def _check_source(rule: Resolution, source: Size) -> None:
    aspect, size = source[1] / source[0], _size(rule, source)
    if not rule.minimum_aspect_ratio <= aspect <= rule.maximum_aspect_ratio:
        least, most = rule.minimum_aspect_ratio, rule.maximum_aspect_ratio
        found = f"A picture of {source[0]} x {source[1]} has the aspect {aspect:.3g}; {least:g} to {most:g} are taken."
        raise left_out(found, "Remove the sample, or change minimum_aspect_ratio or maximum_aspect_ratio.")
    if rule.crop and rule.crop_aspect == "square":
        size = min(source) ** 2
    if rule.minimum_image_size is not None and size < _area(rule, rule.minimum_image_size):
        found = (
            f"A picture of {source[0]} x {source[1]} is smaller than minimum_image_size {rule.minimum_image_size:g}."
        )
        raise left_out(found, "Remove the sample, or lower minimum_image_size.")


def _target(rule: Resolution, source: Size, chance: torch.Generator) -> Size:
    own = source[1] / source[0]
    aspects = _cropped_aspects(rule) or [own]
    sizes = [target_size(rule, aspect) for aspect in aspects]
    fit = [index for index, size in enumerate(sizes) if _grows_little(rule, source, size)]
    if not fit:
        found = f"A picture of {source[0]} x {source[1]} would grow to {sizes[0][0]} x {sizes[0][1]}"
        more = f", and max_upscale_threshold is {rule.max_upscale_threshold}."
        raise left_out(found + more, "Remove the sample, or raise max_upscale_threshold.")
    if rule.crop and rule.crop_aspect == "closest":
        return sizes[min(fit, key=lambda index: abs(aspects[index] - own))]
    if len(fit) == 1:
        return sizes[fit[0]]
    buckets = [rule.crop_aspect_buckets[index] for index in fit]
    return sizes[fit[draw(chance, [one.weight if isinstance(one, AspectWeight) else 1.0 for one in buckets])]]


def _cropped_from(rule: Resolution, source: Size, target: Size) -> Size:
    """Size of the whole picture that the target is cropped from."""
    if not rule.crop or rule.crop_aspect == "preserve":
        return covering_size(source, target)
    size, most, small = source, rule.maximum_image_size, rule.target_downsample_size
    if most is not None and small is not None and _size(rule, source) > _area(rule, most):
        scale = sqrt(_area(rule, small) / _size(rule, source))
        size = max(1, round(source[0] * scale)), max(1, round(source[1] * scale))
    covers = size[0] >= target[0] and size[1] >= target[1]
    return size if covers else cover(*source, target)


def _corner(rule: Resolution, covering: Size, target: Size, chance: torch.Generator) -> Size:
    if rule.crop_style == "corner":
        return 0, 0
    if rule.crop_style == "center":
        return centre(covering, target)
    top, left = (
        int(torch.randint(all_of - part + 1, (), generator=chance))
        for all_of, part in zip(covering, target, strict=True)
    )
    return top, left


def _grows_little(rule: Resolution, source: Size, target: Size) -> bool:
    if rule.max_upscale_threshold is None:
        return True
    most = 1 + rule.max_upscale_threshold
    return target[0] <= source[0] * most and target[1] <= source[1] * most


def _cropped_aspects(rule: Resolution) -> list[float]:
    """Aspects that may be cropped to; none where the picture keeps its own."""
    if not rule.crop or rule.crop_aspect == "preserve":
        return []
    if rule.crop_aspect == "square":
        return [1.0]
    return [bucket.aspect if isinstance(bucket, AspectWeight) else bucket for bucket in rule.crop_aspect_buckets]


def _aligned(pixels: float, rule: Resolution) -> int:
    return max(rule.alignment, round(pixels / rule.alignment) * rule.alignment)


def _area(rule: Resolution, size: float) -> float:
    """Pixels that a size in the rule's unit stands for."""
    return size * _MEGAPIXEL if rule.rule == "area" else size**2


def _size(rule: Resolution, source: Size) -> int:
    """Measure that sizes of pictures are compared by: the area, or the shorter edge squared."""
    return min(source) ** 2 if rule.rule == "pixel" else source[0] * source[1]
