"""`mm generate` with two experts in diffusers' folders, against diffusers' WanPipeline on the same folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanVideoToVideoPipeline
from expert_folder import BOUNDARY, LOW_GUIDANCE, PROMPT, STEPS, WEIGHTS, expected_clip, transformer, write_experts
from family import noise, write_video
from generation_runs import GUIDANCE, NEGATIVE, SEED, SIZE, contents, failure, generate, settings
from kept_frames import keeping_frames, largest_difference
from safetensors.torch import load_file
from transformers import AutoTokenizer, UMT5EncoderModel
from wans_grids import UniPCOnWansGrid

import mm.generate.held
import mm.generate.run
from mm.generate.pipeline import initial_latents
from mm.lora.adapter import Adapter, Update
from mm.lora.files import write_adapter
from mm.residency.hold import HeldWeights
from mm.wan.encoders import VideoEncoder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_experts(tmp_path_factory.mktemp("weights") / "tiny")


def write(weights: Path, low: str | None = "transformer_2", **more: Any) -> None:
    """inference_model.json and a prompt, here."""
    values = settings(weights)
    values["diffusion"]["num_inference_steps"] = STEPS
    if low is not None:
        values["low_noise"] = {"from_pretrained": str(weights / low), **more}
    Path("model.json").write_text(json.dumps(values))
    Path("prompts.txt").write_text(PROMPT)


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


@pytest.mark.parametrize(
    "waiting",
    [
        ["--staying-parameters", "0"],
        pytest.param(["--staying-parameters", "0", "--host-memory-limit", "5MiB"], marks=pytest.mark.nightly),
        pytest.param(["--staying-parameters", "0", "--fp8-weights", "scaled"], marks=pytest.mark.nightly),
    ],
    ids=["host", "files", "fp8"],
)
def test_both_experts_may_wait_outside_of_the_device(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waiting: list[str]
) -> None:
    """Each with an adapter of its own, in the host's memory or in files: the bits of both on the device."""
    monkeypatch.chdir(tmp_path)
    streams: list[bool] = []
    hold = mm.generate.held.hold_weights

    def held(*words: Any, **more: Any) -> HeldWeights:
        found = hold(*words, **more)
        streams.append(found.stream is not None)
        return found

    monkeypatch.setattr(mm.generate.held, "hold_weights", held)
    for seed, name in enumerate(("high", "low")):
        source = torch.Generator().manual_seed(seed)
        rows = load_file(weights / "transformer" / WEIGHTS)["blocks.0.attn1.to_q.weight"].shape[0]
        update = Update(torch.randn(4, rows, generator=source), 0.1 * torch.randn(rows, 4, generator=source), 8.0)
        write_adapter(Path(f"{name}.safetensors"), Adapter({"blocks.0.self_attn.q": update}), "peft")
    write(weights, lora=[{"path": "low.safetensors"}])
    bits = [word for word in waiting if "fp8" in word or word == "scaled"]
    words = ["--no-progress-bar", "--lora", "high.safetensors"]
    with keeping_frames(mm.generate.run):
        generate(weights, *words, *bits, "--save-path", "plain")
        generate(weights, *words, *waiting, "--save-path", "waiting")
        write(weights)
        generate(weights, *words, *bits, "--save-path", "other")
    assert streams[:4] == [False, False, True, True]
    assert largest_difference(Path("plain"), Path("waiting")) == 0
    assert largest_difference(Path("plain"), Path("other")) > 0, "the low expert's adapter must be seen here"


def clip_from(weights: Path, video: np.ndarray, strength: float) -> tuple[np.ndarray, list[str]]:
    """diffusers' clip from a video [F, H, W, 3] in 0..1, each step by the expert that its timestep belongs to."""
    high, low = transformer(weights, "transformer"), transformer(weights, "transformer_2")
    forwards, asked = {"high": high.forward, "low": low.forward}, []

    def either(*words: Any, timestep: torch.Tensor, **more: Any) -> Any:
        asked.append("high" if float(timestep.max()) >= 1000 * BOUNDARY else "low")
        return forwards[asked[-1]](*words, timestep=timestep, **more)

    high.forward = either  # type: ignore[method-assign]  # that pipeline has no place for a second one
    vae, scheduler = (
        AutoencoderKLWan.from_pretrained(weights / "vae"), UniPCOnWansGrid.from_pretrained(weights / "scheduler"),
    )  # fmt: skip
    pipeline = WanVideoToVideoPipeline(
        tokenizer=AutoTokenizer.from_pretrained(weights / "tokenizer", trust_remote_code=False),
        text_encoder=UMT5EncoderModel.from_pretrained(weights / "text_encoder"),
        transformer=high, vae=vae, scheduler=scheduler,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    scheduler.set_timesteps(STEPS)
    sigma = float(scheduler.sigmas[STEPS - int(STEPS * strength)])
    clean = VideoEncoder(vae).encode(torch.from_numpy(video).movedim(-1, 0).unsqueeze(0) * 2 - 1)
    clip: np.ndarray = pipeline(
        strength=strength, prompt=PROMPT, negative_prompt=NEGATIVE, height=SIZE[1], width=SIZE[2],
        num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        latents=(1 - sigma) * clean + sigma * initial_latents(SEED, [0], (16, 3, 4, 6)), output_type="np",
    ).frames[0]  # fmt: skip
    return 255 * clip, asked[::2]


@pytest.mark.parametrize(
    ("strength", "experts"),
    [(0.5, ["low"] * 3), pytest.param(0.7, ["high"] + ["low"] * 3, marks=pytest.mark.nightly)],
)
def test_the_part_of_the_schedule_decides_which_expert_begins(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strength: float, experts: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    video = noise(1, *SIZE)
    write_video(Path("video.mkv"), video)
    Path("videos.txt").write_text("video.mkv")
    write(weights)
    with keeping_frames(mm.generate.run):
        generate(weights, "--no-progress-bar", "--video", "videos.txt", "--strength", str(strength))
    expected, asked = clip_from(weights, video / np.float32(255), strength)
    assert asked == experts
    assert np.abs(np.load("clips/video_0000.npy") - expected).max() < 0.6


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
