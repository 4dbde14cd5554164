"""Latents of I2V, FLF2V and V2V against diffusers' pipelines with the same weights, noise, frames and text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    WanImageToVideoPipeline,
    WanTransformer3DModel,
    WanVideoToVideoPipeline,
)
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel
from wans_grids import EulerOnWansGrid, UniPCOnWansGrid

from mm.demo.components import load_vae
from mm.diffusion.samplers import Sampler, make_sampler
from mm.generate.pipeline import denoise, noisy_latents
from mm.wan.conditions.known_frames import condition_latents
from mm.wan.encoders import VideoEncoder
from mm.wan.image_encoder import ImageEncoder
from mm.wan.model import WanModel

SHIFT, STEPS, GUIDANCE = 3.0, 6, 5.0
SIDE = 224  # where CLIP's own size and the frame's are one, so that no resizing enters the comparison
FRAMES = 9


def unipc() -> UniPCOnWansGrid:
    return UniPCOnWansGrid(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)


def euler() -> EulerOnWansGrid:
    return EulerOnWansGrid(shift=SHIFT)


SOLVERS = pytest.mark.parametrize(("solver", "scheduler"), [("unipc", unipc), ("euler", euler)], ids=["unipc", "euler"])


def transformer(images: int) -> WanTransformer3DModel:
    """A small one with weights that move the latents, for no, one or two images."""
    torch.manual_seed(images)
    added = {"in_channels": 36, "image_dim": 32, "added_kv_proj_dim": 32} if images else {}
    if images == 2:
        added["pos_embed_seq_len"] = 514
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, text_dim=32, freq_dim=32, ffn_dim=64, num_layers=2, **added
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def ours(model: WanTransformer3DModel, folder: Path) -> WanModel:
    model.save_pretrained(folder)
    return WanModel.from_pretrained(folder)


def clip() -> CLIPVisionModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    return CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=224, patch_size=14)).eval()


def smooth(channels: int, seed: int) -> Tensor:
    """[channels, SIDE, SIDE] of smooth pictures in 0..255, whole numbers."""
    small = torch.rand(1, channels, 5, 5, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(small, size=(SIDE, SIDE), mode="bilinear")[0].mul(255).round()


def picture(seed: int) -> Image.Image:
    return Image.fromarray(smooth(3, seed).byte().permute(1, 2, 0).numpy())


def as_frame(image: Image.Image) -> Tensor:
    """[1, 3, SIDE, SIDE] in [-1, 1]."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(SIDE, SIDE, 3)
    return pixels.permute(2, 0, 1).float().unsqueeze(0) / 127.5 - 1


def text() -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(1)
    return torch.randn(1, 512, 32, generator=source), torch.randn(1, 512, 32, generator=source)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def settings(**more: Any) -> dict[str, Any]:
    prompt, negative = text()
    return {
        "prompt_embeds": prompt, "negative_prompt_embeds": negative, "height": SIDE, "width": SIDE,
        "num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "latent", **more,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("solver", "scheduler", "num_images"),
    [
        pytest.param("unipc", unipc, 1, id="i2v-unipc"),
        pytest.param("euler", euler, 2, id="flf2v-euler"),
        pytest.param("euler", euler, 1, id="i2v-euler", marks=pytest.mark.nightly),
        pytest.param("unipc", unipc, 2, id="flf2v-unipc", marks=pytest.mark.nightly),
    ],
)
def test_latents_after_images(num_images: int, solver: Any, scheduler: Callable[[], Any], tmp_path: Path) -> None:
    reference, vae, encoder = transformer(num_images), load_vae(), clip()
    pipeline = WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, image_encoder=encoder, image_processor=CLIPImageProcessor(),
        transformer=reference, vae=vae, scheduler=scheduler(),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 16, 3, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(2))
    pictures = [picture(seed) for seed in range(num_images)]
    last = {"last_image": pictures[1]} if num_images == 2 else {}
    expected = pipeline(image=pictures[0], num_frames=FRAMES, latents=noise.clone(), **settings(), **last).frames
    frames = [as_frame(image) for image in pictures]
    images = {
        "image_features": torch.cat([ImageEncoder(encoder).encode(frame) for frame in frames], dim=1),
        "condition": condition_latents(VideoEncoder(vae).encode, dict(zip((0, -1), frames, strict=False)), FRAMES),
    }
    model, (prompt, negative) = ours(reference, tmp_path), text()

    def run(images: dict[str, Tensor], batched: bool = False) -> Tensor:
        sampler = make_sampler(solver, STEPS, SHIFT)
        return denoise(model, noise, prompt, negative, sampler, GUIDANCE, features=images, batched_guidance=batched)

    assert relative_error(run(images), expected) < 1e-4
    assert relative_error(run(images, batched=True), expected) < 1e-4
    other = images | {"condition": condition_latents(VideoEncoder(vae).encode, {0: as_frame(picture(7))}, FRAMES)}
    assert relative_error(run(other), expected) > 1e-2  # the frames decide


@SOLVERS
@pytest.mark.parametrize("strength", [0.3, 0.7, 1.0])
@pytest.mark.nightly
def test_latents_from_a_video(strength: float, solver: Any, scheduler: Callable[[], Any], tmp_path: Path) -> None:
    reference, vae = transformer(0), load_vae()
    pipeline = WanVideoToVideoPipeline(
        tokenizer=None, text_encoder=None, transformer=reference, vae=vae, scheduler=scheduler()
    )
    pipeline.set_progress_bar_config(disable=True)
    pictures = [picture(seed) for seed in range(FRAMES)]
    expected = pipeline(
        video=pictures, strength=strength, generator=torch.Generator().manual_seed(3), **settings()
    ).frames
    video = torch.stack([as_frame(image)[0] for image in pictures], dim=1).unsqueeze(0)
    clean = VideoEncoder(vae).encode(video)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(3))
    sampler = make_sampler(solver, STEPS, SHIFT, strength=strength)
    assert len(sampler.timesteps) == int(STEPS * strength)
    assert 0 < sampler.first_sigma <= 1
    model, (prompt, negative) = ours(reference, tmp_path), text()
    found = denoise(model, noisy_latents(clean, noise, sampler.first_sigma), prompt, negative, sampler, GUIDANCE)
    assert relative_error(found, expected) < 1e-4
    alone = denoise(model, noise, prompt, negative, make_sampler(solver, STEPS, SHIFT, strength=strength), GUIDANCE)
    if strength < 1:
        assert relative_error(alone, expected) > 1e-2  # the video decides


def test_a_sampler_that_starts_late_has_the_noise_level_of_its_first_step() -> None:
    sampler = make_sampler("euler", 10, 1.0, strength=0.4)
    assert sampler.first_sigma == pytest.approx(0.4)
    assert sampler.timesteps.tolist() == pytest.approx([400, 300, 200, 100])
    assert isinstance(sampler, Sampler)
