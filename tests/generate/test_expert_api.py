"""Two experts from Python: `load_experts` and the pipeline with two transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from expert_folder import BOUNDARY, LOW_GUIDANCE, PROMPT, STEPS, WEIGHTS, expected_clip, write_experts
from generation_runs import GUIDANCE, NEGATIVE, SEED, SHIFT, SIZE
from ranks import run_ranks
from released import COMMON, write_common_files, write_release
from safetensors.torch import load_file, save_file

import mm
from mm import Experts, ModelConfig, Residency, WanVideoPipeline
from mm.errors import MMError
from mm.lora.adapter import Adapter, Update
from mm.lora.files import write_adapter

A14B = "Wan-AI/Wan2.2-T2V-A14B"
HIGH_FILES, LOW_FILES = (f"{which}_noise_model/diffusion_pytorch_model*.safetensors" for which in ("high", "low"))
CLIP: dict[str, Any] = {"num_frames": 5, "height": 32, "width": 48, "num_inference_steps": 4, "cfg_scale": 3.0}
FRAMES = (5, 32, 48)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_experts(tmp_path_factory.mktemp("weights") / "tiny")


def clip(model: Any, weights: Path, **more: Any) -> torch.Tensor:
    encoders = mm.Encoders.of(weights, text_dtype="fp32")
    settings: dict[str, Any] = {"guidance_scale": (GUIDANCE, LOW_GUIDANCE), **more}
    [frames] = mm.generate_videos(
        model, PROMPT, encoders, negative_prompt=NEGATIVE, size=(SIZE[0], SIZE[1], SIZE[2]), steps=STEPS, shift=SHIFT,
        seed=SEED, **settings,
    )  # fmt: skip
    return frames


def test_clips_are_those_of_diffusers(weights: Path) -> None:
    """The folder says the boundary; each expert is guided by its own scale."""
    loaded = mm.load_experts(weights, dtype="fp32", device="cpu")
    expected = expected_clip(weights)
    assert loaded.boundary == BOUNDARY
    assert np.abs(clip(loaded, weights).numpy() - expected).max() < 0.6  # half of it is the rounding to whole numbers
    assert np.abs(clip(loaded, weights, guidance_scale=GUIDANCE).numpy() - expected).max() > 5
    alone = mm.load_model(weights, dtype="fp32", device="cpu")
    assert np.abs(clip(alone, weights, guidance_scale=GUIDANCE).numpy() - expected).max() > 5


def test_a_folder_with_two_experts_is_both(weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    both, first = mm.load_experts(weights, device="cpu"), mm.load_model(weights, device="cpu")
    assert "has two experts, of which that for much noise is loaded" in caplog.text
    found = clip(weights, weights)
    assert torch.equal(found, clip(both, weights))
    assert not torch.equal(found, clip(first, weights, guidance_scale=GUIDANCE))


def test_they_share_what_limits_leave(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is planned with half of the memory that there was before the other took its part."""
    free = iter([10**9, 0])
    monkeypatch.setattr("mm.residency.budget.free_host_bytes", lambda: next(free))
    held = mm.load_experts(weights, dtype="fp32", device="cpu", residency=Residency(staying_parameters=0))
    for model in (held.high, held.low):
        assert any(parameter.is_meta for parameter in model.parameters())  # type: ignore[union-attr]
    plain = mm.load_experts(weights, dtype="fp32", device="cpu")
    assert torch.equal(clip(held, weights), clip(plain, weights))


