"""Images among videos, from a VideoX-Fun table to a step of training: each sample's loss is that of its own length."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from orders import sample_at
from PIL import Image
from store_content import listed, stored
from torch.nn import functional as F
from training_runs import WEIGHTS, run

from mm.cli import extract as extract_command
from mm.config.base import load
from mm.dialects.mindspeed.pretrain_json import PretrainModel
from mm.diffusion.flow import FlowMatching
from mm.errors import DataError
from mm.wan.model import WanModel


@pytest.fixture(scope="module")
def configs(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration files for two videos and two images, extracted."""
    home = tmp_path_factory.mktemp("images")
    (home / "set").mkdir()
    listed = json.loads((demo / "dataset" / "data.json").read_text())[:2]
    rows: list[dict[str, Any]] = []
    for number, row in enumerate(listed):
        (home / "set" / f"{number}.mp4").symlink_to(demo / "dataset" / row["path"])
        caption = row["cap"] if isinstance(row["cap"], str) else row["cap"][0]
        rows.append({"file_path": f"{number}.mp4", "text": caption, "type": "video"})
        colours = np.random.default_rng(number).integers(0, 256, (70, 80, 3), np.uint8)
        Image.fromarray(colours).save(home / "set" / f"{number}.png")
        rows.append({"file_path": f"{number}.png", "text": caption, "type": "image"})
    (home / "set" / "metadata.json").write_text(json.dumps(rows))
    data = json.loads((demo / "configs" / "data.json").read_text())
    data["dataset_param"]["basic_parameters"] = {
        "data_path": str(home / "set" / "metadata.json"), "data_folder": str(home / "set"),
    }  # fmt: skip
    (home / "data.json").write_text(json.dumps(data))
    (home / "tools.json").write_text(json.dumps({"sorafeature": {"save_path": str(home / "store")}}))
    extract_command.main(["--mm-data", str(home / "data.json"), "--mm-tool", str(home / "tools.json"),
                          "--mm-model", str(demo / "configs" / "model_wan.json")])  # fmt: skip
    features = json.loads((demo / "configs" / "feature_data.json").read_text())
    features["dataset_param"]["basic_parameters"] |= {
        "data_path": str(home / "store" / "data.jsonl"), "data_folder": str(home / "store"),
    }  # fmt: skip
    (home / "feature_data.json").write_text(json.dumps(features))
    return home


def test_the_first_loss_is_the_mean_over_samples(configs: Path, demo: Path, tmp_path: Path) -> None:
    files = {"mm_data": configs / "feature_data.json", "mm_model": demo / "configs" / "pretrain_model.json"}
    row = run(demo, tmp_path, **files, micro_batch_size=1, global_batch_size=4, train_iters=1)[0]
    rows, stored_tensors = listed(configs / "store"), stored(configs / "store")
    section = load(PretrainModel, demo / "configs" / "pretrain_model.json")
    model, flow = WanModel.from_pretrained(demo / WEIGHTS), FlowMatching(section.diffusion)
    losses, frames = [], []
    for position in range(4):
        sample = rows[sample_at(position, 4, seed=1234)[0]]
        tensors = stored_tensors[sample["sample"]]
        name, clean = [sample["sample"]], tensors["latents"][None]
        frames.append(clean.shape[2])
        sigma, timestep, _ = flow.draw_timesteps(1234, name, [0])
        noise = flow.draw_noise(1234, name, [0], clean.shape[1:])
        text = F.pad(tensors["prompt"], (0, 0, 0, section.predictor.text_len - len(tensors["prompt"])))[None]
        with torch.no_grad():
            velocity = model.velocity((1 - sigma) * clean + sigma * noise, timestep, text)
        losses.append(float((velocity - (noise - clean)).square().mean()))
    assert sorted(frames) == [1, 1, 3, 3]
    assert row["loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)


def test_micro_batches_of_two_hold_images_or_videos_and_give_the_same_step(
    configs: Path, demo: Path, tmp_path: Path
) -> None:
    """All four samples are in the first step, however they are grouped; three of a kind there are not."""
    files = {"mm_data": configs / "feature_data.json", "mm_model": demo / "configs" / "pretrain_model.json"}
    one, two = (
        run(demo, tmp_path / str(size), **files, micro_batch_size=size, global_batch_size=4, train_iters=1)[0]
        for size in (1, 2)
    )
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
    with pytest.raises(DataError, match=r"DATA-015.*2 samples of the features have latents \[16, 1, "):
        run(demo, tmp_path / "3", **files, micro_batch_size=3, global_batch_size=3, train_iters=1)
