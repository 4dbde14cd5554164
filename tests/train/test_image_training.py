"""Training of i2v and flf2v models on extracted features: what the model is given, layouts, resume, sizes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from orders import sample_at
from ranks import run_ranks
from store_content import listed, stored
from torch.nn import functional as F
from training_runs import bits, metrics, run, words

from mm.cli import extract as extract_command
from mm.cli import train as train_command
from mm.config.base import load
from mm.demo.components import MODEL_NAMES
from mm.dialects.mindspeed.pretrain_json import PretrainModel
from mm.diffusion.flow import FlowMatching

TASKS = ["i2v", "flf2v"]
BATCH = {"micro_batch_size": 2, "global_batch_size": 4}
LAYOUTS: dict[str, dict[str, Any]] = {
    "cp2": {"context_parallel_size": 2},
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "use_distributed_optimizer": True},
    "pp2": {
        "pipeline_model_parallel_size": 2, "use_multiparameter_pipeline_model_parallel": True, "optimization_level": 2,
    },
    "layer-zero": {"layerzero": True, "context_parallel_size": 2},
}  # fmt: skip


def files(demo: Path, task: str, **flags: Any) -> dict[str, Any]:
    """Flags that train the task's tiny model on its features."""
    return {
        "mm_data": demo / "configs" / task / "feature_data.json",
        "mm_model": demo / "configs" / task / "pretrain_model.json",
        "load": demo / "weights" / MODEL_NAMES[task] / "transformer",
        **BATCH,
        **flags,
    }


def train_one_after_the_other(commands: list[list[str]]) -> None:
    for command in commands:
        train_command.main(command)


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_the_first_loss_is_that_of_diffusers(demo_of_images: Path, tmp_path: Path, task: str) -> None:
    """The model of diffusers on the files of the store: what is put in front of what, and where."""
    row = run(demo_of_images, tmp_path, train_iters=1, **files(demo_of_images, task))[0]
    model = load(PretrainModel, demo_of_images / "configs" / task / "pretrain_model.json")
    transformer = WanTransformer3DModel.from_pretrained(
        demo_of_images / "weights" / MODEL_NAMES[task] / "transformer", local_files_only=True
    )
    store = demo_of_images / f"features_{task}"
    rows, tensors = listed(store), stored(store)
    flow = FlowMatching(model.diffusion)
    losses = []
    for position in range(4):
        sample = rows[sample_at(position, len(rows), seed=1234)[0]]["sample"]
        feature = tensors[sample]
        clean = feature["latents"][None]
        sigma, timestep, _ = flow.draw_timesteps(1234, [sample], [0])
        noise = flow.draw_noise(1234, [sample], [0], clean.shape[1:])
        noisy = (1 - sigma) * clean + sigma * noise
        text = F.pad(feature["prompt"], (0, 0, 0, 512 - len(feature["prompt"])))[None]
        with torch.no_grad():
            velocity = transformer(
                torch.cat((noisy, feature["condition"][None]), dim=1),
                timestep,
                text,
                encoder_hidden_states_image=feature["image_features"].unflatten(0, (-1, 257)),
            ).sample
        losses.append(float((velocity - (noise - clean)).square().mean()))
    assert row["loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert model.diffusion.loss_weighting == "none"


@pytest.mark.nightly
@pytest.mark.parametrize("task", ["i2v", "flf2v"])
def test_every_layout_equals_one_process(demo_of_images: Path, tmp_path: Path, task: str) -> None:
    zero = tmp_path / "zero_config.yaml"
    zero.write_text("zero3_size: 2\nreduce_dtype: fp32\n")
    flags = files(demo_of_images, task, train_iters=3)
    commands = [
        words(
            demo_of_images, tmp_path / name, **flags, **layout, layerzero_config=zero if "layerzero" in layout else None
        )
        for name, layout in LAYOUTS.items()
    ]
    run_ranks(2, train_one_after_the_other, commands, timeout_s=240)
    single = run(demo_of_images, tmp_path / "single", **flags)
    for name in LAYOUTS:
        same(metrics(tmp_path / name), single)
    assert single[0]["loss"] > 1.5 and len({row["loss_hex"] for row in single}) == 3


@pytest.mark.parametrize("task", [pytest.param("i2v", marks=pytest.mark.nightly), "flf2v"])
def test_four_steps_are_two_and_two(demo_of_images: Path, tmp_path: Path, task: str) -> None:
    flags = files(demo_of_images, task, lr_decay_iters=10)
    straight = run(demo_of_images, tmp_path / "straight", train_iters=4, **flags)
    run(demo_of_images, tmp_path / "stopped", train_iters=2, **flags)
    assert bits(run(demo_of_images, tmp_path / "stopped", train_iters=4, **flags)) == bits(straight)
    shard = "iter_0000004/shard-00000-of-00001.safetensors"
    assert (tmp_path / "straight" / shard).read_bytes() == (tmp_path / "stopped" / shard).read_bytes()


MIXED: dict[str, dict[str, Any]] = {"pp2": {**LAYOUTS["pp2"], "variable_seq_lengths": True}, "dp2": {}}


@pytest.mark.nightly
def test_clips_of_several_lengths_on_two_processes(demo_of_images: Path, tmp_path: Path) -> None:
    """Conditions have the size of their own sample; what crosses stages has that of the step's largest.

    Micro-batches of two are of one length, and replicas take what is dealt to them by cost.
    """
    configs = demo_of_images / "configs" / "flf2v"
    rows = json.loads((demo_of_images / "dataset" / "data.json").read_text())[:4]
    for row in rows[:2]:
        row["cut"] = [2, 7]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = json.loads((configs / "data.json").read_text())
    folder = str(demo_of_images / "dataset")
    data["dataset_param"]["basic_parameters"] = {"data_path": str(tmp_path / "rows.json"), "data_folder": folder}
    data["dataset_param"]["preprocess_parameters"]["min_num_frames"] = 5
    (tmp_path / "data.json").write_text(json.dumps(data))
    tools = {"task": "flf2v", "sorafeature": {"save_path": str(tmp_path / "store")}}
    (tmp_path / "tools.json").write_text(json.dumps(tools))
    extract_command.main(
        ["--mm-data", str(tmp_path / "data.json"), "--mm-model", str(configs / "model_wan.json"),
         "--mm-tool", str(tmp_path / "tools.json")]
    )  # fmt: skip
    (tmp_path / "stores.txt").write_text(f"{tmp_path / 'store'}\n")
    features = json.loads((configs / "feature_data.json").read_text())
    features["dataset_param"]["basic_parameters"]["data_path"] = str(tmp_path / "stores.txt")
    (tmp_path / "feature_data.json").write_text(json.dumps(features))
    flags = files(demo_of_images, "flf2v", train_iters=2)
    flags |= {"mm_data": tmp_path / "feature_data.json", "global_batch_size": 4}
    runs = [(size, name) for size in (1, 2) for name in ("pp2", "dp2")]
    run_ranks(
        2,
        train_one_after_the_other,
        [
            words(demo_of_images, tmp_path / f"{name}-{size}", **{**flags, **MIXED[name], "micro_batch_size": size})
            for size, name in runs
        ],
        timeout_s=240,
    )
    for size, name in runs:
        alone = tmp_path / f"single-{size}"
        single = metrics(alone) if alone.exists() else run(demo_of_images, alone, **{**flags, "micro_batch_size": size})
        same(metrics(tmp_path / f"{name}-{size}"), single)
    shapes = {tuple(row["latent_shape"]) for row in listed(tmp_path / "store")}
    assert shapes == {(16, 3, 8, 8), (16, 2, 8, 8)}
