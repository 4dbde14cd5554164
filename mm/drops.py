"""Conditions that a training sample is shown: drawn by key, each by itself, so that a model learns to do without any.

Source: VideoX-Fun's trainers. There is no draw for a camera's path, which is always shown.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from types import MappingProxyType

import torch

from mm.errors import ConfigError, Problem, raise_all
from mm.rng import Stream, generator


@dataclass(frozen=True)
class DropRates:
    """Shares of samples that are trained without a condition; one by one, so that several may be missing at once.

    Attributes:
        text: of the empty caption. control: of zeros for the control video. start: for the start image.
        reference: for the reference image. image: for the image encoder's features.

    Raises:
        ConfigError: CFG-260 for rates that are no shares, all at once.
    """

    text: float = 0.1
    control: float = 0.1
    start: float = 0.1
    reference: float = 0.1
    image: float = 0.1

    def __post_init__(self) -> None:
        rates = {field.name: getattr(self, field.name) for field in fields(self)}
        problems = [
            Problem("CFG-260", f"The rate at which {name} is dropped is {rate}.", "Give a number from 0 to 1.")
            for name, rate in rates.items()
            if not 0 <= rate <= 1
        ]
        raise_all(ConfigError, problems)


@dataclass(frozen=True)
class Kept:
    """Conditions that a sample is shown, True, and those that are dropped; as in `DropRates`."""

    text: bool = True
    control: bool = True
    start: bool = True
    reference: bool = True
    image: bool = True


_STREAMS: MappingProxyType[str, Stream] = MappingProxyType(
    {
        "text": "caption_dropout",
        "control": "control_dropout",
        "start": "start_dropout",
        "reference": "reference_dropout",
        "image": "image_dropout",
    }
)


def draw_kept(rates: DropRates, seed: int, sample: int | str, draw: int) -> Kept:
    """Conditions that one draw of a sample is shown; `seed`, `sample` and `draw` are those of `mm.rng.key`."""
    asked = {name: rate for name in _STREAMS if (rate := getattr(rates, name)) > 0}
    return Kept(**{name: _chance(seed, _STREAMS[name], sample, draw) >= rate for name, rate in asked.items()})


def draw_reference_frame(num_frames: int, first_rate: float, seed: int, sample: int | str, draw: int) -> int:
    """Index of the frame of a clip that is its reference image.

    Args:
        num_frames: of the clip. first_rate: probability of the first frame, which is then a start image; all others
            are equally likely. VideoX-Fun's `random` has 0.4, its `first_frame` 1.
        seed, sample, draw: those of `mm.rng.key`.

    Raises:
        ConfigError: CFG-260 for a rate that is none.
    """
    if not 0 <= first_rate <= 1:
        found = f"The probability of the first frame as the reference is {first_rate}."
        raise ConfigError("CFG-260", found, "Give a number from 0 to 1.")
    random = generator(seed, "reference_frame", sample, draw)
    if num_frames == 1 or float(torch.rand((), generator=random)) < first_rate:
        return 0
    return int(torch.randint(1, num_frames, (), generator=random))


def _chance(seed: int, stream: Stream, sample: int | str, draw: int) -> float:
    return float(torch.rand((), generator=generator(seed, stream, sample, draw)))
