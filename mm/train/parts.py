"""Parts of samples with noise levels of their own: where a task's first latent frame is given clean, that and the rest.

A given frame has noise level and timestep 0, and is out of the loss: nothing there says which noise was drawn. A sample
without it has the same noise level in both parts, so that samples of either kind share a batch.

Shapes: B samples of one shape, C latent channels, F H W latent frames, height and width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mm.config.model import WanConfig
from mm.data.loader import FeatureBatch
from mm.device.copies import to_device
from mm.diffusion.flow import FlowMatching
from mm.wan.packed import joined
from mm.wan.patches import token_grid


@dataclass(frozen=True)
class Part:
    """Consecutive latent frames of some samples.

    Attributes:
        frames, tokens: their numbers; tokens are those of the video.
        sigma, timestep, weight: [B] of the samples, as `FlowMatching.draw_timesteps` has them.
        learned: [B], 1 where the frames count in the loss and 0 where not; None where they always do.
    """

    frames: int
    tokens: int
    sigma: Tensor
    timestep: Tensor
    weight: Tensor
    learned: Tensor | None = None


def frames_of_parts(segment: FeatureBatch, wan: WanConfig) -> tuple[int, ...]:
    """Latent frames of the parts of samples; a single frame is one part, as nothing were left to learn."""
    frames = segment["latents"].shape[2]
    return (1, frames - 1) if wan.first_frame_share and frames > 1 else (frames,)


def draw_parts(
    flow: FlowMatching,
    segments: Sequence[FeatureBatch],
    wan: WanConfig,
    seed: int,
    device: torch.device,
) -> list[tuple[Part, ...]]:
    """The parts of each segment, with noise levels drawn for its samples; on the device."""
    names = [name for segment in segments for name in segment["sample"]]
    draws = [draw for segment in segments for draw in segment["draw"]]
    places = [place for segment in segments for place in segment.get("place", ())]
    rows = [*flow.draw_timesteps(seed, names, draws, places or None)]
    if wan.first_frame_share:
        rows.append(flow.draw_given_frames(seed, names, draws, wan.first_frame_share))
    counts = [len(segment["sample"]) for segment in segments]
    drawn = to_device(torch.stack(rows), device).split(counts, dim=1)
    return [_parts(segment, wan, *own) for segment, own in zip(segments, drawn, strict=True)]


def _parts(
    segment: FeatureBatch, wan: WanConfig, sigma: Tensor, timestep: Tensor, weight: Tensor, given: Tensor | None = None
) -> tuple[Part, ...]:
    frames = frames_of_parts(segment, wan)
    height, width = segment["latents"].shape[3:]
    tokens = [math.prod(token_grid((count, height, width), wan.patch_size)) for count in frames]
    if given is None or len(frames) == 1:
        return (Part(frames[0], tokens[0], sigma, timestep, weight),)
    noised = 1 - given
    first = Part(frames[0], tokens[0], sigma * noised, timestep * noised, weight * noised, noised)
    return first, Part(frames[1], tokens[1], sigma, timestep, weight)


def noisy_latents(flow: FlowMatching, clean: Tensor, noise: Tensor, parts: Sequence[Part]) -> Tensor:
    """Noisy latents [B, C, F, H, W] fp32, each part at its noise level."""
    counts = [part.frames for part in parts]
    each = zip(clean.split(counts, dim=2), noise.split(counts, dim=2), parts, strict=True)
    return joined([flow.noisy(x0, of_part, part.sigma) for x0, of_part, part in each], 2)


def learned_elements(parts: Sequence[Part], latents: Tensor) -> int | Tensor:
    """Elements of a sample that count in the loss: of each, [B], where samples differ."""
    of_frame = latents.shape[1] * latents.shape[3] * latents.shape[4]
    total: int | Tensor = 0
    for part in parts:
        total = total + part.frames * of_frame * (1 if part.learned is None else part.learned)
    return total


def timesteps_of_runs(parts: Sequence[Part]) -> tuple[Tensor, tuple[int, ...]]:
    """Timesteps and runs of `mm.wan.inputs.ModelInputs`."""
    if len(parts) == 1:
        return parts[0].timestep, ()
    return torch.stack([part.timestep for part in parts], dim=1), tuple(part.tokens for part in parts)
