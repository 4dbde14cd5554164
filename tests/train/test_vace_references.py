"""Training of VACE on clips with and without references: what the model is given, packs, layouts, live, pages."""

import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from extracted import extract
from PIL import Image
from ranks import run_ranks
from store_content import listed, stored
from torch.nn import functional as F
from training_runs import bits, metrics, run, words

from mm.cli import data as data_command
from mm.cli import train as train_command
from mm.cli import translate as translate_command
from mm.config.base import load
from mm.config.run.data import FeatureSet
from mm.data.dataset import open_features
from mm.data.loader import feature_batches
from mm.data.sampler import BatchPlan
from mm.demo.components import MODEL_NAMES
from mm.dialects.mindspeed.pretrain_json import PretrainModel
from mm.diffusion.flow import FlowMatching
from mm.wan.model import WanModel

SEED, STEPS = 1234, 3
BATCH = {"micro_batch_size": 2, "global_batch_size": 4}
BUDGET = 200
"""Tokens of a packed sequence: clips of 48, 64 and 80 tokens, with none, one and two references."""
PIPELINE = {
    "pipeline_model_parallel_size": 2,
    "use_multiparameter_pipeline_model_parallel": True,
    "optimization_level": 2,
    "variable_seq_lengths": True,
}
VAE = "{}/weights/Wan2.1-T2V-Tiny-Diffusers/vae"
LAYOUTS: dict[str, dict[str, Any]] = {
    "cp2": {"context_parallel_size": 2},
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": PIPELINE,
    "dp2": {"use_distributed_optimizer": True, "overlap_grad_reduce": True},
    "packed-cp2": {"context_parallel_size": 2, "micro_batch_size": 1, "pack": BUDGET},
    "packed-pp2": {**PIPELINE, "micro_batch_size": 1, "pack": BUDGET},
}


