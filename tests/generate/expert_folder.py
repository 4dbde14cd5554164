"""The embedded default as a folder of two experts, and the clip that diffusers makes of it."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from generation_runs import GUIDANCE, NEGATIVE, SEED, SIZE
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, UMT5EncoderModel
from wans_grids import UniPCOnWansGrid

from mm.demo.components import write_model
from mm.generate.pipeline import initial_latents

STEPS, BOUNDARY, LOW_GUIDANCE, PROMPT = 6, 0.8, 2.0, "a red disc moves left"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def write_experts(folder: Path) -> Path:
    """The second expert has other weights; model_index.json has the boundary."""
    write_model(folder)
    (folder / "transformer_2").mkdir()
    (folder / "transformer_2" / "config.json").write_bytes((folder / "transformer" / "config.json").read_bytes())
    source = torch.Generator().manual_seed(1)
    values = load_file(folder / "transformer" / WEIGHTS)
    other = {name: value + 0.05 * torch.randn(value.shape, generator=source) for name, value in values.items()}
    save_file(other, folder / "transformer_2" / WEIGHTS)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": BOUNDARY}))
    return folder


def transformer(weights: Path, name: str) -> WanTransformer3DModel:
    model = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(weights / name))
    model.load_state_dict(load_file(weights / name / WEIGHTS))
    return model.eval()


def expected_clip(weights: Path) -> np.ndarray:
    pipeline = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(weights / "tokenizer", trust_remote_code=False),
        text_encoder=UMT5EncoderModel.from_pretrained(weights / "text_encoder"),
        transformer=transformer(weights, "transformer"), transformer_2=transformer(weights, "transformer_2"),
        boundary_ratio=BOUNDARY,
        vae=AutoencoderKLWan.from_pretrained(weights / "vae"),
        scheduler=UniPCOnWansGrid.from_pretrained(weights / "scheduler"),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    clip: np.ndarray = pipeline(
        prompt=PROMPT, negative_prompt=NEGATIVE, height=SIZE[1], width=SIZE[2], num_frames=SIZE[0],
        num_inference_steps=STEPS, guidance_scale=GUIDANCE, guidance_scale_2=LOW_GUIDANCE,
        latents=initial_latents(SEED, [0], (16, 3, 4, 6)), output_type="np",
    ).frames[0]  # fmt: skip
    return 255 * clip
