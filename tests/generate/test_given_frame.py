"""Wan2.2's TI2V, with a given first frame and without, against diffusers' pipelines with `expand_timesteps`."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from PIL import Image
from torch import Tensor
from wans_grids import EulerOnWansGrid, UniPCOnWansGrid

from mm.generate.pipeline import initial_latents
from mm.generate.sampling import ClipConditions, ClipPlan, SamplerSettings, sample
from mm.generate.sources import Given
from mm.wan.encoders import VideoEncoder
from mm.wan.model import WanModel

SHIFT, STEPS, GUIDANCE, SEED = 5.0, 6, 4.0, 3
SIZE = (9, 64, 96)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipeline() -> WanImageToVideoPipeline:
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=48, out_channels=48, text_dim=32, freq_dim=32,
        ffn_dim=64, num_layers=2, rope_max_seq_len=64,
    )  # fmt: skip
    for parameter in transformer.parameters():
        if parameter.dim() > 1:  # diffusers' own initial values hardly move the latents
            torch.nn.init.normal_(parameter, std=0.2)
    vae = AutoencoderKLWan(
        base_dim=8, decoder_base_dim=8, z_dim=48, dim_mult=[1, 1, 1, 1], num_res_blocks=1, is_residual=True,
        in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16, latents_mean=[0.1] * 48,
        latents_std=[0.5] * 48,
    )  # fmt: skip
    made = WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=vae.eval(), scheduler=None, transformer=transformer.eval(),
        expand_timesteps=True,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def scheduler(solver: str) -> object:
    if solver == "euler":
        return EulerOnWansGrid(shift=SHIFT)
    return UniPCOnWansGrid(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)


def texts(seed: int) -> Tensor:
    return torch.randn(1, 512, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("solver", ["unipc", "euler"])
@pytest.mark.parametrize("batched", [False, True])
def test_latents_are_those_of_diffusers(
    solver: str, batched: bool, pipeline: WanImageToVideoPipeline, tmp_path: Path
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    noise = initial_latents(SEED, [0], (48, 3, 4, 6))
    pipeline.scheduler = scheduler(solver)
    expected = pipeline(
        image=Image.fromarray(image), prompt_embeds=texts(1), negative_prompt_embeds=texts(2), height=64, width=96,
        num_frames=9, num_inference_steps=STEPS, guidance_scale=GUIDANCE, latents=noise.clone(), output_type="latent",
    ).frames  # fmt: skip
    pipeline.transformer.save_pretrained(tmp_path)
    model, video = WanModel.from_pretrained(tmp_path), VideoEncoder(pipeline.vae)
    settings = SamplerSettings(solver, STEPS, SHIFT, GUIDANCE, batched)  # type: ignore[arg-type]
    plan = ClipPlan(model.config, CPU, (), SIZE, SEED, settings)
    pixels = torch.from_numpy(image).movedim(-1, 0) / 127.5 - 1
    found = {
        name: sample(model, video, plan, [ClipConditions(0, texts(1)[0], {}, given)], texts(2)[0])
        for name, given in (("given", Given((pixels,))), ("text", Given()))
    }
    scale = expected.abs().max()
    assert float((found["given"] - expected).abs().max() / scale) < 1e-4
    torch.testing.assert_close(found["given"][:, :, :1], video.encode(pixels[None, :, None]))
    assert float((found["text"] - expected).abs().max() / scale) > 0.05, "a given frame must matter here"


@pytest.mark.parametrize("solver", ["unipc", "euler"])
def test_latents_of_text_alone_are_those_of_diffusers(
    solver: str, pipeline: WanImageToVideoPipeline, tmp_path: Path
) -> None:
    without = WanPipeline(
        tokenizer=None, text_encoder=None, vae=pipeline.vae, scheduler=scheduler(solver),
        transformer=pipeline.transformer, expand_timesteps=True,
    )  # fmt: skip
    without.set_progress_bar_config(disable=True)
    expected = without(
        prompt_embeds=texts(1), negative_prompt_embeds=texts(2), height=64, width=96, num_frames=9,
        num_inference_steps=STEPS, guidance_scale=GUIDANCE, latents=initial_latents(SEED, [0], (48, 3, 4, 6)),
        output_type="latent",
    ).frames  # fmt: skip
    pipeline.transformer.save_pretrained(tmp_path)
    model = WanModel.from_pretrained(tmp_path)
    plan = ClipPlan(model.config, CPU, (), SIZE, SEED, SamplerSettings(solver, STEPS, SHIFT, GUIDANCE, False))  # type: ignore[arg-type]
    found = sample(model, VideoEncoder(pipeline.vae), plan, [ClipConditions(0, texts(1)[0], {}, Given())], texts(2)[0])
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4
