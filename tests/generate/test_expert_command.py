"""`mm generate` with two experts in diffusers' folders, against diffusers' WanPipeline on the same folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from generation_runs import GUIDANCE, NEGATIVE, SEED, SIZE, contents, failure, generate, settings
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, UMT5EncoderModel
from wans_grids import UniPCOnWansGrid

import mm.generate.run
from mm.demo.components import write_model
from mm.generate.pipeline import initial_latents

STEPS, BOUNDARY, LOW_GUIDANCE, PROMPT = 6, 0.8, 2.0, "a red disc moves left"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded default as a folder of two experts: the second has other weights, model_index.json the boundary."""
    folder = tmp_path_factory.mktemp("weights") / "tiny"
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


def write(weights: Path, low: str | None = "transformer_2", **more: Any) -> None:
    """inference_model.json and a prompt, here."""
    values = settings(weights)
    values["diffusion"]["num_inference_steps"] = STEPS
    if low is not None:
        values["low_noise"] = {"from_pretrained": str(weights / low), **more}
    Path("model.json").write_text(json.dumps(values))
    Path("prompts.txt").write_text(PROMPT)


def expected_clip(weights: Path) -> np.ndarray:
    def transformer(name: str) -> WanTransformer3DModel:
        model = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(weights / name))
        model.load_state_dict(load_file(weights / name / WEIGHTS))
        return model.eval()

    pipeline = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(weights / "tokenizer", trust_remote_code=False),
        text_encoder=UMT5EncoderModel.from_pretrained(weights / "text_encoder"),
        transformer=transformer("transformer"), transformer_2=transformer("transformer_2"), boundary_ratio=BOUNDARY,
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


def test_clips_of_two_experts_are_those_of_diffusers(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The boundary is that of model_index.json; what is beside a clip says both experts, and the clip is kept by it."""
    monkeypatch.chdir(tmp_path)
    frames: dict[str, np.ndarray] = {}
    write_clip = mm.generate.run.write_clip

    def keep(path: Path, clip: torch.Tensor, *rest: Any) -> None:
        frames[path.parent.name] = clip.numpy().astype(float)
        write_clip(path, clip, *rest)

    monkeypatch.setattr(mm.generate.run, "write_clip", keep)
    write(weights, guidance_scale=LOW_GUIDANCE)
    generate(weights, "--no-progress-bar")
    expected = expected_clip(weights)
    assert np.abs(frames["clips"] - expected).max() < 0.6  # half of it is the rounding to whole numbers
    said = json.loads(Path("clips/video_0000.json").read_text())["low_noise"]
    assert (said["path"], said["boundary"]) == (str(weights / "transformer_2"), BOUNDARY)
    made = contents("clips")
    frames.clear()
    generate(weights, "--no-progress-bar")
    assert frames == {} and contents("clips") == made
    write(weights, low=None)
    generate(weights, "--no-progress-bar", "--save-path", "alone")
    assert np.abs(frames["alone"] - expected).max() > 5, "the second expert must be seen here"


def test_experts_that_are_swapped_or_without_a_boundary(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(weights, low="transformer")
    assert failure(capfd, "--load", str(weights / "transformer_2")) == (64, ["CFG-295"])
    alone = tmp_path / "low"
    alone.mkdir()
    for name in (WEIGHTS, "config.json"):
        (alone / name).symlink_to(weights / "transformer_2" / name)
    write(weights, low=str(alone))
    assert failure(capfd, "--load", str(weights / "transformer")) == (64, ["CFG-294"])
    write(weights, low=str(alone), boundary=1.5)
    assert failure(capfd, "--load", str(weights / "transformer")) == (64, ["CFG-005"])
