"""The shape of a sample by the rule of its clip, and the bounds of what a rule may give."""

from __future__ import annotations

from fractions import Fraction

import torch

from mm.config.data import TEMPORAL_STRIDE
from mm.config.run.data import Clip
from mm.config.run.extraction import SourceClip
from mm.config.run.shapes import MaxPixels, RatioBuckets, Resolution, TokenLength
from mm.data.shapes import ratio_buckets, resolution
from mm.data.shapes.fixed import fixed_shape
from mm.data.shapes.frames import fewer
from mm.data.shapes.max_pixels import max_pixels_shape
from mm.data.shapes.ratio_buckets import image_sides, ratio_buckets_shape, sides_of
from mm.data.shapes.resolution import resolution_shape
from mm.data.shapes.shape import Shape
from mm.data.shapes.token_length import frames_at, token_length_shape, video_sides


def choose_shape(
    clip: SourceClip, height: int, width: Fraction | int, num_frames: int, chance: torch.Generator
) -> Shape:
    """The shape that a sample is brought to.

    Args:
        clip: its rules, which `mm.config.rules` let pass.
        height, width: pixels of the picture as it is shown; its width need not be whole.
        num_frames: of the whole video; 1 is an image, which every shape rule gives one frame.
        chance: of this sample, for what the rule leaves to it.

    Raises:
        DataError: DATA-160 for a sample that the rule leaves out, DATA-161 for one of which it leaves nothing.
    """
    rule, is_image = clip.shape, num_frames == 1
    source = height, max(1, round(width))
    most = 1 if is_image else clip.num_frames
    match rule:
        case RatioBuckets():
            shape = ratio_buckets_shape(rule, source, most, is_image=is_image, chance=chance)
        case TokenLength():
            shape = token_length_shape(rule, source, most, is_image=is_image, chance=chance)
        case Resolution():
            shape = resolution_shape(rule, source, most, chance=chance)
        case MaxPixels():
            shape = max_pixels_shape(rule, source, most)
        case None:
            shape = fixed_shape(height, float(width), clip.fixed_size, clip.num_frames)
    frames = fewer(shape.frames, clip.frames.shorter_share, chance)
    return Shape(frames, shape.height, shape.width, shape.cover, shape.corner)


def most_pixels(clip: Clip) -> int:
    """Pixels of the largest clip that there can be, all its frames together."""
    rule = clip.shape
    match rule:
        case RatioBuckets():
            image = ratio_buckets.most_pixels(sides_of(rule, is_image=True))
            return max(image, clip.num_frames * ratio_buckets.most_pixels(sides_of(rule, is_image=False)))
        case TokenLength():
            image = ratio_buckets.most_pixels(image_sides(rule.max_side, rule.min_side))
            videos = [
                frames_at(rule, side, clip.num_frames) * ratio_buckets.most_pixels([Fraction(side)])
                for side in video_sides(rule)
            ]
            return max(image, *videos)
        case Resolution():
            return clip.num_frames * resolution.most_pixels(rule)
        case MaxPixels():
            return clip.num_frames * rule.max_pixels
        case None:
            height, width = clip.fixed_size
            return clip.num_frames * height * width


def most_pixels_of_frame(clip: Clip) -> int:
    """Pixels of the largest frame that there can be."""
    rule = clip.shape
    match rule:
        case RatioBuckets():
            both = (sides_of(rule, is_image=is_image) for is_image in (False, True))
            return max(map(ratio_buckets.most_pixels, both))
        case TokenLength():
            sides = [*image_sides(rule.max_side, rule.min_side), *map(Fraction, video_sides(rule))]
            return ratio_buckets.most_pixels(sides)
        case _:
            return most_pixels(clip) // clip.num_frames


def fewest_frames(clip: SourceClip) -> int:
    """The frames that a video needs, whatever is drawn."""
    if clip.min_num_frames is not None:
        return clip.min_num_frames
    if clip.frames.shorter_share:
        return min(clip.num_frames, TEMPORAL_STRIDE + 1)
    rule = clip.shape
    if isinstance(rule, TokenLength):
        return min(frames_at(rule, side, clip.num_frames) for side in video_sides(rule))
    return clip.num_frames
