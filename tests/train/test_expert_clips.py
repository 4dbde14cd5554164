"""Clips and held-out losses of experts in training: each noise level is asked of its expert, on every layout."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kept_frames import keeping_frames, largest_difference
from safetensors.torch import load_file, save_file
from training_runs import WEIGHTS, run

import mm.generate.run
import mm.train.callbacks.rendering
from mm.cli import generate as generate_command
from mm.errors import ConfigError

BOUNDARY = 0.88


@pytest.fixture(scope="module", autouse=True)
def frames_before_the_codec() -> Iterator[None]:
    with keeping_frames(mm.train.callbacks.rendering, mm.generate.run):
        yield


@pytest.fixture(scope="module")
def low(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of another expert, in a folder as diffusers has them."""
    folder = tmp_path_factory.mktemp("low") / "transformer_2"
    shutil.copytree(demo / WEIGHTS, folder)
    (file,) = folder.glob("*.safetensors")
    source = torch.Generator().manual_seed(1)
    values = load_file(file)
    save_file({name: value + 0.05 * torch.randn(value.shape, generator=source) for name, value in values.items()}, file)
    (folder.parent / "model_index.json").write_text(json.dumps({"boundary_ratio": BOUNDARY}))
    return folder


def rendering(demo: Path, folder: Path) -> dict[str, Any]:
    """Flags: clips after every second step, from six steps of the sampler, some of them on either side."""
    (folder / "prompts.txt").write_text("a red disc moves left\n")
    model = json.loads((demo / "configs/inference_model.json").read_text())
    model["diffusion"] |= {"num_inference_steps": 6, "guidance_scale": 2.0}
    (folder / "validation.json").write_text(json.dumps(model))
    flags = {"interval": 2, "prompts": folder / "prompts.txt", "config": folder / "validation.json"}
    return {f"validation_{name}": value for name, value in flags.items()}


def generated(folder: Path, high: Path, low: Path) -> Path:
    """The clip that `mm generate` makes of two experts."""
    model = json.loads((folder / "validation.json").read_text())
    model["low_noise"] = {"from_pretrained": str(low), "boundary": BOUNDARY}
    (folder / "both.json").write_text(json.dumps(model))
    generate_command.main(
        ["--mm-model", str(folder / "both.json"), "--load", str(high), "--prompt", str(folder / "prompts.txt"),
         "--save-path", str(folder / "clips"), "--device", "cpu", "--no-progress-bar"]
    )  # fmt: skip
    return folder / "clips"


@pytest.mark.nightly
def test_clips_of_both_experts_in_training_are_those_of_generation(demo: Path, low: Path, tmp_path: Path) -> None:
    """The one that is not trained waits in host memory, and comes for its part of the noise levels."""
    flags = {"expert_boundary": BOUNDARY, "load_low_noise": low, "offload_expert": True, **rendering(demo, tmp_path)}
    flags |= {"eval_interval": 2, "eval_data": demo / "configs/feature_data.json"}
    run(demo, tmp_path / "run", train_iters=2, micro_batch_size=1, **flags)
    clips = generated(tmp_path, tmp_path / "run/transformer", tmp_path / "run/transformer_2")
    assert largest_difference(tmp_path / "run/validation/step_0000002", clips) == 0
    both = losses(tmp_path / "run")
    single = [tmp_path / name for name in ("transformer", "transformer_2")]
    for folder in single:  # the same weights, evaluated as one model each after a step that changes nothing
        still = {"load": tmp_path / "run" / folder.name, "finetune": True, "lr": 1e-30, "weight_decay": 0.0}
        evaluated = {name: value for name, value in flags.items() if name.startswith("eval")} | {"eval_interval": 1}
        run(demo, folder, train_iters=1, micro_batch_size=1, **still, **evaluated)
    high, little = map(losses, single)
    assert both == {at: high[at] if int(at) >= 1000 * BOUNDARY else little[at] for at in high}
    assert both != high and both != little


def losses(save: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((save / "evaluation.jsonl").read_text().splitlines()[-1])["loss_at"]
    return found


def test_clips_of_one_expert_ask_the_other_that_is_named(demo: Path, low: Path, tmp_path: Path) -> None:
    content = json.loads((demo / "configs" / "pretrain_model.json").read_text())
    content["diffusion"]["band_from"] = BOUNDARY
    (tmp_path / "high.json").write_text(json.dumps(content))
    flags = {"mm_model": tmp_path / "high.json", **rendering(demo, tmp_path)}
    run(demo, tmp_path / "run", train_iters=2, micro_batch_size=1, **flags, validation_other_expert=low)
    clip = tmp_path / "run/validation/step_0000002"
    assert largest_difference(clip, generated(tmp_path, tmp_path / "run", low)) == 0
    run(demo, tmp_path / "alone", train_iters=2, micro_batch_size=1, **flags)
    assert largest_difference(clip, tmp_path / "alone/validation/step_0000002") > 0
    with pytest.raises(ConfigError, match=r"CFG-295: The experts are swapped: .*run/iter_0000002.*from 0.88 on"):
        run(demo, tmp_path / "swapped", train_iters=2, **flags, validation_other_expert=tmp_path / "run")
