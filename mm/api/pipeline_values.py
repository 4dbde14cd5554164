"""Values that the parameters of a pipeline can have, whatever its model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

from PIL import Image

from mm.errors import Problem

_SEEDS = range(-(2**63), 2**64)
"""Seeds that torch takes."""


class _Kind(NamedTuple):
    """Values that a parameter can have: in words, and the question whether one is of them."""

    words: str
    fits: Callable[[Any], bool]


def _number(least: float = -math.inf, *, above: float = -math.inf, most: float = math.inf) -> Callable[[Any], bool]:
    def fits(value: Any) -> bool:
        return isinstance(value, Real) and least <= float(value) <= most and above < float(value) < math.inf

    return fits


def _whole(least: float = -math.inf) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def _or_none(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _is_image(value: Any) -> bool:
    return isinstance(value, Image.Image)


def _are_images(value: Any) -> bool:
    """True for a list of images, and for what reads frames of a file when they are asked for, by its first one."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_image, value))
    return hasattr(value, "__len__") and hasattr(value, "__getitem__") and len(value) > 0 and _is_image(value[0])


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_whole(1), value))


_TEXT = _Kind("a text", lambda value: isinstance(value, str))
_IMAGE = _Kind("one of Pillow's images, such as Image.open(path) gives", _or_none(_is_image))
_VIDEO = _Kind("a list of Pillow's images, its frames", _or_none(lambda value: _are_images(value) and len(value) > 0))
_SIDE = _Kind("a whole number from 1", _whole(1))
_PAIR = _Kind("two whole numbers from 1, height and width", _is_pair)
_LATENT_FRAMES = _Kind("a whole number from 1, in latent frames", _or_none(_whole(1)))
_YES_OR_NO = _Kind("True or False", lambda value: isinstance(value, bool))

_KINDS: dict[str, _Kind] = {
    "prompt": _TEXT,
    "negative_prompt": _TEXT,
    **dict.fromkeys(("input_image", "end_image", "reference_image"), _IMAGE),
    **dict.fromkeys(("input_video", "control_video", "vace_video", "vace_video_mask"), _VIDEO),
    "vace_reference_image": _Kind(
        "one of Pillow's images, or a list of them", _or_none(lambda value: _is_image(value) or _are_images(value))
    ),
    "denoising_strength": _Kind("a number above 0 and up to 1", _number(above=0, most=1)),
    "camera_control_speed": _Kind("a number", _number()),
    "vace_scale": _Kind("a number", _number()),
    "seed": _Kind(
        "a whole number from -2^63 to 2^64 - 1, or None",
        _or_none(lambda value: _whole()(value) and int(value) in _SEEDS),
    ),
    "height": _SIDE,
    "width": _SIDE,
    "num_frames": _Kind("a whole number", _whole()),
    "cfg_scale": _Kind("a number from 0", _number(0)),
    "num_inference_steps": _SIDE,
    "sigma_shift": _Kind("a number above 0", _number(above=0)),
    "switch_DiT_boundary": _Kind(
        "a number above 0 and below 1, or None", _or_none(lambda value: _number(above=0, most=1)(value) and value < 1)
    ),
    "motion_bucket_id": _Kind("a number from 0 to 100", _or_none(_number(0, most=100))),
    "tiled": _YES_OR_NO,
    "cfg_merge": _YES_OR_NO,
    "tile_size": _PAIR,
    "tile_stride": _PAIR,
    "tea_cache_l1_thresh": _Kind("a number above 0; 0.05 is small, 0.3 large", _or_none(_number(above=0))),
    "sliding_window_size": _LATENT_FRAMES,
    "sliding_window_stride": _LATENT_FRAMES,
    "alpha": _Kind("a number", _number()),
    "fps": _Kind("a number above 0", _number(above=0)),
    "quality": _Kind("a number from 0 to 10, the best", _number(0, most=10)),
    "vram_limit": _Kind("a number of GiB from 0, or None", _or_none(_number(0))),
    "vram_buffer": _Kind("a number of GiB from 0", _number(0)),
    "num_persistent_param_in_dit": _Kind("a whole number from 0, or None", _or_none(_whole(0))),
}


def value_problems(values: Mapping[str, Any]) -> Iterator[Problem]:
    """CFG-446 for each value that its parameter cannot have; parameters that are not known are not looked at."""
    for name, value in values.items():
        kind = _KINDS.get(name)
        if kind is not None and not kind.fits(value):
            yield Problem("CFG-446", f"{name} is {_shown(value)}.", f"Give {kind.words}.")


def _shown(value: Any) -> str:
    if value is None or isinstance(value, (str, Real)):
        return f"{value!r:.60}"
    if isinstance(value, (list, tuple)) and value:
        return f"{value!r:.60}"
    return f"of the type {type(value).__name__}" + (", and empty" if isinstance(value, (list, tuple)) else "")


def memory_problems(limit: Any, buffer: Any, parameters: Any) -> Iterator[Problem]:
    """CFG-446 for what `enable_vram_management` is given."""
    return value_problems({"vram_limit": limit, "vram_buffer": buffer, "num_persistent_param_in_dit": parameters})
