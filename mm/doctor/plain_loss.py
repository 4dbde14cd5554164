"""Loss of one sample as the formulas have it: nothing of it is a step's, so that the two can be compared."""

from __future__ import annotations

import torch
from torch import Tensor

from mm.config.diffusion import LEAST_MOTION_FRAMES
from mm.data.loader import FeatureBatch
from mm.diffusion.flow import FlowMatching
from mm.wan.conditions.first_frame import learned_frames, with_given_frame
from mm.wan.inputs import ModelInputs
from mm.wan.model import WanModel


def plain_loss(model: WanModel, flow: FlowMatching, sample: FeatureBatch, seed: int, device: torch.device) -> Tensor:
    """Weighted loss of one sample on a device; the others are those of `mm.train.step.compute_gradients`."""
    key, share = (seed, sample["sample"], sample["draw"]), model.config.first_frame_share
    sigma, timestep, weight = flow.draw_timesteps(*key)
    clean = sample["latents"]
    noise = flow.draw_noise(*key, clean.shape[1:])
    noisy = flow.noisy(clean, noise, sigma)
    inputs, frames = ModelInputs(noisy, timestep, sample["text"], sample["features"]), clean.shape[2]
    learned = torch.ones(frames, dtype=torch.bool)
    if share and frames > 1 and bool(flow.draw_given_frames(*key, share)):
        inputs = with_given_frame(inputs, clean[:, :, :1], model.config.patch_size)
        learned = learned_frames(frames)
    velocity = model(inputs.each(lambda value: value.to(device)))
    difference = (velocity - (noise - clean).to(device))[:, :, learned.to(device)]
    loss, ratio = difference.square().mean() * float(weight[0]), flow.config.motion_loss_ratio
    if ratio is None or frames < LEAST_MOTION_FRAMES:
        return loss
    return (1 - ratio) * loss + ratio * difference.diff(dim=2).square().mean()
