"""Speed control from a column of the annotations to clips: features, both kinds of training, generation, conversion."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from extracted import extract
from orders import sample_at
from safetensors.torch import load_file, save_file
from store_content import listed as rows_of
from store_content import stored
from torch.nn import functional as F
from training_runs import run

import mm.generate.run
from mm.checkpoint.weights import open_weights
from mm.cli import convert as convert_command
from mm.cli import extract as extract_command
from mm.cli import generate as generate_command
from mm.config.base import load
from mm.config.flags import as_words
from mm.dialects.mindspeed.pretrain_json import PretrainModel
from mm.diffusion.flow import FlowMatching
from mm.errors import ConfigError, DataError
from mm.wan.model import WanModel

NAME = "motion_bucket_id"
LAST = "motion_controller.linear.4.weight"
BATCH = {"micro_batch_size": 2, "global_batch_size": 4, "train_iters": 2}


@pytest.fixture(scope="module")
def configs(demo: Path) -> Path:
    """Configuration files of the task, its features extracted."""
    folder = demo / "configs" / "speedcontrol"
    extract(folder)
    return folder


@pytest.fixture(scope="module")
def weights(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a controller that does something; a new one does nothing."""
    folder = tmp_path_factory.mktemp("weights") / "transformer"
    shutil.copytree(demo / "weights" / "Wan2.1-SpeedControl-Tiny-Diffusers" / "transformer", folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    assert not state[LAST].any()
    random = torch.Generator().manual_seed(0)
    save_file(state | {LAST: 0.1 * torch.randn(state[LAST].shape, generator=random)}, file, {"format": "pt"})
    return folder


def features(configs: Path) -> list[tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """Rows of the store with their tensors."""
    store = configs.parents[1] / "features_speedcontrol"
    tensors = stored(store)
    return [(row, tensors[row["sample"]]) for row in rows_of(store)]


def files(configs: Path, **flags: Any) -> dict[str, Any]:
    return {"mm_data": configs / "feature_data.json", "mm_model": configs / "pretrain_model.json", **BATCH, **flags}


def test_the_store_holds_the_column(configs: Path) -> None:
    listed = json.loads((configs.parents[1] / "dataset" / "data_speedcontrol.json").read_text())
    expected = {row["path"]: row[NAME] for row in listed}
    assert len(set(expected.values())) == 5
    found = features(configs)
    assert {row["path"]: float(tensors[NAME]) for row, tensors in found} == expected
    assert all(row["task"] == "speedcontrol" and tensors[NAME].shape == () for row, tensors in found)


def test_another_number_makes_that_sample_anew(configs: Path, tmp_path: Path) -> None:
    home = configs.parents[1]
    listed = json.loads((home / "dataset" / "data_speedcontrol.json").read_text())[:3]
    data = json.loads((configs / "data.json").read_text())
    tools = json.loads((configs / "tools.json").read_text())
    data["dataset_param"]["basic_parameters"]["data_path"] = str(tmp_path / "data.txt")
    tools["sorafeature"]["save_path"] = str(tmp_path / "store")
    (tmp_path / "data.txt").write_text(f"{home / 'dataset'},{tmp_path / 'list.json'}\n")
    (tmp_path / "data.json").write_text(json.dumps(data))
    (tmp_path / "tools.json").write_text(json.dumps(tools))

    def extracted() -> dict[str, int]:
        (tmp_path / "list.json").write_text(json.dumps(listed))
        extract_command.main(["--mm-data", str(tmp_path / "data.json"), "--mm-model", str(configs / "model_wan.json"),
                              "--mm-tool", str(tmp_path / "tools.json")])  # fmt: skip
        return {path.name: (path / "body.bin").stat().st_mtime_ns for path in (tmp_path / "store/shards").iterdir()}

    before = extracted()
    listed[1][NAME] = 77
    after = extracted()
    (changed,) = (name for name in after if after[name] != before[name])
    row = rows_of(tmp_path / "store")[int(changed)]  # a shard a row
    assert row["sample"] == listed[1]["path"] and float(stored(tmp_path / "store")[row["sample"]][NAME]) == 77
    assert row["video"].endswith(f"#{NAME}=77.0")
    del listed[0][NAME]
    with pytest.raises(DataError, match=f"DATA-061.*row 1 lacks {NAME}; the task takes a number from 0 to 100"):
        extracted()


def test_the_first_loss_is_that_of_the_model_with_each_samples_number(
    configs: Path, weights: Path, tmp_path: Path
) -> None:
    demo = configs.parents[1]
    row = run(demo, tmp_path, **files(configs, load=weights, train_iters=1))[0]
    section, samples = load(PretrainModel, configs / "pretrain_model.json"), features(configs)
    model, flow, losses = WanModel.from_pretrained(weights), FlowMatching(section.diffusion), []
    for position in range(4):
        listed, tensors = samples[sample_at(position, len(samples), seed=1234)[0]]
        name, clean = [listed["sample"]], tensors["latents"][None]
        sigma, timestep, _ = flow.draw_timesteps(1234, name, [0])
        noise = flow.draw_noise(1234, name, [0], clean.shape[1:])
        noisy = (1 - sigma) * clean + sigma * noise
        text = F.pad(tensors["prompt"], (0, 0, 0, section.predictor.text_len - len(tensors["prompt"])))[None]
        with torch.no_grad():
            velocity = model.velocity(noisy, timestep, text, motion_bucket_id=tensors[NAME][None])
        losses.append(float((velocity - (noise - clean)).square().mean()))
    assert row["loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)


def test_lora_leaves_the_controller_as_it_is_and_is_merged(configs: Path, weights: Path, tmp_path: Path) -> None:
    demo, adapters = configs.parents[1], {"lora_r": 4, "lora_alpha": 4, "lora_target_modules": ["q", "v"]}
    rows = run(demo, tmp_path / "lora", **files(configs, load=None, load_base_model=weights, **adapters))
    assert len(rows) == 2
    convert_command.main(["--mode", "merge_lora", "--to", "native", "--source_path", str(tmp_path / "lora"),
                          "--base_path", str(weights), "--target_path", str(tmp_path / "merged")])  # fmt: skip
    merged, base = open_weights(tmp_path / "merged"), open_weights(weights)
    assert merged.config() == base.config() and merged.shapes() == base.shapes()
    changed = {name for name in base.shapes() if not torch.equal(merged.read(name), base.read(name))}
    assert changed and all(name.endswith((".q.weight", ".v.weight")) for name in changed)


@pytest.fixture(scope="module")
def trained(configs: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full run of two steps."""
    save = tmp_path_factory.mktemp("trained")
    run(configs.parents[1], save, **files(configs, load=weights))
    return save


def test_full_training_trains_the_controller_and_every_format_holds_it(
    trained: Path, weights: Path, tmp_path: Path
) -> None:
    before, after = open_weights(weights), open_weights(trained)
    own = [name for name in before.shapes() if name.startswith("motion_controller.")]
    assert len(own) == 6 and not any(torch.equal(before.read(name), after.read(name)) for name in own)
    for form in ("hf", "native", "mm"):
        convert_command.main(["--mode", f"convert_to_{form}", "--source-path", str(trained),
                              "--target-path", str(tmp_path / form)])  # fmt: skip
        found = open_weights(tmp_path / form)
        assert found.config().differing_fields(after.config()) == [] and found.shapes() == after.shapes()
        assert found.config().task.name == "speedcontrol"
        assert all(torch.equal(found.read(name), after.read(name)) for name in after.shapes())


class Generation:
    """Two prompts with a number each."""

    def __init__(self, configs: Path, weights: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.configs, self.weights, self.folder = configs, weights, folder
        self.frames: dict[str, Any] = {}

        def keep(path: Path, clip: torch.Tensor, *rest: object) -> None:
            self.frames[path.name] = clip

        monkeypatch.setattr(mm.generate.run, "write_clip", keep)
        (folder / "prompts.txt").write_text("a red circle moving left\na red circle moving right\n")

    def __call__(self, numbers: str | None) -> dict[str, Any]:
        more = []
        if numbers is not None:
            (self.folder / "numbers.txt").write_text(numbers)
            more = ["--columns", f"{NAME}={self.folder / 'numbers.txt'}"]
        self.frames.clear()
        words = {
            "mm_model": self.configs / "inference_model.json", "load": self.weights,
            "prompt": self.folder / "prompts.txt", "num_inference_steps": 2, "save_path": self.folder / "clips",
            "device": "cpu", "no_progress_bar": True,
        }  # fmt: skip
        generate_command.main([*as_words(words), *more])
        return dict(self.frames)


@pytest.fixture
def generate(configs: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generation:
    return Generation(configs, weights, tmp_path, monkeypatch)


def test_each_row_is_made_with_its_own_number(generate: Generation) -> None:
    slow, other = generate("5\n5\n"), generate("5\n90.5\n")
    assert torch.equal(slow["video_0000.mp4"], other["video_0000.mp4"])
    assert not torch.equal(slow["video_0001.mp4"], other["video_0001.mp4"])


@pytest.mark.parametrize(
    ("numbers", "id", "words"),
    [
        ("5\n", "DATA-084", f"Write one {NAME} for each prompt"),
        ("101\nfast\n", "DATA-085", f'"101" where {NAME} should be'),
        ("101\nfast\n", "DATA-085", f'"fast" where {NAME} should be'),
    ],
)
def test_numbers_that_cannot_be_used(generate: Generation, numbers: str, id: str, words: str) -> None:
    with pytest.raises(DataError) as caught:
        generate(numbers)
    assert id in str(caught.value) and words in str(caught.value)


def test_a_model_gets_the_columns_of_its_task(generate: Generation, configs: Path, tmp_path: Path) -> None:
    values = json.loads((configs / "inference_model.json").read_text())
    del values["columns"]
    generate.configs = tmp_path
    (tmp_path / "inference_model.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=f"CFG-120.*speedcontrol, which needs columns.{NAME}"):
        generate(None)
    shutil.copy(configs.parent / "inference_model.json", tmp_path)
    with pytest.raises(ConfigError, match=f"CFG-120.*t2v.*takes no columns.{NAME}.*a model of speedcontrol"):
        generate("5\n90\n")
