"""Training of Wan2.2's TI2V on extracted features: what the model is given, layouts, resume, one timestep a sample."""

from pathlib import Path

import pytest
import torch
from orders import sample_at
from store_content import listed, stored
from test_family_training import LAYOUTS, features_of, files, flags_of, layouts_equal_one_process
from torch.nn import functional as F
from training_runs import bits, run

from mm.config.base import load
from mm.demo.components import MODEL_NAMES
from mm.dialects.mindspeed.pretrain_json import PretrainModel
from mm.diffusion.flow import FlowMatching
from mm.errors import CheckpointError, ConfigError
from mm.wan.model import WanModel


@pytest.fixture(scope="module")
def home(demo: Path) -> Path:
    return demo


def written(home: Path, folder: Path, **predictor: object) -> Path:
    """pretrain_model.json with other values of the predictor."""
    import json

    values = json.loads((home / "configs/ti2v/pretrain_model.json").read_text())
    values["predictor"] |= predictor
    values["task"] = values["predictor"]["model_type"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pretrain_model.json").write_text(json.dumps(values))
    return folder / "pretrain_model.json"


def test_the_first_loss_is_that_of_the_model_with_clean_first_frames(home: Path, tmp_path: Path) -> None:
    """By hand: of samples that draw it the first latent frame is clean, its tokens are at 0, and the rest counts."""
    row = run(home, tmp_path / "run", train_iters=1, **files(home, "ti2v"))[0]
    section = load(PretrainModel, home / "configs/ti2v/pretrain_model.json")
    model, flow = WanModel.from_pretrained(files(home, "ti2v")["load"]), FlowMatching(section.diffusion)
    rows, tensors = listed(features_of(home, "ti2v")), stored(features_of(home, "ti2v"))
    losses, given = [], []
    for position in range(4):
        sample = rows[sample_at(position, len(rows), seed=1234)[0]]["sample"]
        clean, prompt = tensors[sample]["latents"][None], tensors[sample]["prompt"]
        assert clean.shape == (1, 48, 3, 4, 4)
        sigma, timestep, _ = flow.draw_timesteps(1234, [sample], [0])
        noise = flow.draw_noise(1234, [sample], [0], clean.shape[1:])
        noisy = (1 - sigma) * clean + sigma * noise
        of_tokens, first = timestep.repeat(1, 12), 0
        if bool(flow.draw_given_frames(1234, [sample], [0], 0.5)):
            noisy[:, :, 0], of_tokens[:, :4], first = clean[:, :, 0], 0.0, 1
        text = F.pad(prompt, (0, 0, 0, section.predictor.text_len - len(prompt)))[None]
        with torch.no_grad():
            velocity = model.velocity(noisy, of_tokens, text)
        losses.append(float((velocity - (noise - clean))[:, :, first:].square().mean()))
        given.append(first)
    assert set(given) == {0, 1}, "samples of one kind prove little"
    assert row["loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)


@pytest.mark.parametrize(
    "layout", ["cp2", *(pytest.param(name, marks=pytest.mark.nightly) for name in LAYOUTS if name != "cp2")]
)
def test_two_processes_equal_one(home: Path, tmp_path: Path, layout: str) -> None:
    layouts_equal_one_process(home, tmp_path, "ti2v", [layout])


@pytest.mark.nightly
def test_four_steps_are_two_and_two(home: Path, tmp_path: Path) -> None:
    flags = files(home, "ti2v", lr_decay_iters=10)
    straight = run(home, tmp_path / "straight", train_iters=4, **flags)
    run(home, tmp_path / "stopped", train_iters=2, **flags)
    assert bits(run(home, tmp_path / "stopped", train_iters=4, **flags)) == bits(straight)


def test_one_timestep_a_sample_gives_no_frames(home: Path, tmp_path: Path) -> None:
    """The losses are those of a share of 0, where every frame has the sample's own timestep, too."""
    forced = written(home, tmp_path / "forced", force_2_1_time_embedding=True)
    found = run(home, tmp_path / "one", **files(home, "ti2v", train_iters=2, mm_model=forced))
    import json

    values = json.loads((home / "configs/ti2v/pretrain_model.json").read_text())
    values["diffusion"]["first_frame_share"] = 0
    (tmp_path / "none.json").write_text(json.dumps(values))
    expected = run(home, tmp_path / "two", **files(home, "ti2v", train_iters=2, mm_model=tmp_path / "none.json"))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    with_frames = run(home, tmp_path / "three", **files(home, "ti2v", train_iters=2))
    assert abs(with_frames[0]["loss"] - found[0]["loss"]) > 1e-3, "given frames must matter here"


def test_weights_of_another_kind_are_named(home: Path, tmp_path: Path) -> None:
    """Of text to video with these channels, and of its own weights, which have other ones."""
    declared = written(home, tmp_path / "t2v", model_type="t2v")
    with pytest.raises(ConfigError, match=r"CFG-305: .*model_type.*t2v.*Set .*model_type to ti2v"):
        run(home, None, **flags_of(home, "ti2v", mm_model=declared))
    of_text = home / "weights" / MODEL_NAMES["t2v"] / "transformer"
    with pytest.raises((ConfigError, CheckpointError), match=r"out_dim 16"):
        run(home, None, **files(home, "ti2v", load=of_text, train_iters=1))
