"""Random numbers keyed by what they are for, never by who draws them.

Noise, timesteps, caption dropout, sample order and frame choice come from a CPU generator seeded by
(seed, stream, sample, draw). So a resumed run needs only its count of consumed samples, the ranks that share one
sample agree without a message, ranks with different samples differ, and every parallel layout sees the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Stream = Literal[
    "noise",
    "timestep",
    "given_frame",
    "expert",
    "caption_dropout",
    "control_dropout",
    "start_dropout",
    "reference_dropout",
    "image_dropout",
    "reference_frame",
    "inpaint_mask",
    "inpaint_zeroing",
    "sample_order",
    "frame_choice",
    "shape_choice",
    "caption_choice",
    "initial_noise",
    "evaluation_noise",
    "init_weights",
]


def key(seed: int, stream: Stream, sample: int | str, draw: int) -> int:
    """The 63-bit seed of one stream of random numbers.

    Args:
        seed: the run's `--seed`.
        stream: what the numbers are for; streams are independent of each other.
        sample: identity of the sample within the data set (its index or a stable name).
        draw: how often this sample was drawn before (the epoch).
    """
    digest = hashlib.sha256(f"{seed}/{stream}/{sample}/{draw}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, stream: Stream, sample: int | str, draw: int) -> torch.Generator:
    """A CPU generator for one (seed, stream, sample, draw); the arguments are those of `key`."""
    return torch.Generator(device="cpu").manual_seed(key(seed, stream, sample, draw))


def training_noise(seed: int, sample: int | str, draw: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise of one sample, fp32 [*shape] on the CPU; the other arguments are those of `key`.

    The CPU draws it for every device, because no device has another one's generator. That takes 13 ns a number (27 ms
    for 480x832x81), so training lets the readers do it ahead (`mm.data.loader`).
    """
    return torch.randn(tuple(shape), generator=generator(seed, "noise", sample, draw), dtype=torch.float32)
