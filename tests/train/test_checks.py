"""Losses on held-out features and rendered clips between the steps: right, the same on every layout, without effect."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kept_frames import keeping_frames, largest_difference
from loaded import load_into
from ranks import run_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import WEIGHTS, bits, metrics, run, words

import mm.generate.run
import mm.train.callbacks.rendering
from mm.checkpoint.weights import open_weights
from mm.cli import extract as extract_command
from mm.cli import generate as generate_command
from mm.cli import train as train_command
from mm.cli.entry import run as run_command
from mm.config.base import load
from mm.config.flags import as_words
from mm.config.run.file import whole_file
from mm.data.dataset import open_features
from mm.dialects.mindspeed.files import load_train_data
from mm.dialects.mindspeed.pretrain_json import PretrainModel
from mm.dialects.mindspeed.training import features, read_training
from mm.dialects.mindspeed.validation import read_validation
from mm.generate.pipeline import pad_text
from mm.rng import generator
from mm.wan.encoders import TextEncoder
from mm.wan.model import WanModel

STEPS = 2


def checks(demo: Path, folder: Path) -> dict[str, Any]:
    """Flags: both checks after every step, two prompts, three sampler steps."""
    (folder / "prompts.txt").write_text("a red disc moves left\na blue disc moves up\n")
    model = json.loads((demo / "configs/inference_model.json").read_text())
    model["diffusion"] |= {"num_inference_steps": 3, "guidance_scale": 2.0}
    (folder / "validation.json").write_text(json.dumps(model))
    return {
        "eval_interval": 1, "eval_data": demo / "configs/feature_data.json", "validation_interval": 1,
        "validation_prompts": folder / "prompts.txt", "validation_config": folder / "validation.json",
    }  # fmt: skip


def evaluations(save: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (save / "evaluation.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", autouse=True)
def frames_before_the_codec() -> Iterator[None]:
    with keeping_frames(mm.train.callbacks.rendering, mm.generate.run):
        yield


@pytest.fixture(scope="module")
def single(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process with both checks."""
    home = tmp_path_factory.mktemp("single")
    run(demo, home / "run", train_iters=STEPS, **checks(demo, home))
    return home / "run"


def mean_square_errors(demo: Path, weights: Path) -> dict[int, list[float]]:
    """At each timestep, of every sample: the velocity's error, computed from the formula with the plain model."""
    config = load(PretrainModel, demo / "configs/pretrain_model.json").predictor.wan()
    model = WanModel(config)
    load_into(model, open_weights(weights))
    data = open_features(features(load_train_data(demo / "configs/feature_data.json").dataset_param), config)
    errors: dict[int, list[float]] = {timestep: [] for timestep in range(50, 1000, 100)}
    for index in range(len(data)):
        clean, text = data[index]["latents"].float().unsqueeze(0), pad_text([data[index]["prompt"]], config.text_len)
        for timestep, found in errors.items():
            noise = torch.randn(clean.shape, generator=generator(0, "evaluation_noise", data.name(index), timestep))
            sigma = timestep / 1000
            with torch.no_grad():
                velocity = model.velocity((1 - sigma) * clean + sigma * noise, torch.tensor([1000 * sigma]), text)
            found.append(float((velocity - (noise - clean)).square().mean()))
    return errors


def test_held_out_loss_is_the_formula(demo: Path, single: Path) -> None:
    found = evaluations(single)
    assert [line["step"] for line in found] == [1, 2]
    errors = mean_square_errors(demo, single)  # of the last step's weights
    assert found[-1]["num_samples"] == len(errors[50]) == 16
    for timestep, values in errors.items():
        assert found[-1]["loss_at"][str(timestep)] == pytest.approx(np.mean(values), rel=1e-5)
    assert found[-1]["loss"] == pytest.approx(np.mean(list(errors.values())), rel=1e-5)
    assert found[0]["loss"] != found[1]["loss"]


def test_clips_are_those_of_the_generation_command(demo: Path, single: Path, tmp_path: Path) -> None:
    config = single.parent / "validation.json"
    generate_command.main(
        ["--mm-model", str(config), "--load", str(single), "--prompt", str(single.parent / "prompts.txt"),
         "--save-path", str(tmp_path / "clips"), "--device", "cpu", "--no-progress-bar"]
    )  # fmt: skip
    found = single / f"validation/step_{STEPS:07d}"
    assert {path.name for path in found.glob("*.mp4")} == {"video_0000.mp4", "video_0001.mp4"}
    assert largest_difference(found, tmp_path / "clips") == 0
    about = json.loads((single / f"validation/step_{STEPS:07d}/video_0001.json").read_text())
    assert (about["prompt"], about["step"]) == ("a blue disc moves up", STEPS)
    assert largest_difference(single / "validation/step_0000001", found) > 0  # the model has changed since