def test_what_does_not_go_together_is_refused(weights: Path, tmp_path: Path) -> None:
    high, low = weights / "transformer", weights / "transformer_2"
    alone = tmp_path / "low"
    alone.mkdir()
    for name in (WEIGHTS, "config.json"):
        (alone / name).symlink_to(low / name)
    write_release(tmp_path, "other", "i2v")
    one = mm.load_model(high, dtype="fp32", device="cpu")
    for told, call in (
        ("CFG-295: The experts are swapped", lambda: mm.load_experts(low, high, device="cpu")),
        ("CFG-294: .* boundary= is missing", lambda: mm.load_experts(high, alone, device="cpu")),
        ("CFG-200: .* has no transformer and transformer_2", lambda: mm.load_experts(alone, device="cpu")),
        ("CFG-200: .*two shapes|of another shape", lambda: mm.load_experts(high, tmp_path / "other", boundary=0.9)),
        ("CFG-200: boundary is 1.5", lambda: Experts(one, one, 1.5)),
        ("CFG-200: guidance_scale is .* one transformer", lambda: clip(one, weights)),
    ):
        with pytest.raises(MMError, match=told):
            call()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files in the places of the release, and a LoRA."""
    folder = tmp_path_factory.mktemp("models")
    write_common_files(folder)
    for which in ("high", "low"):
        write_release(folder, f"{A14B}/{which}_noise_model", "t2v", num_layers=4)
    source, low = torch.Generator().manual_seed(1), folder / A14B / "low_noise_model" / WEIGHTS
    values = load_file(low)
    save_file({name: value + 0.1 * torch.randn(value.shape, generator=source) for name, value in values.items()}, low)
    update = Update(torch.randn(4, 32, generator=source), torch.randn(32, 4, generator=source), 8.0)
    write_adapter(folder / "lora.safetensors", Adapter({"blocks.0.self_attn.q": update}), "peft")
    return folder


def pipeline(models: Path, *patterns: str, **more: Any) -> WanVideoPipeline:
    """As scripts of that system name the files of a release."""
    named = [ModelConfig(model_id=A14B, origin_file_pattern=pattern) for pattern in patterns]
    shared = [ModelConfig(model_id=COMMON, origin_file_pattern=name) for name in ("models_t5*.pth", "Wan2.1_VAE.pth")]
    return WanVideoPipeline.from_pretrained(
        torch_dtype=torch.float32, device="cpu", local_model_path=models, skip_download=True,
        model_configs=[*named, *shared], **more,
    )  # fmt: skip


def frames(pipe: WanVideoPipeline, **more: Any) -> np.ndarray:
    made = pipe("a red disc", **{**CLIP, "seed": 5, "progress_bar_cmd": lambda steps: steps, **more})
    return np.stack([np.array(frame) for frame in made])


def expected_frames(pipe: WanVideoPipeline, models: Path, boundary: float, **more: Any) -> np.ndarray:
    folders = (models / A14B / f"{which}_noise_model" for which in ("high", "low"))
    experts = mm.load_experts(*folders, boundary=boundary, dtype="fp32", device="cpu", **more)
    encoders = mm.Encoders(pipe.vae, pipe.text_encoder)
    noise = torch.randn((16, 2, 4, 6), generator=torch.Generator().manual_seed(5))
    [made] = mm.generate_videos(
        experts, "a red disc", encoders, negative_prompt="", size=FRAMES, steps=4, guidance_scale=3.0, shift=5.0,
        solver="euler", noise=[noise],
    )  # fmt: skip
    found: np.ndarray = made.numpy()
    return found


def test_a_pipeline_of_two_transformers(models: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first is that for much noise, down to 0.875 or what is said; each takes LoRA of its own and waits alike."""
    pipe = pipeline(models, HIGH_FILES, LOW_FILES)
    found = frames(pipe)
    assert "switch_DiT_boundary is taken as 0.875" in caplog.text
    assert np.array_equal(found, expected_frames(pipe, models, 0.875))
    # Euler's four steps with shift 5 are at 1, 0.9375, 0.8333 and 0.625: the third is the other expert's below 0.8
    other = frames(pipe, switch_DiT_boundary=0.8)
    assert np.array_equal(other, expected_frames(pipe, models, 0.8)) and not np.array_equal(other, found)
    assert pipe.dit2 is not None
    lora = models / "lora.safetensors"
    pipe.load_lora(pipe.dit2, lora, alpha=0.5)
    changed = frames(pipe)
    assert np.array_equal(changed, expected_frames(pipe, models, 0.875, low_adapters=[(lora, 0.5)]))
    assert not np.array_equal(changed, found)
    for _ in range(2):  # the second time what waits is let go before
        pipe.enable_vram_management(num_persistent_param_in_dit=0)
    for model in (pipe.dit, pipe.dit2):
        assert all(any(p.is_meta for p in block.parameters()) for block in model.blocks.values())
    assert np.array_equal(frames(pipe), changed)
    with pytest.raises(MMError, match=r"CFG-408: .* Fix: Give pipe\.dit or pipe\.dit2\."):
        pipe.load_lora(torch.nn.Linear(1, 1), lora)  # type: ignore[arg-type]


def test_room_is_measured_when_nothing_is_held(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the memory is never needed; a limit that the host has no room for leaves both as they were."""
    pipe = pipeline(models, HIGH_FILES, LOW_FILES)
    expected, held = frames(pipe), []

    def free_bytes(found: int) -> int:
        held.append([hasattr(transformer, "model") for transformer in pipe._transformers])
        return found

    monkeypatch.setattr("mm.residency.budget.free_host_bytes", lambda: free_bytes(10**9))
    pipe.enable_vram_management(num_persistent_param_in_dit=0)
    monkeypatch.setattr("mm.residency.budget.free_host_bytes", lambda: free_bytes(0))
    with pytest.raises(MMError, match="CFG-374"):
        pipe.enable_vram_management(num_persistent_param_in_dit=0)
    assert held == [[False, False]] * 2
    assert np.array_equal(frames(pipe), expected)


def test_transformers_that_are_no_pair_are_refused(models: Path, tmp_path: Path) -> None:
    for told, patterns in (
        ("CFG-295: The experts are swapped", (LOW_FILES, HIGH_FILES)),
        ("CFG-404: Several models are a dit", (HIGH_FILES, LOW_FILES, HIGH_FILES)),
    ):
        with pytest.raises(MMError, match=told):
            pipeline(models, *patterns)
    write_release(tmp_path, "other", "fun_control")
    other = ModelConfig(path=tmp_path / "other" / WEIGHTS)
    shared = [ModelConfig(model_id=COMMON, origin_file_pattern=name) for name in ("models_t5*.pth", "Wan2.1_VAE.pth")]
    with pytest.raises(MMError, match=r"CFG-404: .* two shapes"):
        WanVideoPipeline.from_pretrained(
            model_configs=[ModelConfig(model_id=A14B, origin_file_pattern=HIGH_FILES), other, *shared],
            device="cpu", local_model_path=models, skip_download=True,
        )  # fmt: skip
    with pytest.raises(MMError, match="CFG-407: switch_DiT_boundary"):
        frames(pipeline(models, HIGH_FILES), switch_DiT_boundary=0.9)
    with pytest.raises(MMError, match=r"CFG-446: switch_DiT_boundary is 1\.0"):
        frames(pipeline(models, HIGH_FILES, LOW_FILES), switch_DiT_boundary=1.0)


def _with_usp(models: str) -> np.ndarray:
    return frames(pipeline(Path(models), HIGH_FILES, LOW_FILES, use_usp=True))


@pytest.mark.nightly
def test_two_processes_share_both(models: Path) -> None:
    expected = frames(pipeline(models, HIGH_FILES, LOW_FILES))
    for found in run_ranks(2, _with_usp, str(models)):
        assert np.abs(found.astype(int) - expected).max() <= 1
