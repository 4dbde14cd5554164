"""A script that torchrun starts: a pipeline over several processes makes the frames of one on each of them."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from released import COMMON, COMMON_OF_IMAGES, write_common_files, write_release

from mm import ModelConfig, WanVideoPipeline
from mm.api.divided import Degrees
from mm.errors import MMError
from mm.lora.adapter import Adapter, Update
from mm.lora.files import write_adapter

PATTERNS = "diffusion_pytorch_model*.safetensors", "models_t5*.pth", "Wan2.1_VAE.pth", "models_clip*.pth"
CLIP = {"num_frames": 5, "height": 32, "width": 48, "num_inference_steps": 2, "cfg_scale": 3.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_common_files(folder)
    write_release(folder, COMMON, "t2v")
    write_release(folder, COMMON_OF_IMAGES, "i2v")
    source = torch.Generator().manual_seed(2)
    update = Update(torch.randn(4, 32, generator=source), torch.randn(32, 4, generator=source), 8.0)
    write_adapter(folder / "lora.safetensors", Adapter({"blocks.0.self_attn.q": update}), "peft")
    return folder


def pipeline(models: Path, model_id: str = COMMON, **degrees: Any) -> WanVideoPipeline:
    patterns = PATTERNS[: 3 if model_id == COMMON else 4]
    return WanVideoPipeline.from_pretrained(
        torch_dtype=torch.float32, device="cpu", local_model_path=models, skip_download=True,
        model_configs=[ModelConfig(model_id=model_id, origin_file_pattern=pattern) for pattern in patterns],
        **degrees,
    )  # fmt: skip


def clip(pipe: WanVideoPipeline, **more: Any) -> np.ndarray:
    frames = pipe("a red disc", **{**CLIP, "seed": 5, **more}, progress_bar_cmd=lambda steps: steps)
    return np.stack([np.array(frame) for frame in frames])


def clips(models: str, **degrees: Any) -> list[np.ndarray]:
    """One rank's clips: as loaded, with a LoRA, and with every block waiting in host memory."""
    pipe = pipeline(Path(models), **degrees)
    found = [clip(pipe)]
    pipe.load_lora(pipe.dit, Path(models, "lora.safetensors"))
    found.append(clip(pipe))
    pipe.enable_vram_management(num_persistent_param_in_dit=0)
    found.append(clip(pipe))
    return found


def clip_of_images(models: str, **degrees: Any) -> np.ndarray:
    from PIL import Image

    pipe = pipeline(Path(models), COMMON_OF_IMAGES, **degrees)
    picture = np.random.default_rng(1).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    return clip(pipe, input_image=Image.fromarray(picture))


def rank_with_usp(models: str) -> tuple[np.ndarray, str]:
    """A clip, and what is said where ranks are given different things."""
    pipe = pipeline(Path(models), use_usp=True)
    found = clip(pipe)
    with pytest.raises(MMError) as raised:
        clip(pipe, seed=dist.get_rank(), cfg_scale=3.0 + dist.get_rank())
    return found, str(raised.value.problems[0])


def test_use_usp_is_the_clip_of_one_process_on_every_rank(models: Path) -> None:
    expected = clip(pipeline(models))
    ranks = run_ranks(2, rank_with_usp, str(models))
    for found, said in ranks:
        assert np.abs(found.astype(int) - expected).max() <= 1  # where rounding to whole numbers is near its edge
        assert np.array_equal(found, ranks[0][0])
        assert said.startswith("CFG-442: Processes give the pipeline different values of cfg_scale, seed.")


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("ranks", "degrees"),
    [
        (2, {"use_usp": True}),
        (2, {"ring_degree": 2}),
        (2, {"tensor_degree": 2}),
        (4, {"ulysses_degree": 2, "ring_degree": 2}),
    ],
    ids=["usp", "ring", "tensor", "ulysses and ring"],
)
def test_every_layout_makes_the_clips_of_one_process(models: Path, ranks: int, degrees: dict[str, Any]) -> None:
    """With adapters and with weights that wait, too: each rank has its own part of both."""
    expected = clips(str(models))
    assert not np.array_equal(expected[0], expected[1])
    for of_rank in run_ranks(ranks, _clips_with, str(models), degrees):
        for found, one in zip(of_rank, expected, strict=True):
            assert np.abs(found.astype(int) - one).max() <= 1


@pytest.mark.nightly
def test_given_images_on_several_processes(models: Path) -> None:
    expected = clip_of_images(str(models))
    for found in run_ranks(2, _images_with, str(models)):
        assert np.abs(found.astype(int) - expected).max() <= 1


def _clips_with(models: str, degrees: dict[str, Any]) -> list[np.ndarray]:
    return clips(models, **degrees)


def _images_with(models: str) -> np.ndarray:
    return clip_of_images(models, use_usp=True)


def _in_a_group(models: str) -> tuple[np.ndarray, np.ndarray]:
    """As scripts that join the processes themselves; a second pipeline shares them."""
    dist.init_process_group("gloo")
    first, second = (pipeline(Path(models), use_usp=True) for _ in range(2))
    found, drawn = clip(first), clip(second, seed=None)
    assert np.array_equal(found, clip(second))
    dist.destroy_process_group()
    return found, drawn


@pytest.mark.nightly
def test_a_script_may_have_joined_its_processes(models: Path) -> None:
    expected = clip(pipeline(models))
    ranks = run_ranks(2, _in_a_group, str(models))
    for found, drawn in ranks:
        assert np.abs(found.astype(int) - expected).max() <= 1
        assert np.array_equal(drawn, ranks[0][1]) and not np.array_equal(drawn, found)  # one seed for all


def test_one_process_is_as_without(models: Path) -> None:
    assert np.array_equal(clip(pipeline(models, use_usp=True)), clip(pipeline(models)))
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ((False, 2, 1, 1, 4), r"CFG-440: ulysses_degree 2 x ring_degree 1 x tensor_degree 1 is 2, and 4 processes"),
        ((False, 1, 2, 1, 1), r"CFG-440: .* is 2, and 1 process was started.*torchrun --nproc-per-node 2"),
        ((False, 0, 1, 1, 4), r"CFG-440: ulysses_degree 0"),
        ((True, 2, 1, 1, 2), r"CFG-441: use_usp and degrees"),
    ],
)
def test_degrees_that_cannot_be(asked: tuple[Any, ...], told: str) -> None:
    with pytest.raises(MMError) as raised:
        Degrees.asked(*asked)
    assert re.search(told, str(raised.value.problems[0]))


def _heads(models: str) -> str:
    with pytest.raises(MMError) as raised:
        pipeline(Path(models), use_usp=True)
    return str(raised.value.problems[0])


@pytest.mark.nightly
def test_heads_that_do_not_divide_are_said(models: Path) -> None:
    [said, *_] = run_ranks(3, _heads, str(models))
    assert "CFG-034: num_heads 2 leaves 2 heads" in said and "Use ulysses_degree 1" in said
