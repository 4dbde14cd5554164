"""Latents of edited videos and of Wan2.2's first frames against diffusers' pipelines, weights and noise the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel, WanVACEPipeline, WanVACETransformer3DModel
from family import noise, pixels
from PIL import Image
from test_image_and_video import GUIDANCE, SHIFT, SOLVERS, STEPS, ours, relative_error, text
from torch import Tensor

from mm.config.tasks.registry import TASKS
from mm.demo.components import load_vae
from mm.generate.pipeline import initial_latents
from mm.generate.sampling import ClipConditions, ClipPlan, SamplerSettings, sample
from mm.generate.sources import Given
from mm.wan.encoders import VideoEncoder
from mm.wan.model import WanModel

SIZE = (9, 32, 48)
SEED = 5


def moving(model: Any) -> Any:
    """A model with weights that move the latents."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def small(kind: Any, **more: Any) -> Any:
    torch.manual_seed(1)
    return moving(
        kind(
            num_attention_heads=2, attention_head_dim=16, text_dim=32, freq_dim=32, ffn_dim=64, num_layers=2,
            in_channels=more.pop("in_channels", 16), out_channels=16, **more,
        )
    )  # fmt: skip


def ours_of(model: WanModel, vae: Any, solver: Any, given: Given, scale: float | None = None) -> Tensor:
    """Latents as the command and the API make them."""
    prompt, negative = text()
    plan = ClipPlan(
        model.config, torch.device("cpu"), model.config.task.frames, SIZE, SEED,
        SamplerSettings(solver, STEPS, SHIFT, GUIDANCE, False),
    )  # fmt: skip
    early = {} if scale is None else {"vace_scale": torch.tensor(scale)}
    return sample(model, VideoEncoder(vae), plan, [ClipConditions(0, prompt[0], early, given)], negative[0])


def settings(in_front: int) -> dict[str, Any]:
    prompt, negative = text()
    frames, height, width = SIZE
    return {
        "prompt_embeds": prompt, "negative_prompt_embeds": negative, "num_frames": frames, "height": height,
        "width": width, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "latent",
        "latents": initial_latents(SEED, [0], (16, 3 + in_front, height // 8, width // 8)),
    }  # fmt: skip


def pictures(array: Any) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in array]


@SOLVERS
@pytest.mark.parametrize("references", [0, 1])
def test_latents_of_an_edited_video(references: int, solver: Any, scheduler: Callable[[], Any], tmp_path: Path) -> None:
    """Two references are in another order there (`mm.wan.conditions.vace`), as its own test says."""
    reference, vae = small(WanVACETransformer3DModel, vace_layers=[0, 1], vace_in_channels=96), load_vae()
    pipeline = WanVACEPipeline(tokenizer=None, text_encoder=None, transformer=reference, vae=vae, scheduler=scheduler())
    pipeline.set_progress_bar_config(disable=True)
    video, mask, image = noise(1, *SIZE), noise(2, *SIZE), noise(3, 16, 32)
    mask[...] = (mask[..., :1] > 127) * 255
    images = {"reference_images": [Image.fromarray(image)]} if references else {}
    expected = pipeline(
        video=pictures(video), mask=pictures(mask), conditioning_scale=0.7, **images, **settings(references)
    ).frames[:, :, references:]
    given = Given(
        video=pixels(video),
        mask=torch.from_numpy(mask[..., 0]).float() / 255,
        references=(pixels(image),) * references,
    )
    model = ours(reference, tmp_path)
    assert model.config.task is TASKS["vace"]
    assert relative_error(ours_of(model, vae, solver, given, 0.7), expected) < 1e-4
    assert relative_error(ours_of(model, vae, solver, given, 1.0), expected) > 1e-3  # the scale decides


@SOLVERS
def test_latents_after_a_first_frame_without_an_image_encoder(
    solver: Any, scheduler: Callable[[], Any], tmp_path: Path
) -> None:
    reference, vae = small(WanTransformer3DModel, in_channels=36), load_vae()
    pipeline = WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, transformer=reference, vae=vae, scheduler=scheduler()
    )
    pipeline.set_progress_bar_config(disable=True)
    image = noise(4, *SIZE[1:])
    expected = pipeline(image=Image.fromarray(image), **settings(0)).frames
    model = ours(reference, tmp_path)
    assert model.config.task is TASKS["wan22_i2v"]
    assert relative_error(ours_of(model, vae, solver, Given(images=(pixels(image),))), expected) < 1e-4
    assert relative_error(ours_of(model, vae, solver, Given(images=(-pixels(image),))), expected) > 1e-3
