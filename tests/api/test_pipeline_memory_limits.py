"""A pipeline within limits of device memory makes the clips that it makes without."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from released import COMMON, write_common_files, write_release

from mm import ModelConfig, WanVideoPipeline
from mm.errors import MMError
from mm.lora.adapter import Adapter, Update
from mm.lora.files import write_adapter

PATTERNS = "diffusion_pytorch_model*.safetensors", "models_t5*.pth", "Wan2.1_VAE.pth"
CLIP = {"num_frames": 5, "height": 32, "width": 48, "num_inference_steps": 2, "cfg_scale": 3.0, "seed": 5}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_common_files(folder)
    write_release(folder, COMMON, "t2v", num_layers=6)
    return folder


def pipeline(models: Path, **offload: object) -> WanVideoPipeline:
    configs = [ModelConfig(model_id=COMMON, origin_file_pattern=pattern, **offload) for pattern in PATTERNS]  # type: ignore[arg-type]
    return WanVideoPipeline.from_pretrained(
        torch_dtype=torch.float32, device="cpu", model_configs=configs, local_model_path=models, skip_download=True
    )


def clip(pipe: WanVideoPipeline) -> np.ndarray:
    frames = pipe("a red disc", **CLIP, progress_bar_cmd=lambda steps: steps)
    return np.stack([np.array(frame) for frame in frames])


def waiting(pipe: WanVideoPipeline) -> int:
    """Blocks whose weights are not on the device."""
    blocks = pipe.dit.blocks.values()
    return sum(any(parameter.is_meta for parameter in block.parameters()) for block in blocks)


@pytest.fixture(scope="module")
def expected(models: Path) -> np.ndarray:
    return clip(pipeline(models))


def test_every_bit_is_as_without(models: Path, expected: np.ndarray) -> None:
    pipe = pipeline(models, offload_device="cpu")
    assert np.array_equal(clip(pipe), expected)
    pipe.enable_vram_management(num_persistent_param_in_dit=0)
    assert waiting(pipe) == 6
    assert np.array_equal(clip(pipe), expected)
    pipe.enable_vram_management(num_persistent_param_in_dit=10**9)
    assert waiting(pipe) == 0
    assert np.array_equal(clip(pipe), expected)


def test_a_limit_that_cannot_be_kept_is_said(
    models: Path, expected: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    """As the system whose name it is: it goes on with the least."""
    pipe = pipeline(models)
    caplog.set_level(logging.WARNING)
    pipe.enable_vram_management(vram_limit=0.0001, vram_buffer=0)
    assert "A device limit of" in caplog.text and "All blocks are copied." in caplog.text
    assert waiting(pipe) == 6 and np.array_equal(clip(pipe), expected)
    pipe.enable_vram_management(vram_limit=4)
    assert waiting(pipe) == 0
    with pytest.raises(MMError, match="CFG-446: num_persistent_param_in_dit"):
        pipe.enable_vram_management(num_persistent_param_in_dit=-1)
    with pytest.raises(MMError, match="CFG-446: vram_limit"):
        pipe.enable_vram_management(vram_limit=-1)


def test_eight_bits(models: Path, expected: np.ndarray) -> None:
    """The linears of blocks are in e4m3, scaled, others as they were; clips are near, not equal."""
    pipe = pipeline(models, offload_dtype=torch.float8_e4m3fn)
    kinds = {name: parameter.dtype for name, parameter in pipe.dit.named_parameters()}
    assert kinds["blocks.0.self_attn.q.weight"] == torch.float8_e4m3fn
    assert kinds["patch_embedding.weight"] == torch.float32
    found = clip(pipe)
    assert not np.array_equal(found, expected)
    assert np.abs(found.astype(int) - expected.astype(int)).mean() < 8
    pipe.enable_vram_management(num_persistent_param_in_dit=0)
    assert np.array_equal(clip(pipe), found)


def test_a_lora_is_added_to_weights_that_wait(models: Path, tmp_path: Path) -> None:
    source = torch.Generator().manual_seed(2)
    update = Update(torch.randn(4, 32, generator=source), torch.randn(32, 4, generator=source), 8.0)
    write_adapter(tmp_path / "lora.safetensors", Adapter({"blocks.0.self_attn.q": update}), "peft")
    resident, held = pipeline(models), pipeline(models)
    held.enable_vram_management(num_persistent_param_in_dit=0)
    for pipe in (resident, held):
        pipe.load_lora(pipe.dit, tmp_path / "lora.safetensors")
    assert waiting(held) == 6
    assert np.array_equal(clip(held), clip(resident))
