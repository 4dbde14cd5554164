"""Random masks that Fun-InP models are trained with: ten kinds, drawn by key.

1 is where pixels are to be generated. Kinds, shares and geometry are VideoX-Fun's, but where a mask would leave nothing
to generate: of short clips fewer frames are kept.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from itertools import accumulate
from types import MappingProxyType

import torch
from torch import Generator, Tensor

from mm.errors import ConfigError
from mm.rng import generator
from mm.wan.conditions.pixels import ClipSize

SHARES_OF_CLIPS: Mapping[str, float] = MappingProxyType(
    {
        "block_all_frames": 0.05,
        "all_ones": 0.2,
        "first_frames": 0.2,
        "first_and_last_frames": 0.2,
        "block_some_frames": 0.05,
        "pixel_noise": 0.05,
        "small_blocks": 0.05,
        "ellipse": 0.1,
        "circle": 0.05,
        "random_frames": 0.05,
    }
)
"""Probability of each kind for a clip of more than one frame."""
SHARES_OF_IMAGES: Mapping[str, float] = MappingProxyType(
    {"block_all_frames": 0.2, "all_ones": 0.7, "ellipse": 0.05, "circle": 0.05}
)
"""Probability of each kind for a single frame."""
ZEROED = 0.9
"""Probability that a sample of which nothing is known has a condition of zeros."""
_MOST_KEPT = 4


def random_mask(size: ClipSize, seed: int, sample: int | str, draw: int) -> Tensor:
    """Mask of a training sample, [frames, height, width] fp32: 1 to generate, 0 known.

    Args:
        size: of the clip; its sides are 16 pixels or more. seed, sample, draw: those of `mm.rng.key`.
    """
    random = generator(seed, "inpaint_mask", sample, draw)
    shares = SHARES_OF_CLIPS if size.frames > 1 else SHARES_OF_IMAGES
    bounds = list(accumulate(shares.values()))[:-1]
    kind = list(shares)[bisect_right(bounds, float(torch.rand((), generator=random, dtype=torch.float64)))]
    return mask_of_kind(kind, size, random)


def mask_of_kind(kind: str, size: ClipSize, random: Generator) -> Tensor:
    """Mask of one kind of `SHARES_OF_CLIPS`, [frames, height, width] fp32: 1 to generate, 0 known."""
    mask = torch.zeros(size.frames, size.height, size.width)
    _DRAW[kind](mask, random)
    return mask


def draw_zeroing(rate: float, seed: int, sample: int | str, draw: int) -> bool:
    """Tell whether a sample of which nothing is known has a condition of zeros, else mask 0 and the code of grey.

    Args:
        rate: probability, `ZEROED` as VideoX-Fun. seed, sample, draw: those of `mm.rng.key`.

    Raises:
        ConfigError: CFG-260 for a rate that is none.
    """
    if not 0 <= rate <= 1:
        found = f"The probability of a zeroed condition is {rate}."
        raise ConfigError("CFG-260", found, "Give a number from 0 to 1.")
    return float(torch.rand((), generator=generator(seed, "inpaint_zeroing", sample, draw))) < rate


def _block_all_frames(mask: Tensor, random: Generator) -> None:
    """Fill one block in every frame."""
    rows, columns = _block(mask, random)
    mask[:, rows, columns] = 1


def _all_ones(mask: Tensor, random: Generator) -> None:
    """Fill everything: text to video."""
    del random
    mask.fill_(1)


def _first_frames(mask: Tensor, random: Generator) -> None:
    """Keep 1 to 4 frames at the begin."""
    mask[_integer(1, min(_MOST_KEPT, len(mask) - 1), random) :] = 1


def _first_and_last_frames(mask: Tensor, random: Generator) -> None:
    """Keep 1 to 4 frames at either end."""
    kept = _integer(1, min(_MOST_KEPT, (len(mask) - 1) // 2), random)
    mask[kept:-kept] = 1


def _block_some_frames(mask: Tensor, random: Generator) -> None:
    """Fill one block in the frames from some in the first half to some in the second."""
    rows, columns = _block(mask, random)
    half = len(mask) // 2
    begin, end = _integer(0, half - 1, random), _integer(half, len(mask) - 1, random)
    mask[begin:end, rows, columns] = 1


def _pixel_noise(mask: Tensor, random: Generator) -> None:
    """Fill every pixel of every frame or not, evenly."""
    mask.copy_(torch.randint(0, 2, mask.shape, generator=random))


def _small_blocks(mask: Tensor, random: Generator) -> None:
    """Fill a block of at most a quarter of each side in some frames, at most half of them."""
    frames, height, width = mask.shape
    count = _integer(1, max(frames // 2, 1), random)
    for frame in torch.randperm(frames, generator=random)[:count].tolist():
        tall, wide = _integer(1, height // 4, random), _integer(1, width // 4, random)
        top, left = _integer(0, height - tall, random), _integer(0, width - wide, random)
        mask[frame, top : top + tall, left : left + wide] = 1


def _ellipse(mask: Tensor, random: Generator) -> None:
    """Fill an ellipse in the first frame; what follows is known."""
    middle = _anywhere(mask, random)
    _round(mask, middle, (_radius(mask, random), _radius(mask, random)))


def _circle(mask: Tensor, random: Generator) -> None:
    """Fill a circle in the first frame; what follows is known."""
    middle, radius = _anywhere(mask, random), _radius(mask, random)
    _round(mask, middle, (radius, radius))


def _random_frames(mask: Tensor, random: Generator) -> None:
    """Fill each frame or not, evenly."""
    mask.copy_(torch.randint(0, 2, (len(mask), 1, 1), generator=random).expand_as(mask))


def _block(mask: Tensor, random: Generator) -> tuple[slice, slice]:
    """Rows and columns of a block around any pixel, a quarter to three quarters of each side, cut at the borders."""
    spans = []
    for length, middle in zip(mask.shape[1:], _anywhere(mask, random), strict=True):
        half = _integer(length // 4, length // 4 * 3 - 1, random) // 2
        spans.append(slice(max(middle - half, 0), min(middle + half, length)))
    return spans[0], spans[1]


def _round(mask: Tensor, middle: tuple[int, int], radii: tuple[int, int]) -> None:
    """Fill the pixels of the first frame that lie in an ellipse with these half axes, down and along."""
    down, along = (
        ((torch.arange(length) - at) / radius).square()
        for length, at, radius in zip(mask.shape[1:], middle, radii, strict=True)
    )
    mask[0] = (down[:, None] + along < 1).to(mask.dtype)


def _anywhere(mask: Tensor, random: Generator) -> tuple[int, int]:
    """Row and column of any pixel."""
    return _integer(0, mask.shape[1] - 1, random), _integer(0, mask.shape[2] - 1, random)


def _radius(mask: Tensor, random: Generator) -> int:
    """An eighth to a quarter of the shorter side."""
    shorter = min(mask.shape[1:])
    return _integer(shorter // 8, shorter // 4, random)


def _integer(lowest: int, highest: int, random: Generator) -> int:
    """Any of the integers from lowest to highest, both included."""
    return int(torch.randint(lowest, highest + 1, (), generator=random))


_DRAW: Mapping[str, Callable[[Tensor, Generator], None]] = MappingProxyType(
    {
        "block_all_frames": _block_all_frames,
        "all_ones": _all_ones,
        "first_frames": _first_frames,
        "first_and_last_frames": _first_and_last_frames,
        "block_some_frames": _block_some_frames,
        "pixel_noise": _pixel_noise,
        "small_blocks": _small_blocks,
        "ellipse": _ellipse,
        "circle": _circle,
        "random_frames": _random_frames,
    }
)
