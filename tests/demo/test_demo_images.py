"""The models of images of the embedded default: complete, loadable by diffusers, and what they are to begin from."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from PIL import Image
from transformers import CLIPVisionModel

from mm.config.base import load
from mm.config.tasks.registry import TASKS as DECLARED
from mm.demo.clips import COLOURS, DIRECTIONS, DemoClip, all_clips
from mm.demo.components import MODEL_NAMES
from mm.dialects.mindspeed.pretrain_json import PretrainModel
from mm.wan.folder import WeightFolder

TASKS = ["i2v", "flf2v"]


@pytest.mark.parametrize("task", TASKS)
def test_the_folder_is_complete_for_diffusers(demo: Path, task: str) -> None:
    folder = demo / "weights" / MODEL_NAMES[task]
    for part, kind in (("transformer", WanTransformer3DModel), ("image_encoder", CLIPVisionModel)):
        _, info = kind.from_pretrained(folder / part, output_loading_info=True, local_files_only=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    pipeline = WanImageToVideoPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    assert '"CLIPImageProcessor"' in (folder / "model_index.json").read_text()
    first = Image.open(demo / "images" / "0000_red_left_first.png")
    frames = pipeline(
        first, "a red circle moving left", height=64, width=64, num_frames=9, num_inference_steps=2, guidance_scale=1.0,
        last_image=first if task == "flf2v" else None, generator=torch.Generator().manual_seed(0), output_type="pt",
    ).frames  # fmt: skip
    assert frames.shape == (1, 9, 3, 64, 64) and torch.isfinite(frames).all()


@pytest.mark.parametrize("task", TASKS)
def test_the_configuration_is_that_of_the_weights(demo: Path, task: str) -> None:
    predictor = load(PretrainModel, demo / "configs" / task / "pretrain_model.json").predictor.wan()
    assert predictor == WeightFolder.open(demo / "weights" / MODEL_NAMES[task] / "transformer").config()
    assert (predictor.model_type, predictor.image_tokens) == (task, 257 * len(DECLARED[task].frames))


def test_images_are_first_and_last_frames_of_clips_that_are_not_trained_on(demo: Path) -> None:
    prompts = (demo / "prompts.txt").read_text().splitlines()
    firsts = (demo / "images_i2v.txt").read_text().splitlines()
    pairs = [line.split(", ") for line in (demo / "images_flf2v.txt").read_text().splitlines()]
    assert firsts == [first for first, _ in pairs] and len(set(firsts)) == 16
    trained = [frame for clip in all_clips() for frame in clip.draw()]
    clips = [DemoClip(colour, direction, 1) for colour in COLOURS for direction in DIRECTIONS]
    for prompt, (first, last), clip in zip(prompts, pairs, clips, strict=True):
        assert prompt == clip.caption
        for path, frame in ((first, clip.draw()[0]), (last, clip.draw()[-1])):
            pixels = np.asarray(Image.open(path))
            assert Path(path).is_relative_to(demo) and np.array_equal(pixels, frame)
            assert not any(np.array_equal(pixels, other) for other in trained)