def test_training_does_not_notice(demo: Path, single: Path, tmp_path: Path) -> None:
    assert bits(run(demo, tmp_path / "run", train_iters=STEPS)) == bits(metrics(single))


def test_tensorboard_shows_both_beside_the_loss(single: Path) -> None:
    board = EventAccumulator(str(single / "tensorboard"))
    board.Reload()
    assert {"train/loss", "evaluation/loss", "evaluation/loss_at_050"} <= set(board.Tags()["scalars"])
    assert [event.step for event in board.Scalars("evaluation/loss")] == [1, 2]
    (first, last) = board.Images("validation/video_0000")
    assert first.encoded_image_string[:6] == b"GIF89a" and last.step == STEPS
    assert (last.width, last.height) == (64, 64)


@pytest.mark.nightly
def test_steps_that_run_again_are_evaluated_again(demo: Path, single: Path, tmp_path: Path) -> None:
    flags = checks(demo, tmp_path)
    run(demo, tmp_path / "run", train_iters=1, **flags)
    with (tmp_path / "run/evaluation.jsonl").open("a") as file:  # as a run leaves it that is killed before it saves
        file.write(json.dumps(evaluations(single)[1] | {"loss": 9.0}) + "\n")
    run(demo, tmp_path / "run", train_iters=2, **flags)
    assert evaluations(tmp_path / "run") == evaluations(single)


@pytest.mark.nightly
def test_what_a_stop_left_out_is_made_up(demo: Path, single: Path, tmp_path: Path) -> None:
    """A run that is ended between saving and looking has a checkpoint of the step, and no line and no clips of it."""
    flags, save = checks(demo, tmp_path), tmp_path / "run"
    last = Path("validation") / f"step_{STEPS:07d}" / "video_0001.mp4"
    run(demo, save, train_iters=1, **flags)
    (save / "evaluation.jsonl").unlink()
    run(demo, save, train_iters=STEPS, **flags)
    assert evaluations(save) == evaluations(single)
    (save / "evaluation.jsonl").write_text(json.dumps(evaluations(single)[0]) + "\n")
    for file in (save / last, (save / last).with_suffix(".npy")):
        file.unlink()
    run(demo, save, train_iters=STEPS, **flags)  # which is at its end
    assert evaluations(save) == evaluations(single)
    assert (save / last).is_file()
    assert largest_difference((single / last).parent, (save / last).parent) == 0
    assert bits(metrics(save)) == bits(metrics(single))


LAYOUTS: list[dict[str, Any]] = [
    {
        "tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2, "recompute_granularity": "selective", "global_batch_size": 8,
    },
    {"layerzero": True, "context_parallel_size": 2},
    {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
]  # fmt: skip


def train_one_after_the_other(commands: list[list[str]]) -> None:
    with keeping_frames(mm.train.callbacks.rendering):
        for command in commands:
            train_command.main(command)


@pytest.mark.nightly
@pytest.mark.parametrize("which", [LAYOUTS[:1], LAYOUTS[1:]], ids=["pp", "dp"])
def test_every_layout_sees_the_same(demo: Path, tmp_path: Path, which: list[dict[str, Any]]) -> None:
    """Sixteen held-out samples and two prompts on four ranks, of which some have nothing to render."""
    (tmp_path / "zero.yaml").write_text("zero3_size: 2\n")
    flags = checks(demo, tmp_path)
    commands = []
    for index, layout in enumerate(which):
        batch = {"micro_batch_size": 2, "global_batch_size": 8}
        zero = {"layerzero_config": tmp_path / "zero.yaml"} if "layerzero" in layout else {}
        commands.append(words(demo, tmp_path / str(index), train_iters=1, **flags, **batch | layout | zero))
    run(demo, tmp_path / "one", train_iters=1, **flags, micro_batch_size=2, global_batch_size=8)
    run_ranks(4, train_one_after_the_other, commands, timeout_s=240)
    (expected,) = evaluations(tmp_path / "one")
    for index in range(len(which)):
        (found,) = evaluations(tmp_path / str(index))
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["loss_at"] == pytest.approx(expected["loss_at"], rel=1e-4)
        one, many = (tmp_path / name / "validation/step_0000001" for name in ("one", str(index)))
        assert {path.stem for path in many.glob("*.mp4")} == {"video_0000", "video_0001"}
        assert largest_difference(one, many) <= 1  # where rounding to whole numbers is near its edge


@pytest.mark.parametrize(
    ("change", "ids"),
    [
        ({"eval_data": None}, ["CFG-124"]),
        ({"validation_config": None}, ["CFG-124"]),
        ({"validation_prompts": None, "validation_images": "x.txt"}, ["CFG-124", "CFG-124"]),
        ({"save": None}, ["CFG-124"]),
        ({"validation_prompts": "nowhere.txt"}, ["DATA-053"]),
        ({"bf16": True}, ["CFG-022"]),
    ],
)
def test_checks_that_cannot_work(
    demo: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], change: dict[str, Any], ids: list[str]
) -> None:
    flags = {**checks(demo, tmp_path), "save": tmp_path / "run", "train_iters": 1, **change}
    save = flags.pop("save")
    assert run_command(train_command.main, words(demo, save, **flags)) in (64, 65)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error ")]
    assert [line.split()[1].rstrip(":") for line in lines] == ids


