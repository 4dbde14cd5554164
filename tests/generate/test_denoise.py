"""Denoising against diffusers' WanPipeline with the same weights, noise and text."""

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from wans_grids import EulerOnWansGrid, UniPCOnWansGrid

from mm.diffusion.samplers import Sampler, make_sampler
from mm.errors import DataError
from mm.generate.pipeline import denoise, initial_latents, pad_text, to_frames
from mm.wan.model import WanModel

SHIFT, STEPS, GUIDANCE = 3.0, 8, 5.0


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=64,
    )
    for parameter in transformer.parameters():
        if parameter.dim() > 1:  # diffusers' own initial values hardly move the latents
            torch.nn.init.normal_(parameter, std=0.2)
    return transformer.eval()


@pytest.fixture(scope="module")
def model(reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformer")
    reference.save_pretrained(folder)
    return WanModel.from_pretrained(folder)


@pytest.fixture(scope="module")
def text():
    return torch.randn(2, 512, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def negative():
    return torch.randn(2, 512, 32, generator=torch.Generator().manual_seed(2))


def pipeline_latents(reference, scheduler, latents, text, negative, guidance):
    vae = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    pipeline = WanPipeline(tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler, transformer=reference)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt_embeds=text,
        negative_prompt_embeds=negative,
        height=64,
        width=96,
        num_frames=9,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        latents=latents.clone(),
        output_type="latent",
    ).frames


def relative_error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def stock_euler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.set_timesteps(STEPS)
    return Sampler(scheduler)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            lambda: make_sampler("unipc", STEPS, SHIFT),
            lambda: UniPCOnWansGrid(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT),
        ),
        (lambda: make_sampler("euler", STEPS, SHIFT), lambda: EulerOnWansGrid(shift=SHIFT)),
        (
            lambda: make_sampler("dpm++", STEPS, SHIFT),
            lambda: DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
            ),
        ),
        (stock_euler, lambda: FlowMatchEulerDiscreteScheduler(shift=SHIFT)),
    ],
    ids=["unipc", "euler", "dpm++", "euler on the grid of diffusers"],
)
@pytest.mark.parametrize("guidance", [GUIDANCE, 1.0])
def test_latents_are_those_of_diffusers(model, reference, text, negative, ours, theirs, guidance):
    noise = initial_latents(3, [0, 1], (16, 3, 8, 12))
    expected = pipeline_latents(reference, theirs(), noise, text, negative, guidance)
    assert relative_error(noise, expected) > 0.5  # the model moves the latents a good way from where they began
    latents = denoise(model, noise, text, negative, ours(), guidance)
    assert latents.dtype == torch.float32
    assert relative_error(latents, expected) < 1e-4


def test_guidance_of_one_skips_the_negative_pass(model, text, negative):
    calls = []

    def counted(inputs):
        calls.append(inputs.text)
        return model(inputs)

    noise = initial_latents(0, [0, 1], (16, 1, 4, 4))
    steps = []
    arguments = (counted, noise, text, negative)
    found = denoise(*arguments, make_sampler("euler", 3, SHIFT), 1.0, on_step=steps.append)
    assert len(calls) == len(steps) == 3
    assert torch.equal(steps[-1], found)  # Euler's last step ends at what it predicts
    assert all(features is text for features in calls)
    calls.clear()
    denoise(*arguments, make_sampler("euler", 3, SHIFT), 2.0)
    assert [features is text for features in calls] == [True, False] * 3
    with pytest.raises(ValueError, match="negative"):
        denoise(model, noise, text, None, make_sampler("euler", 3, SHIFT), 2.0)


def test_a_clip_does_not_depend_on_its_batch(model, text, negative):
    size = (16, 1, 4, 4)
    together = initial_latents(5, [4, 9], size)
    assert torch.equal(together[1:], initial_latents(5, [9], size))
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together, initial_latents(6, [4, 9], size))
    both = denoise(model, together, text, negative, make_sampler("unipc", STEPS, SHIFT), GUIDANCE)
    one = denoise(model, together[1:], text[1:], negative[1:], make_sampler("unipc", STEPS, SHIFT), GUIDANCE)
    assert relative_error(both[1:], one) < 1e-5


def test_timesteps_reach_the_model_in_fp32(text, negative):
    seen = []

    def still(inputs):
        seen.append(inputs.timestep)
        return torch.zeros_like(inputs.latents)

    denoise(still, initial_latents(0, [0, 1], (16, 1, 4, 4)), text, negative, make_sampler("euler", 50, 5.0), 1.0)
    assert all(timestep.dtype == torch.float32 and timestep.shape == (2,) for timestep in seen)
    assert seen[3][0].item() == pytest.approx(987.39, abs=0.006)  # in bf16 it would be 988


def test_latents_that_are_not_finite_are_an_error(text, negative):
    def broken(inputs):
        return inputs.latents * float("nan")

    with pytest.raises(DataError) as caught:
        denoise(broken, torch.zeros(2, 16, 1, 4, 4), text, negative, make_sampler("unipc", 2, SHIFT), GUIDANCE)
    assert caught.value.id == "DATA-056"


def test_pad_text():
    short, long = torch.ones(2, 4, dtype=torch.bfloat16), 2 * torch.ones(3, 4, dtype=torch.bfloat16)
    padded = pad_text([short, long], 5)
    assert padded.dtype == torch.bfloat16
    assert padded[:, :, 0].tolist() == [[1, 1, 0, 0, 0], [2, 2, 2, 0, 0]]


def test_to_frames():
    pixels = torch.tensor([-1.0, -0.5, 0.0, 1.0, 3.0]).view(1, 1, 5, 1, 1).expand(1, 3, 5, 2, 4)
    frames = to_frames(pixels)
    assert frames.shape == (1, 5, 2, 4, 3)
    assert frames.dtype == torch.uint8
    assert frames[0, :, 0, 0, 0].tolist() == [0, 64, 128, 255, 255]
