"""Rules about shape rules: values that go together and leave something of every sample."""

from __future__ import annotations

from collections.abc import Iterator
from math import isclose

from mm.config.data import SIZE_MULTIPLE, TEMPORAL_STRIDE
from mm.config.run.data import Clip
from mm.config.run.extraction import SourceClip
from mm.config.run.origins import Origins, Word
from mm.config.run.shapes import AspectWeight, MaxPixels, RatioBuckets, Resolution, ShapeRule, TokenLength
from mm.errors import Problem

_Found = Iterator[tuple[str, str, str]]
"""Key of a rule, what is wrong with it, and what to do."""


def shape_problems(rule: ShapeRule, words: Origins, path: str, size_multiple: int) -> Iterator[Problem]:
    """CFG-211: values of a shape rule that make no sense together; CFG-292: a rule that cannot make such sizes.

    Args:
        rule: the rule. words: of the run. path: of the rule in it. size_multiple: of the sides of all samples.
    """
    match rule:
        case RatioBuckets():
            found = _of_ratio_buckets(rule)
            yield from _only_sixteens(words[path], rule.rule, size_multiple)
        case TokenLength():
            found = _of_token_length(rule)
            yield from _only_sixteens(words[path], rule.rule, size_multiple)
        case Resolution():
            found = _of_resolution(rule, size_multiple)
        case MaxPixels():
            found = _of_max_pixels(rule, size_multiple)
        case _:  # one that could not be read
            return
    for key, what, remedy in found:
        word = words[f"{path}.{key}"]
        yield Problem("CFG-211", f"{word.file}: {word.name} {what}.", remedy)


def _only_sixteens(word: Word, rule: str, size_multiple: int) -> Iterator[Problem]:
    if size_multiple != SIZE_MULTIPLE:
        found = f"{word.place()} is {rule}, whose sides are multiples of {SIZE_MULTIPLE}; this task's VAE and patches"
        how = "Give height and width, or one of the rules max_pixels and pixel, pixel_area and area."
        yield Problem("CFG-292", f"{found} take multiples of {size_multiple}.", how)


def frame_problems(clip: SourceClip, words: Origins, path: str) -> Iterator[Problem]:
    """CFG-212: a choice of frames that cannot be, or has no effect.

    Args:
        clip: the clip. words: of the run. path: of the clip in it.
    """
    for key, what, remedy in _of_frames(clip):
        word = words[f"{path}.{key}"]
        yield Problem("CFG-212", f"{word.file}: {word.name} {what}.", remedy)


