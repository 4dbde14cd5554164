"""Clips from values: features of prompts, images and videos in, frames out. Knows no files, rows or ranks.

Shapes: B clips, C latent channels, F H W latent frames, height and width, L text tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mm.config.model import WanConfig
from mm.config.run.generation import TeaCacheModel, latent_size
from mm.config.tasks.task import Frame
from mm.diffusion.samplers import Sampler, Solver, StrengthSteps, make_sampler
from mm.errors import DataError
from mm.generate.experts import is_high
from mm.generate.given_frame import GivenFirstFrame
from mm.generate.pipeline import OnStep, Velocity, denoise, initial_latents, noisy_latents, pad_text, to_frames
from mm.generate.sources import Given, LateFeatures, frames_in_front
from mm.generate.tea_cache import TeaCache, TeaCacheSettings
from mm.generate.windows import Windowed, WindowSettings
from mm.wan.conditions.pixels import ClipSize
from mm.wan.conditions.vace import frame_in_front
from mm.wan.encoders import TextEncoder, VideoEncoder

log = logging.getLogger(__name__)

PixelSize = tuple[int, int, int]
"""Frames (4k + 1), height and width of a clip in pixels."""


@dataclass(frozen=True)
class SamplingOptions:
    """Options of sampling that change what it costs, or where it begins (`docs/inference.md`).

    Attributes:
        tea_cache: threshold and model of TeaCache, such as (0.05, "Wan2.1-T2V-1.3B"); None runs all blocks at all
            steps.
        windows: latent frames that the transformer sees at a time, and between the beginnings of two such windows; None
            shows it the whole clip.
        strength_steps: steps that are taken from a given video, as for `mm.diffusion.samplers.make_sampler`.
    """

    tea_cache: tuple[float, TeaCacheModel] | None = None
    windows: tuple[int, int] | None = None
    strength_steps: StrengthSteps = "last"


@dataclass(frozen=True)
class SamplerSettings:
    """Settings of the velocity's integration.

    Attributes:
        solver, num_steps, shift, solver_order, solver_type, strength: as for `mm.diffusion.samplers.make_sampler`.
        guidance_scale: of classifier-free guidance; exactly 1 leaves the negative prompt out.
        batched_guidance: both prompts in one pass of twice the batch, instead of two passes.
        options: more of them, which change what sampling costs or where it begins.
        boundary, low_guidance_scale: of two experts, the noise level from which on the first is asked, and the scale
            below it; None where there is one transformer.
    """

    solver: Solver
    num_steps: int
    shift: float
    guidance_scale: float
    batched_guidance: bool = False
    solver_order: int = 2
    solver_type: Literal["bh1", "bh2"] = "bh2"
    strength: float = 1.0
    options: SamplingOptions = SamplingOptions()
    boundary: float | None = None
    low_guidance_scale: float | None = None

    @property
    def guides(self) -> bool:
        """True where the negative prompt is needed."""
        return self.guidance_scale != 1 or self.low_guidance_scale not in (None, 1)

    def guidance(self, timestep: float) -> float:
        """Guidance scale at a timestep."""
        low = self.boundary is not None and not is_high(timestep, self.boundary)
        return self.low_guidance_scale if low and self.low_guidance_scale is not None else self.guidance_scale

    def sampler(self, device: torch.device) -> Sampler:
        """A new one, for one batch of latents on a device."""
        return make_sampler(
            self.solver,
            self.num_steps,
            self.shift,
            device=device,
            solver_order=self.solver_order,
            solver_type=self.solver_type,
            strength=self.strength,
            strength_steps=self.options.strength_steps,
        )

    @property
    def num_evaluated(self) -> int:
        """Steps that are taken of a clip: fewer than `num_steps` where it is made from a video."""
        return len(self.sampler(torch.device("cpu")).timesteps)


@dataclass(frozen=True)
class ClipPlan:
    """Plan that all clips of a generation share.

    Attributes:
        wan: the transformer's shape. device: where it lies.
        frames: the frames that are given of each clip, as its task declares them.
        size: of the clips. seed: with a clip's index it decides the noise.
        settings: of the sampler.
    """

    wan: WanConfig
    device: torch.device
    frames: tuple[Frame, ...]
    size: PixelSize
    seed: int
    settings: SamplerSettings

    def latent_shape(self, in_front: int) -> tuple[int, int, int, int]:
        """(C, F, H, W) of a clip's noise, with so many latent frames in front."""
        frames, height, width = latent_size(self.size, self.wan.task.latent_pixels)
        return self.wan.noise_channels, in_front + frames, height, width


@dataclass(frozen=True)
class ClipConditions:
    """Conditions that one clip is made of, on the CPU.

    Attributes:
        index: keys its noise.
        text: [L, text_dim] of its prompt, L at most `text_len`.
        early: the features that need no VAE, [*shape] by name (`mm.generate.sources.EarlyFeatures`).
        given: images, videos and numbers.
        noise: [C, F, H, W] fp32, those in front included, where it is not the index's.
    """

    index: int
    text: Tensor
    early: Mapping[str, Tensor]
    given: Given
    noise: Tensor | None = None


