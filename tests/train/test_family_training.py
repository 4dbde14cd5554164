"""Training of VideoX-Fun's and Wan2.2's tasks on their features: what the model is given, layouts, resume, dropping."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from extracted import extract
from orders import sample_at
from ranks import run_ranks
from store_content import is_finished, listed, stored
from torch.nn import functional as F
from training_runs import bits, metrics, run, words

from mm.cli import train as train_command
from mm.cli import translate as translate_command
from mm.config.base import load
from mm.config.run.data import ConditionDropout, FeatureSet
from mm.config.tasks.registry import FEATURE_TASKS
from mm.data.dataset import open_features
from mm.data.loader import FeatureBatch, feature_batches
from mm.data.sampler import BatchPlan
from mm.demo.components import MODEL_NAMES
from mm.dialects.mindspeed.pretrain_json import PretrainModel
from mm.diffusion.flow import FlowMatching
from mm.drops import DropRates, draw_kept
from mm.errors import ConfigError
from mm.look.pictures import FalseColourEye, feature_strips
from mm.wan.conditions.camera import channels_of_path
from mm.wan.model import WanModel

TASKS = ["fun_control", "fun_control_ref", "wan22_i2v", "vace", "fun_inp", "fun_camera"]
EVERY_DAY = [task if task == "vace" else pytest.param(task, marks=pytest.mark.nightly) for task in TASKS]
BATCH = {"micro_batch_size": 2, "global_batch_size": 4}
LAYOUTS: dict[str, dict[str, Any]] = {
    "cp2": {"context_parallel_size": 2},
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {
        "pipeline_model_parallel_size": 2,
        "use_multiparameter_pipeline_model_parallel": True,
        "optimization_level": 2,
    },
}
ONE_LAYOUT = dict(zip(TASKS, ("pp2", "cp2", "tp2", "pp2", "tp2", "cp2"), strict=True))


@pytest.fixture(scope="module")
def home(demo: Path) -> Path:
    return demo


def features_of(home: Path, task: str) -> Path:
    """The store of a task's features, made by the first test that needs it."""
    store = home / f"features_{task}"
    if not is_finished(store):
        extract(home / "configs" / task)
    return store


def files(home: Path, task: str, **flags: Any) -> dict[str, Any]:
    """Flags that train the task's tiny model on its features."""
    features_of(home, task)
    return flags_of(home, task, **flags)


def flags_of(home: Path, task: str, **flags: Any) -> dict[str, Any]:
    configs = home / "configs" / task
    return {
        "mm_data": configs / "feature_data.json",
        "mm_model": configs / "pretrain_model.json",
        "load": home / "weights" / MODEL_NAMES[task] / "transformer",
        **BATCH,
        **flags,
    }


def dropping(home: Path, task: str, folder: Path, **rates: float) -> Path:
    """feature_data.json with rates of dropping."""
    values = json.loads((home / "configs" / task / "feature_data.json").read_text())
    values["dataset_param"]["preprocess_parameters"]["condition_dropout"] = rates
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "feature_data.json").write_text(json.dumps(values))
    return folder / "feature_data.json"


