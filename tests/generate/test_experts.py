"""Two experts against diffusers' WanPipeline with `transformer`, `transformer_2` and `boundary_ratio`."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from torch import Tensor
from wans_grids import EulerOnWansGrid, UniPCOnWansGrid

from mm.diffusion.samplers import make_sampler
from mm.generate.experts import TwoExperts, is_high
from mm.generate.pipeline import denoise, initial_latents
from mm.wan.inputs import ModelInputs
from mm.wan.model import WanModel

SHIFT, STEPS, BOUNDARY = 5.0, 8, 0.875
HIGH_GUIDANCE, LOW_GUIDANCE = 4.0, 3.0


def transformer(seed: int) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, text_dim=32, freq_dim=32, ffn_dim=64, num_layers=2,
        rope_max_seq_len=64,
    )  # fmt: skip
    for parameter in model.parameters():
        if parameter.dim() > 1:  # diffusers' own initial values hardly move the latents
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def pipeline() -> WanPipeline:
    vae = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    made = WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=None, transformer=transformer(0),
        transformer_2=transformer(1), boundary_ratio=BOUNDARY,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def experts(pipeline: WanPipeline, tmp_path_factory: pytest.TempPathFactory) -> TwoExperts:
    """Ours, of the folders that diffusers writes."""
    folder: Path = tmp_path_factory.mktemp("experts")
    pipeline.transformer.save_pretrained(folder / "transformer")
    pipeline.transformer_2.save_pretrained(folder / "transformer_2")
    high, low = (WanModel.from_pretrained(folder / name) for name in ("transformer", "transformer_2"))
    return TwoExperts(high, low, BOUNDARY)


def texts(seed: int) -> Tensor:
    return torch.randn(2, 512, 32, generator=torch.Generator().manual_seed(seed))


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("solver", ["unipc", "euler"])
@pytest.mark.parametrize("low_guidance", [LOW_GUIDANCE, 1.0])
def test_latents_are_those_of_diffusers(
    solver: str, low_guidance: float, pipeline: WanPipeline, experts: TwoExperts
) -> None:
    noise = initial_latents(3, [0, 1], (16, 3, 8, 12))
    pipeline.scheduler = (
        UniPCOnWansGrid(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)
        if solver == "unipc"
        else EulerOnWansGrid(shift=SHIFT)
    )
    expected = pipeline(
        prompt_embeds=texts(1), negative_prompt_embeds=texts(2), height=64, width=96, num_frames=9,
        num_inference_steps=STEPS, guidance_scale=HIGH_GUIDANCE, guidance_scale_2=low_guidance,
        latents=noise.clone(), output_type="latent",
    ).frames  # fmt: skip
    sampler = make_sampler(solver, STEPS, SHIFT)  # type: ignore[arg-type]
    assert 0 < sum(is_high(float(t), BOUNDARY) for t in sampler.timesteps) < STEPS

    def guidance(t: float) -> float:
        return HIGH_GUIDANCE if is_high(t, BOUNDARY) else low_guidance

    found = denoise(experts, noise, texts(1), texts(2), sampler, guidance)
    assert error(found, expected) < 1e-4
    again = make_sampler(solver, STEPS, SHIFT)  # type: ignore[arg-type]
    swapped = denoise(TwoExperts(experts.low, experts.high, BOUNDARY), noise, texts(1), texts(2), again, guidance)
    assert error(swapped, expected) > 0.05, "which expert is which must matter here"


def test_the_boundary_itself_is_the_high_expert_s() -> None:
    called: list[str] = []

    def expert(name: str):
        def velocity(inputs: ModelInputs) -> Tensor:
            called.append(name)
            return inputs.latents

        return velocity

    both = TwoExperts(expert("high"), expert("low"), 0.9)
    for timestep in ([900.0, 900.0], [899.9, 899.9]):
        both(ModelInputs(torch.zeros(2, 16, 1, 4, 4), torch.tensor(timestep), torch.zeros(2, 3, 8)))
    both(ModelInputs(torch.zeros(1, 16, 2, 4, 4), torch.tensor([[0.0, 950.0]]), torch.zeros(1, 3, 8), runs=(4, 4)))
    assert called == ["high", "low", "high"]