def encode_prompts(
    encoder: TextEncoder, prompts: Sequence[str], negative: str | None
) -> tuple[list[Tensor], Tensor | None]:
    """Text features [L, text_dim] of each prompt, and of the negative one where there is one, on the CPU.

    One text at a time, so that features do not depend on their neighbours.
    """
    without = None if negative is None else encoder.encode([negative])[0].cpu()
    return [encoder.encode([prompt])[0].cpu() for prompt in prompts], without


def sample(
    model: Velocity,
    video: VideoEncoder,
    plan: ClipPlan,
    clips: Sequence[ClipConditions],
    negative: Tensor | None,
    *,
    conditions: VideoEncoder | None = None,
    agree: Callable[[bool], bool] = bool,
    on_step: OnStep = lambda clean: None,
) -> Tensor:
    """Latents of some clips that go through the transformer together.

    Args:
        model: the transformer. video: the VAE, for images and videos that are given.
        plan: what the clips share. clips: B of them, with as many latent frames in front.
        negative: [L, text_dim] of the negative prompt; may be None when the guidance scale is 1.
        conditions: the VAE, for what the model sees; None takes `video`.
        agree: of all ranks that must do alike, whether all say so (`mm.parallel.agree`).
        on_step: called after every step, with the latents that belong to the clips.

    Returns:
        [B, C, F, H, W] fp32, normalised.

    Raises:
        DataError: DATA-044 for a VAE that is not Wan's, DATA-056 when the latents are no longer finite numbers.
    """
    settings, text_len, device = plan.settings, plan.wan.text_len, plan.device
    sampler = settings.sampler(device)
    given = [clip.given for clip in clips]
    in_front = max((frames_in_front(plan.wan.task, of) for of in given), default=0)
    drawn = initial_latents(plan.seed, [clip.index for clip in clips], plan.latent_shape(in_front))
    pairs = zip(clips, drawn, strict=True)
    latents = torch.stack([own if clip.noise is None else clip.noise for clip, own in pairs]).to(device)
    clean = _clean_latents(video, plan, given)
    if clean is not None:
        latents = noisy_latents(clean.to(device), latents, sampler.first_sigma)
    features = {
        name: torch.stack([clip.early[name] for clip in clips]).to(device) for name in (clips[0].early if clips else ())
    }
    late = LateFeatures(plan.wan, conditions or video, ClipSize(*plan.size), plan.frames).of(given)
    features |= {name: feature.to(device) for name, feature in late.items()}
    windows, tea_cache = settings.options.windows, settings.options.tea_cache
    if windows is not None:
        model = Windowed(model, plan.wan, WindowSettings(*windows), in_front)
    with_first = _given_first_frame(model, video, plan, clips)
    cache = None
    if tea_cache is not None:
        cache = TeaCache(TeaCacheSettings(*tea_cache), len(sampler.timesteps), agree)

    def of_clips(found: Tensor) -> Tensor:
        return found[:, :, in_front:] if with_first is None else with_first.in_clip(found)

    found = denoise(
        with_first or model,
        latents,
        pad_text([clip.text for clip in clips], text_len).to(device),
        None if negative is None else pad_text([negative] * len(clips), text_len).to(device),
        sampler,
        settings.guidance,
        features=features,
        batched_guidance=settings.batched_guidance,
        reuse_at=None if cache is None else cache.at,
        on_step=lambda clean: on_step(of_clips(clean)),
    )
    if cache is not None:
        log.info("TeaCache left the blocks out in %d of %d passes", cache.skipped, cache.skipped + cache.computed)
    return of_clips(found)


def _clean_latents(video: VideoEncoder, plan: ClipPlan, given: Sequence[Given]) -> Tensor | None:
    """Latents [B, C, F, H, W] of the videos that clips are made from; frames in front are those of the references."""
    videos = [of.begins_as for of in given if of.begins_as is not None]
    if not videos:
        return None
    latents, size = video.encode(torch.stack(videos)), ClipSize(*plan.size)
    if not frames_in_front(plan.wan.task, given[0]):
        return latents
    references = [[frame_in_front(video.encode, size, image) for image in of.references] for of in given]
    return torch.cat((torch.stack([torch.cat(frames, dim=1) for frames in references]), latents), dim=2)


def _given_first_frame(
    model: Velocity, video: VideoEncoder, plan: ClipPlan, clips: Sequence[ClipConditions]
) -> GivenFirstFrame | None:
    """The transformer that sees the first frames of clips, of tasks for which these are part of the latents."""
    images = [clip.given.images[0] for clip in clips if clip.given.images]
    if not images or not plan.wan.first_frame_share:
        return None
    first = video.encode(torch.stack(images).unsqueeze(2)).to(plan.device)
    return GivenFirstFrame(model, first, plan.wan.patch_size)


def decode(video: VideoEncoder, latents: Tensor, size: PixelSize, name: str) -> Tensor:
    """Frames of latents [B, C, F, H, W], uint8 [B, frames, height, width, 3] on the CPU.

    Args:
        video: the VAE. latents: from `sample`. size: of the clips. name: what to call the VAE.

    Raises:
        DataError: DATA-055 for a VAE of another stride than Wan's.
    """
    frames = to_frames(video.decode(latents))
    if tuple(frames.shape[1:4]) != size:
        raise DataError(
            "DATA-055",
            f"{name} made clips of {tuple(frames.shape[1:4])} where (frames, height, width) {size} were expected.",
            "Use the VAE of the transformer's model.",
        )
    return frames