@pytest.mark.parametrize("task", EVERY_DAY)
def test_the_first_loss_is_that_of_the_model_with_these_features(home: Path, tmp_path: Path, task: str) -> None:
    """By hand: the files of the store into the model, and the mean of four losses."""
    row = run(home, tmp_path, train_iters=1, **files(home, task))[0]
    section = load(PretrainModel, home / "configs" / task / "pretrain_model.json")
    model, flow = WanModel.from_pretrained(files(home, task)["load"]), FlowMatching(section.diffusion)
    rows, tensors = listed(features_of(home, task)), stored(features_of(home, task))
    losses = []
    for position in range(4):
        sample = rows[sample_at(position, len(rows), seed=1234)[0]]["sample"]
        held = tensors[sample]
        clean = held["latents"][None]
        sigma, timestep, _ = flow.draw_timesteps(1234, [sample], [0])
        noise = flow.draw_noise(1234, [sample], [0], clean.shape[1:])
        noisy = (1 - sigma) * clean + sigma * noise
        text = F.pad(held["prompt"], (0, 0, 0, section.predictor.text_len - len(held["prompt"])))[None]
        features = {feature.name: held[feature.name][None] for feature in model.config.task.stored}
        if "camera" in features:
            features["camera"] = channels_of_path(held["camera"])[None]
        with torch.no_grad():
            velocity = model.velocity(noisy, timestep, text, **features)
        losses.append(float((velocity - (noise - clean)).square().mean()))
    assert row["loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)


def train_one_after_the_other(commands: list[list[str]]) -> None:
    for command in commands:
        train_command.main(command)


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def layouts_equal_one_process(home: Path, folder: Path, task: str, names: list[str]) -> None:
    rates = {"control": 0.5, "start": 0.5, "image": 0.5} if task.startswith("fun_control") else {}
    flags = files(home, task, train_iters=3, mm_data=dropping(home, task, folder, **rates))
    commands = [words(home, folder / name, **flags, **LAYOUTS[name]) for name in names]
    run_ranks(2, train_one_after_the_other, commands, timeout_s=240)
    single = run(home, folder / "single", **flags)
    for name in names:
        same(metrics(folder / name), single)


@pytest.mark.parametrize("task", EVERY_DAY)
def test_two_processes_equal_one(home: Path, tmp_path: Path, task: str) -> None:
    layouts_equal_one_process(home, tmp_path, task, [ONE_LAYOUT[task]])


@pytest.mark.nightly
@pytest.mark.parametrize("task", TASKS)
def test_every_layout_equals_one_process(home: Path, tmp_path: Path, task: str) -> None:
    layouts_equal_one_process(home, tmp_path, task, list(LAYOUTS))


@pytest.mark.nightly
@pytest.mark.parametrize("task", ["fun_control_ref", "wan22_i2v", "vace"])
def test_four_steps_are_two_and_two(home: Path, tmp_path: Path, task: str) -> None:
    rates = {"reference": 0.5, "control": 0.3} if task == "fun_control_ref" else {}
    flags = files(home, task, lr_decay_iters=10, mm_data=dropping(home, task, tmp_path, **rates))
    straight = run(home, tmp_path / "straight", train_iters=4, **flags)
    run(home, tmp_path / "stopped", train_iters=2, **flags)
    assert bits(run(home, tmp_path / "stopped", train_iters=4, **flags)) == bits(straight)
    shard = "iter_0000004/shard-00000-of-00001.safetensors"
    assert (tmp_path / "straight" / shard).read_bytes() == (tmp_path / "stopped" / shard).read_bytes()
    if rates:
        changed = dropping(home, task, tmp_path / "other", reference=0.5, control=0.4)
        with pytest.raises(ConfigError, match=r"CFG-160.*condition_dropout.control of --mm-data was 0.3 and is 0.4"):
            run(home, tmp_path / "stopped", **{**flags, "train_iters": 6, "mm_data": changed})


def test_live_training_is_training_from_a_store(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is beside a clip goes with it to the process that has the encoders, and conditions are dropped as ever."""
    task, configs = "fun_control_ref", home / "configs" / "fun_control_ref"
    flags = files(home, task, train_iters=2, mm_data=dropping(home, task, tmp_path, reference=0.4, control=0.4))
    expected = run(home, tmp_path / "before", **flags)
    capsys.readouterr()
    named = {"mm-data": "data.json", "mm-model": "model_wan.json", "mm-tool": "tools.json"}
    translate_command.main(
        ["--", "mm", "extract", *(word for flag, name in named.items() for word in (f"--{flag}", str(configs / name)))]
    )
    extraction = yaml.safe_load(capsys.readouterr().out)
    extraction["output"]["path"] = str(tmp_path / "store")
    (tmp_path / "live.yaml").write_text(yaml.safe_dump(extraction))
    (tmp_path / "stores.txt").write_text(f"{tmp_path / 'store'}\n")
    values = json.loads((tmp_path / "feature_data.json").read_text())
    values["dataset_param"]["basic_parameters"]["data_path"] = str(tmp_path / "stores.txt")
    (tmp_path / "feature_data.json").write_text(json.dumps(values))
    found = run(home, tmp_path / "run", **{**flags, "live": [tmp_path / "live.yaml"]})
    assert bits(found) == bits(expected)


def batches(home: Path, task: str, rates: dict[str, float], caption: float = 0.0) -> Iterator[FeatureBatch]:
    model = load(PretrainModel, home / "configs" / task / "pretrain_model.json").predictor
    store = features_of(home, task)
    (store / "list.txt").write_text(f"{store}\n")
    dataset = open_features(FeatureSet(path=str(store / "list.txt")), model)
    found = feature_batches(
        dataset,
        BatchPlan(4, 4),
        text_len=model.text_len,
        seed=5,
        caption_dropout=caption,
        condition_dropout=ConditionDropout(**rates),
    )
    return islice(found, 8)


def test_conditions_are_dropped_each_by_itself(home: Path) -> None:
    """By the draws of the sample's key; of `condition` the channels of that part alone, and nothing of the rest."""
    rates = {"control": 0.4, "start": 0.3, "reference": 0.5, "image": 0.2}
    whole, seen = stored(features_of(home, "fun_control_ref")), set[tuple[bool, ...]]()
    for batch in batches(home, "fun_control_ref", rates, caption=0.3):
        for row, (name, draw) in enumerate(zip(batch["sample"], batch["draw"], strict=True)):
            kept = draw_kept(DropRates(text=0.3, **rates), 5, name, draw)
            expected, found = whole[name], {key: value[row] for key, value in batch["features"].items()}
            for begin, is_kept in ((0, kept.control), (16, kept.start)):
                part = expected["condition"][begin : begin + 16]
                assert torch.equal(found["condition"][begin : begin + 16], part if is_kept else torch.zeros_like(part))
            for key, is_kept in (("reference_latents", kept.reference), ("image_features", kept.image)):
                assert torch.equal(found[key], expected[key] if is_kept else torch.zeros_like(expected[key]))
            assert torch.equal(batch["latents"][row], expected["latents"])
            assert batch["without_caption"][row] is not kept.text
            seen.add((kept.text, kept.control, kept.start, kept.reference, kept.image))
    assert len(seen) > 12, seen


def test_a_condition_that_is_not_there_cannot_be_dropped(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"CFG-279.*reference.*fun_control control and image and start can be"):
        run(home, None, **flags_of(home, "fun_control", mm_data=dropping(home, "fun_control", tmp_path, reference=0.1)))
    with pytest.raises(ConfigError, match=r"CFG-279.*wan22_i2v nothing beside the caption can be dropped"):
        run(home, None, **flags_of(home, "wan22_i2v", mm_data=dropping(home, "wan22_i2v", tmp_path, image=0.1)))
    with pytest.raises(ConfigError, match=r"CFG-005.*control"):
        run(home, None, **flags_of(home, "fun_control", mm_data=dropping(home, "fun_control", tmp_path, control=1.5)))


STRIPS = {
    "fun_control": ["image features", "control", "start"],
    "fun_control_ref": ["image features", "control", "start", "reference latents"],
    "wan22_i2v": ["condition latents", "mask"],
    "vace": ["kept", "free", "mask"],
    "fun_inp": ["image features", "condition latents", "mask"],
    "fun_camera": ["image features", "start"],
}


@pytest.mark.parametrize("task", EVERY_DAY)
def test_what_a_task_is_given_is_drawn(home: Path, task: str) -> None:
    """In false colours, as `mm data look` does without a VAE: a strip for each part, of as many latent frames."""
    features = next(iter(stored(features_of(home, task)).values()))
    strips = list(feature_strips(FalseColourEye(), FEATURE_TASKS[task], features, 9))
    assert [strip.title for strip in strips] == STRIPS[task]
    of_clips = {"control", "start", "kept", "free", "mask", "condition latents"}
    assert all(len(strip.frames) == (3 if strip.title in of_clips else 1) for strip in strips)