def fewest_of_rule(clip: Clip) -> int:
    """The frames of a clip where the shape rule gives fewest, before they are rounded to 4k + 1."""
    rule = clip.shape
    if not isinstance(rule, TokenLength):
        return clip.num_frames
    return min(clip.num_frames, clip.num_frames * rule.token_side**2 // rule.max_side**2)


def _of_ratio_buckets(rule: RatioBuckets) -> _Found:
    if rule.full_share != RatioBuckets.model_fields["full_share"].default and not rule.vary_side:
        yield "full_share", "has no effect without vary_side", "Remove it, or set vary_side to true."


def _of_token_length(rule: TokenLength) -> _Found:
    if rule.min_side > rule.max_side:
        yield "min_side", f"is {rule.min_side}, more than max_side {rule.max_side}", "Use at most max_side."
    if rule.max_side < rule.token_side:
        what = f"is {rule.token_side}, more than max_side {rule.max_side}: every side would have all frames"
        yield "token_side", what, "Use at most max_side, or the rule ratio_buckets."


def _of_resolution(rule: Resolution, size_multiple: int) -> _Found:
    if rule.alignment % size_multiple:
        works = "16, 32 or 64" if size_multiple == SIZE_MULTIPLE else f"{size_multiple} or {2 * size_multiple}"
        yield "alignment", f"is {rule.alignment}, not a multiple of {size_multiple}", f"Use {works}."
    if rule.rule != "area" and rule.resolution < rule.alignment:
        what = f"is {rule.resolution:g} pixels, less than alignment {rule.alignment}"
        yield "resolution", what, "Raise it; area is in megapixels, the other rules in pixels of an edge."
    if rule.rule == "area" and rule.resolution > _MOST_MEGAPIXELS:
        what = f"is {rule.resolution:g} megapixels, more than {_MOST_MEGAPIXELS}"
        yield "resolution", what, "Say megapixels, such as 0.4, or use the rule pixel_area for the edge of a square."
    if rule.minimum_aspect_ratio > rule.maximum_aspect_ratio:
        what = f"is {rule.minimum_aspect_ratio:g}, more than maximum_aspect_ratio {rule.maximum_aspect_ratio:g}"
        yield "minimum_aspect_ratio", what, "Use at most maximum_aspect_ratio."
    if not round(rule.minimum_aspect_ratio, rule.rounding):
        what = f"is {rule.minimum_aspect_ratio:g}, which rounding {rule.rounding} makes 0"
        yield "minimum_aspect_ratio", what, "Raise it, or rounding."
    yield from _of_crop(rule)


_MOST_MEGAPIXELS = 64


def _of_crop(rule: Resolution) -> _Found:
    names = ("maximum_image_size", "target_downsample_size")
    given = [name for name in names if getattr(rule, name) is not None]
    most, small = rule.maximum_image_size, rule.target_downsample_size
    if len(given) == 1:
        yield given[0], f"has no effect without {', '.join({*names} - {*given})}", "Give both, or neither."
    if most is not None and small is not None and small > most:
        yield "target_downsample_size", f"is {small:g}, more than maximum_image_size {most:g}", "Use at most that."
    defaults = Resolution.model_fields
    for name in (*given, "crop_aspect", "crop_aspect_buckets"):
        if not rule.crop and getattr(rule, name) != defaults[name].default:
            yield name, "has no effect without crop", "Remove it, or set crop to true."
    if rule.crop and rule.crop_aspect == "preserve" and given:
        yield given[0], "has no effect with crop_aspect preserve", "Remove it, or use another crop_aspect."
    listed = rule.crop_aspect in ("closest", "random")
    if listed and not rule.crop_aspect_buckets:
        yield (
            "crop_aspect_buckets",
            f"is missing, which crop_aspect {rule.crop_aspect} needs",
            "Add it, such as [0.75, 1.0].",
        )
    if rule.crop and rule.crop_aspect_buckets and not listed:
        what = f"has no effect with crop_aspect {rule.crop_aspect}"
        yield "crop_aspect_buckets", what, "Remove it, or use crop_aspect closest or random."
    yield from _of_aspects(rule)


def _of_aspects(rule: Resolution) -> _Found:
    weights = [one.weight for one in rule.crop_aspect_buckets if isinstance(one, AspectWeight)]
    aspects = [one.aspect if isinstance(one, AspectWeight) else one for one in rule.crop_aspect_buckets]
    if any(round(aspect, rule.rounding) <= 0 for aspect in aspects):
        what = f"holds an aspect that is not above 0 when rounded to {rule.rounding} decimals"
        yield "crop_aspect_buckets", what, "Aspects are width by height, such as 1.78."
    if weights and len(weights) < len(rule.crop_aspect_buckets):
        yield "crop_aspect_buckets", "has weights for some aspects only", "Give all of them one, or none."
    elif weights and not isclose(sum(weights), 1.0, abs_tol=1e-6):
        yield "crop_aspect_buckets", f"has weights of {sum(weights):g} together", "Give weights that add up to 1."


def _of_max_pixels(rule: MaxPixels, size_multiple: int) -> _Found:
    if rule.multiple % size_multiple:
        yield "multiple", f"is {rule.multiple}, not a multiple of {size_multiple}", f"Use {size_multiple}."
    if rule.max_pixels < rule.multiple**2:
        what = f"is {rule.max_pixels}, less than one square of multiple {rule.multiple}"
        yield "max_pixels", what, "Raise it; 480 x 832 has 399360."


def _of_frames(clip: SourceClip) -> _Found:
    rule = clip.frames
    if rule.fps is not None and clip.frame_interval > 1:
        what = f"is {rule.fps:g}, and frame_interval is {clip.frame_interval}: both say which frames are taken"
        yield "frames.fps", what, "Give one of them."
    if rule.length_multiple is not None and clip.min_num_frames is None:
        what = "has no effect without min_num_frames, which accepts videos shorter than num_frames"
        yield "frames.length_multiple", what, "Remove it, or add min_num_frames."
    if rule.shorter_share and clip.num_frames <= TEMPORAL_STRIDE + 1:
        what = f"is {rule.shorter_share:g}, and clips of num_frames {clip.num_frames} have no shorter ones"
        yield "frames.shorter_share", what, "Remove it, or raise num_frames."
    needed = clip.num_frames if clip.min_num_frames is None else clip.min_num_frames
    if rule.max_frames is not None and rule.max_frames < needed:
        what = f"is {rule.max_frames}, less than the {needed} that a video must have"
        yield "frames.max_frames", what, "Raise it, or lower num_frames or min_num_frames."