def test_another_model_is_told(demo: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = checks(demo, tmp_path)
    values = json.loads((tmp_path / "validation.json").read_text())
    values["predictor"] |= {"num_layers": 3, "ffn_dim": 256}
    values["lora"] = [{"path": "a.safetensors"}]
    (tmp_path / "validation.json").write_text(json.dumps(values))
    assert run_command(train_command.main, words(demo, tmp_path / "run", train_iters=1, **flags)) == 64
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error ")]
    assert [line.split()[1] for line in errors] == ["CFG-125:"] * 3
    assert (demo / WEIGHTS).is_dir()


def test_a_generation_s_file_says_the_same_as_mindspeed_s(demo: Path, tmp_path: Path) -> None:
    """`--validation-config run.yaml`, with prompts of the flag; what a model in training cannot have is told."""
    flags = checks(demo, tmp_path)
    described = read_training(words(demo, tmp_path / "run", train_iters=1, **flags), 1)
    expected, problems = read_validation(described)
    assert expected is not None and not problems
    file = tmp_path / "validation.yaml"
    others = {"inputs.prompts": "elsewhere.txt", "model.weights": "weights", "output.path": "clips"}
    file.write_text(whole_file(expected.changed(others)))
    asked = described.changed({"validation.config": str(file)})
    found, problems = read_validation(asked)
    assert not problems
    assert found is not None and found.model_dump() == expected.model_dump()
    file.write_text(whole_file(expected.changed({"parallel.tensor_size": 1, "residency.device_limit": "1GiB"})))
    assert [problem.id for problem in read_validation(asked)[1]] == ["CFG-125"]
    file.write_text(whole_file(described))
    assert [problem.id for problem in read_validation(asked)[1]] == ["CFG-194"]


@pytest.mark.nightly
def test_texts_of_clips_come_from_the_store(
    demo: Path, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same clips, bit for bit, without the text encoder; where the store lacks one text, that one is encoded."""
    flags = checks(demo, tmp_path)
    prompts, loaded = {"clip_prompts": flags["validation_prompts"]}, list[str]()
    load_encoder = TextEncoder.from_pretrained

    def counted(*values: Any) -> TextEncoder:
        loaded.append("")
        return load_encoder(*values)

    monkeypatch.setattr(TextEncoder, "from_pretrained", counted)
    for name, stored in {"all": prompts | {"negative_caption": ""}, "some": prompts}.items():
        home = Path(shutil.copytree(demo / "configs", tmp_path / name))
        features = str(shutil.copytree(demo / "features", home / "features"))
        tools = json.loads((home / "tools.json").read_text())
        tools["sorafeature"]["save_path"] = features
        (home / "tools.json").write_text(json.dumps(tools))
        files = {"mm_data": home / "data.json", "mm_model": home / "model_wan.json", "mm_tool": home / "tools.json"}
        extract_command.main(as_words({**files, **stored}))
        data = json.loads((home / "feature_data.json").read_text())
        data["dataset_param"]["basic_parameters"] = {"data_path": "data.jsonl", "data_folder": features}
        (home / "feature_data.json").write_text(json.dumps(data))
        loaded.clear()
        run(demo, home / "run", train_iters=STEPS, **{**flags, "mm_data": home / "feature_data.json"})
        assert len(loaded) == (name == "some")
        step = f"validation/step_{STEPS:07d}"
        assert largest_difference(single / step, home / "run" / step) == 0
