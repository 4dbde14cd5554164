"""Conditions of a training sample of a Fun-V1.1-Control model. Source: VideoX-Fun's trainer.

Shapes: C latent channels, F H W latent frames, height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm.drops import Kept
from mm.wan.conditions.control import in_first_frame


def v11_control_inputs(control: Tensor, frame: Tensor, frame_index: int, kept: Kept) -> tuple[Tensor, Tensor]:
    """Condition and reference latents of a training sample of a Fun-V1.1-Control model.

    A clip has one image, a frame of its own: the first one is its start image, and there is no reference; any other is
    its reference, and there is no start image. What is dropped is zero.

    Args:
        control: [C, F, H, W], latents of the control video. frame: [C, H, W], latents of that frame as a video of one
            frame. frame_index: of that frame in the clip, as `draw_reference_frame` gives it. kept: of the sample.

    Returns:
        The condition [2 C, F, H, W] and the reference latents [C, H, W], as `mm.wan.conditions.control` makes them.
    """
    start, reference = (frame, torch.zeros_like(frame)) if frame_index == 0 else (torch.zeros_like(frame), frame)
    condition = torch.cat(
        (or_zeros(control, kept.control), or_zeros(in_first_frame(start, control.shape[1]), kept.start))
    )
    return condition, or_zeros(reference, kept.reference)


def or_zeros(value: Tensor, is_kept: bool) -> Tensor:
    """A condition that is kept, or zeros in its place."""
    return value if is_kept else torch.zeros_like(value)
