"""Windows over the latent frames of a clip: a transformer that sees some of them at a time.

Windows begin every `stride` frames up to the first that reaches the end. Where they overlap their velocities are
blended, with weights that rise and fall linearly over the overlap and add up to 1.

In a window frames are numbered from its beginning: the transformer's positions begin at 0, and a window is to it a clip
of its own. What belongs to frames is cut with them; text, image features and a reference's tokens are every window's.

Shapes: B clips, C latent channels, F H W latent frames, height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from mm.config.model import WanConfig
from mm.config.tasks.task import Entry
from mm.generate.pipeline import Velocity
from mm.wan.inputs import ModelInputs
from mm.wan.tiles import fade, origins

PER_FRAME = (Entry.CHANNELS, Entry.HIDDEN, Entry.SIDE_BLOCKS)
"""Places where features enter that have an axis of latent frames, the third."""


@dataclass(frozen=True)
class WindowSettings:
    """Settings of windows: their latent frames, and those between the beginnings of two."""

    size: int
    stride: int


@dataclass(frozen=True)
class Window:
    """Frames `start` to `end` - 1 of a clip, with the weight of each, [end - start] fp32."""

    start: int
    end: int
    weights: Tensor


def windows_of(num_frames: int, settings: WindowSettings) -> list[Window]:
    """Windows over so many latent frames; at each frame the weights add up to 1.

    Source: the temporal tiles of DiffSynth-Studio.
    """
    size, stride = settings.size, settings.stride
    starts = origins(num_frames, size, stride)
    ends = [min(start + size, num_frames) for start in starts]
    total, raw = torch.zeros(num_frames), []
    for start, end in zip(starts, ends, strict=True):
        weights = fade(end - start, size - stride, 0.5, begins=start > 0, ends=end < num_frames)
        total[start:end] += weights
        raw.append(weights)
    return [Window(s, e, w / total[s:e]) for s, e, w in zip(starts, ends, raw, strict=True)]


@dataclass(frozen=True)
class Windowed:
    """Velocity of a transformer that is asked window by window.

    Attributes:
        model: the transformer, of the shape `wan`. settings: of the windows.
        in_front: latent frames in front of the clip's. Every window has them, and their velocity is the windows' mean.
    """

    model: Velocity
    wan: WanConfig
    settings: WindowSettings
    in_front: int = 0

    def __call__(self, inputs: ModelInputs) -> Tensor:
        """The velocity of clips, [B, C, F, H, W] fp32; raises what the transformer raises."""
        windows = windows_of(inputs.latents.shape[2] - self.in_front, self.settings)
        if len(windows) == 1:
            return self.model(inputs)
        blended = torch.zeros_like(inputs.latents, dtype=torch.float32)
        for number, window in enumerate(windows):
            frames = [*range(self.in_front), *range(self.in_front + window.start, self.in_front + window.end)]
            velocity = self.model(frames_of(inputs, frames, self.wan).part(number)).float()
            weights = torch.cat((torch.full((self.in_front,), 1 / len(windows)), window.weights)).to(velocity.device)
            blended[:, :, frames] += weights.view(-1, 1, 1) * velocity
        return blended


def frames_of(inputs: ModelInputs, frames: Sequence[int], wan: WanConfig) -> ModelInputs:
    """Inputs of some latent frames of clips.

    Args:
        inputs: of all frames. frames: which, ascending. wan: shape of the transformer, whose patches are of one frame.
    """
    per_frame = {feature.name for entry in PER_FRAME for feature in wan.task.entering(entry)}
    features = {name: value[:, :, frames] if name in per_frame else value for name, value in inputs.features.items()}
    timestep, runs = _times_of(inputs, frames, wan)
    return replace(inputs, latents=inputs.latents[:, :, frames], timestep=timestep, runs=runs, features=features)


def _times_of(inputs: ModelInputs, frames: Sequence[int], wan: WanConfig) -> tuple[Tensor, tuple[int, ...]]:
    """Timesteps of the runs of tokens that lie in some frames, and how many tokens of each do."""
    if not inputs.runs:
        return inputs.timestep, ()
    height, width = inputs.latents.shape[3:]
    in_frame = (height // wan.patch_size[1]) * (width // wan.patch_size[2])
    ends = [*accumulate(inputs.runs)]
    counts = [
        sum(max(min(end, (frame + 1) * in_frame) - max(end - count, frame * in_frame), 0) for frame in frames)
        for end, count in zip(ends, inputs.runs, strict=True)
    ]
    there = [index for index, count in enumerate(counts) if count]
    if len(there) == 1:
        return inputs.timestep[:, there[0]], ()
    return inputs.timestep[:, there], tuple(counts[index] for index in there)