@pytest.fixture(scope="module")
def configs(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configurations of twelve clips, of which every third has one reference and every third two, extracted."""
    folder = Path(shutil.copytree(demo / "configs" / "vace", tmp_path_factory.mktemp("references") / "configs"))
    source = torch.Generator().manual_seed(0)
    for name, size in {"upright": (90, 40), "wide": (30, 100)}.items():
        pixels = torch.randint(0, 256, (*size, 3), generator=source).to(torch.uint8).numpy()
        Image.fromarray(pixels).save(demo / "dataset" / f"{name}.png")
    rows = json.loads((demo / "dataset" / "data_vace.json").read_text())[:12]
    for number, row in enumerate(rows):
        row["vace_reference"] = ["upright.png", "wide.png"][: number % 3]
    (demo / "dataset" / "data_references.json").write_text(json.dumps(rows))
    (folder / "data.txt").write_text(f"{demo / 'dataset'},data_references.json\n")
    for path in filter(Path.is_file, folder.iterdir()):
        moved = path.read_text().replace(str(demo / "configs" / "vace"), str(folder))
        path.write_text(moved.replace(str(demo / "features_vace"), str(folder / "features")))
    extract(folder)
    return folder


def flags_of(demo: Path, configs: Path, **flags: Any) -> dict[str, Any]:
    return {
        "mm_data": configs / "feature_data.json",
        "mm_model": configs / "pretrain_model.json",
        "load": demo / "weights" / MODEL_NAMES["vace"] / "transformer",
        **BATCH,
        **flags,
    }


def test_references_are_noised_and_learned_as_the_clip_is(demo: Path, configs: Path, tmp_path: Path) -> None:
    """By hand: the files of the store into the model, one loss over all latent frames of a sample, in front or not.

    A micro-batch is of samples with as many references; packed, the step is the same.
    """
    section = load(PretrainModel, configs / "pretrain_model.json")
    flags = flags_of(demo, configs, train_iters=1)
    model, flow = WanModel.from_pretrained(flags["load"]), FlowMatching(section.diffusion)
    dataset = open_features(FeatureSet(path=str(configs / "feature_data.txt")), model.config)
    loader = feature_batches(dataset, BatchPlan(4, 2), text_len=section.predictor.text_len, seed=SEED)
    batches = [(batch["sample"], tuple(batch["latents"].shape)) for batch in islice(loader, 2)]
    tensors, losses = stored(configs / "features"), list[float]()
    counts = {row["sample"]: int(row["path"][7:11]) % 3 for row in listed(configs / "features")}
    for names, shape in batches:
        assert {shape} == {(2, 16, 3 + counts[name], 8, 8) for name in names}
        for name in names:
            held = tensors[name]
            assert torch.equal(held["latents"][:, : counts[name]], held["vace_context"][:16, : counts[name]])
            clean = held["latents"][None]
            sigma, timestep, _ = flow.draw_timesteps(SEED, [name], [0])
            noise = flow.draw_noise(SEED, [name], [0], clean.shape[1:])
            text = F.pad(held["prompt"], (0, 0, 0, section.predictor.text_len - len(held["prompt"])))[None]
            with torch.no_grad():
                velocity = model.velocity(
                    (1 - sigma) * clean + sigma * noise, timestep, text, vace_context=held["vace_context"][None]
                )
            losses.append(float((velocity - (noise - clean)).square().mean()))
    assert len({shape for _, shape in batches}) == 2, "one number of references proves little"
    assert run(demo, tmp_path / "run", **flags)[0]["loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)


def train_one_after_the_other(commands: list[list[str]]) -> None:
    for command in commands:
        train_command.main(command)


@pytest.mark.nightly
def test_every_layout_equals_one_process(demo: Path, configs: Path, tmp_path: Path) -> None:
    single = run(demo, tmp_path / "single", **flags_of(demo, configs, train_iters=STEPS))
    alone = run(demo, tmp_path / "alone", **flags_of(demo, configs, train_iters=STEPS, micro_batch_size=1))
    packed = run(
        demo, tmp_path / "packed", **flags_of(demo, configs, train_iters=STEPS, micro_batch_size=1, pack=BUDGET)
    )
    commands = [
        words(demo, tmp_path / name, **flags_of(demo, configs, train_iters=STEPS, **LAYOUTS[name])) for name in LAYOUTS
    ]
    run_ranks(2, train_one_after_the_other, commands, timeout_s=400)
    for name, found in {"packed": packed, **{name: metrics(tmp_path / name) for name in LAYOUTS}}.items():
        expected = alone if name.startswith("packed") else single
        assert len(found) == STEPS
        for ours, theirs in zip(found, expected, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5), name
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), name


@pytest.mark.nightly
def test_four_steps_are_two_and_two(demo: Path, configs: Path, tmp_path: Path) -> None:
    flags = flags_of(demo, configs, lr_decay_iters=10)
    straight = run(demo, tmp_path / "straight", train_iters=4, **flags)
    run(demo, tmp_path / "stopped", train_iters=2, **flags)
    assert bits(run(demo, tmp_path / "stopped", train_iters=4, **flags)) == bits(straight)


@pytest.mark.nightly
def test_live_training_is_training_from_a_store(
    demo: Path, configs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The index of clips that are not encoded yet knows their references, or the order would be another."""
    flags = flags_of(demo, configs, train_iters=STEPS)
    expected = run(demo, tmp_path / "before", **flags)
    capsys.readouterr()
    named = {"mm-data": "data.json", "mm-model": "model_wan.json", "mm-tool": "tools.json"}
    translate_command.main(
        ["--", "mm", "extract", *(word for flag, name in named.items() for word in (f"--{flag}", str(configs / name)))]
    )
    extraction = yaml.safe_load(capsys.readouterr().out)
    extraction["output"]["path"] = str(tmp_path / "store")
    (tmp_path / "live.yaml").write_text(yaml.safe_dump(extraction))
    (tmp_path / "stores.txt").write_text(f"{tmp_path / 'store'}\n")
    values = json.loads((configs / "feature_data.json").read_text())
    values["dataset_param"]["basic_parameters"]["data_path"] = str(tmp_path / "stores.txt")
    (tmp_path / "feature_data.json").write_text(json.dumps(values))
    changed = {**flags, "mm_data": tmp_path / "feature_data.json", "live": [tmp_path / "live.yaml"]}
    assert bits(run(demo, tmp_path / "run", **changed)) == bits(expected)


@pytest.mark.parametrize(
    ("vae", "last"), [([], "latent frame 2"), pytest.param(["--vae", VAE], "frame 8", marks=pytest.mark.nightly)]
)
def test_a_page_shows_the_references(demo: Path, configs: Path, tmp_path: Path, vae: list[str], last: str) -> None:
    """Each by itself, decoded as it was encoded; the clip and its context are without them."""
    out, words = tmp_path / "look.html", [word.format(demo) for word in vae]
    data_command.main(["look", str(configs / "features"), *words, "--batches", "4", "--out", str(out)])
    articles = [part.partition("</article>")[0] for part in out.read_text().split('data-sample="')[1:]]
    counts = {row["sample"]: int(row["path"][7:11]) % 3 for row in listed(configs / "features")}
    shown = [counts[article.partition('"')[0]] for article in articles]
    assert len(set(shown)) > 1, "one number of references proves little"
    for article, count in zip(articles, shown, strict=True):
        assert [f"references, image {number}" in article for number in (1, 2, 3)] == [n <= count for n in (1, 2, 3)]
        assert all(f"{title}, {last}" in article for title in ("clip", "kept", "free"))
        assert "9 × 64 × 64" in article
