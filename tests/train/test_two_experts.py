"""Two experts in one run, beside a plain loop over two models, on layouts, resumed, and mixed up."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from loaded import load_into
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from training_runs import WEIGHTS, bits, metrics, run, words

from mm.checkpoint.expert_band import recorded_band
from mm.checkpoint.formats.folder import PEFT_FILE
from mm.checkpoint.store import read_manifest, read_tensor
from mm.checkpoint.weights import open_weights
from mm.cli import generate as generate_command
from mm.cli import train as train_command
from mm.config.base import load
from mm.config.model import WanConfig
from mm.data.dataset import open_features
from mm.data.loader import feature_batches
from mm.data.sampler import BatchPlan
from mm.dialects.mindspeed.files import load_train_data
from mm.dialects.mindspeed.pretrain_json import PretrainModel
from mm.dialects.mindspeed.training import features
from mm.diffusion.flow import FlowMatching
from mm.doctor.plain_loss import plain_loss
from mm.doctor.plot import expert_boundary
from mm.errors import MMError
from mm.lora.files import COMFYUI_FILE
from mm.rng import generator
from mm.wan.model import WanModel

BOUNDARY, SEED, STEPS, LR = 0.88, 1234, 8, 1e-3
HIGH, LOW = "transformer", "transformer_2"
BATCH = {"micro_batch_size": 2, "global_batch_size": 4, "adam_eps": 1e-2, "clip_grad": 0.3}
ROWS: dict[str, dict[str, Any]] = {
    "dp2, distopt, offload": {"use_distributed_optimizer": True, "offload_expert": True},
    "tp2, offload": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "offload_expert": True},
    "cp2": {"context_parallel_size": 2},
    "ring2": {"context_parallel_size": 2, "context_parallel_algo": "megatron_cp_algo"},
    "pp2": {"pipeline_model_parallel_size": 2},
    "zero2, offload": {"layerzero": True, "offload_expert": True},
    "pp2vp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "packed, pp2": {"pipeline_model_parallel_size": 2, "pack": 512, "micro_batch_size": 1},
}
EVERY_DAY = ["dp2, distopt, offload"]


@pytest.fixture(scope="module")
def low(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of another expert: those of the embedded default, moved a little."""
    folder = tmp_path_factory.mktemp("low") / "transformer"
    shutil.copytree(demo / WEIGHTS, folder)
    (file,) = folder.glob("*.safetensors")
    source = torch.Generator().manual_seed(1)
    moved = {name: value + 0.01 * torch.randn(value.shape, generator=source) for name, value in load_file(file).items()}
    save_file(moved, file)
    return folder


def experts(low: Path, **flags: Any) -> dict[str, Any]:
    return {"expert_boundary": BOUNDARY, "load_low_noise": low, **BATCH, **flags}


@pytest.fixture(scope="module")
def single(demo: Path, low: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one process."""
    folder = tmp_path_factory.mktemp("single") / "run"
    run(demo, folder, train_iters=STEPS, **experts(low))
    return folder


def weights(folder: Path, step: int = STEPS, kind: str = "model.") -> dict[str, torch.Tensor]:
    path = folder / f"iter_{step:07d}"
    manifest = read_manifest(path)
    return {key: read_tensor(path, manifest, key) for key in manifest.tensors if key.startswith(kind)}


def test_each_expert_is_a_plain_loop_over_the_steps_of_its_band(demo: Path, low: Path, single: Path) -> None:
    """Who is trained in a step is drawn with the chance of the noise levels from the boundary on."""
    file = load(PretrainModel, demo / "configs/pretrain_model.json")
    data, config = load_train_data(demo / "configs/feature_data.json"), file.predictor.wan()
    dropout = data.dataset_param.preprocess_parameters.cfg
    batches = feature_batches(
        open_features(features(data.dataset_param), config), BatchPlan(4, 2), text_len=config.text_len, seed=SEED,
        caption_dropout=dropout,
    )  # fmt: skip
    share = sum(level >= BOUNDARY for level in file.diffusion.levels()) / 1000
    assert share == pytest.approx(float(FlowMatching(file.diffusion).sigmas.ge(BOUNDARY).float().mean()))
    bands = {HIGH: {"band_from": BOUNDARY}, LOW: {"band_below": BOUNDARY}}
    flows = {name: FlowMatching(file.diffusion.model_copy(update=band)) for name, band in bands.items()}
    models = {name: loaded(folder, config) for name, folder in ((HIGH, demo / WEIGHTS), (LOW, low))}
    optimizers = {name: adamw(model) for name, model in models.items()}
    trained = []
    for step, row in enumerate(metrics(single)):
        draw = torch.rand((), generator=generator(SEED, "expert", step, 0), dtype=torch.float64)
        name = HIGH if float(draw) < share else LOW
        trained.append(name)
        samples = [one for _ in range(2) for one in alone(next(batches))]
        losses = [plain_loss(models[name], flows[name], one, SEED, torch.device("cpu")) / 4 for one in samples]
        torch.stack(losses).sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(models[name].parameters(), 0.3)
        optimizers[name].step()
        optimizers[name].zero_grad()
        assert row["loss"] == pytest.approx(float(sum(losses)), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
        assert all((timestep >= 1000 * BOUNDARY) == (name == HIGH) for timestep in row["timesteps"])
    assert {*trained} == {HIGH, LOW}, "both are trained in these steps"
    for name, model in models.items():
        found = weights(single / name)
        for key, value in model.named_parameters():
            torch.testing.assert_close(found[f"model.{key}"], value.detach(), rtol=0, atol=1e-6)
        scalars = read_manifest(single / name / f"iter_{STEPS:07d}").scalars
        assert (scalars["step"], scalars["adam_step"]) == (STEPS, trained.count(name))
    assert expert_boundary(single) == BOUNDARY
    assert recorded_band(single / HIGH / f"iter_{STEPS:07d}") == (BOUNDARY, math.inf)
    assert recorded_band(single / LOW / f"iter_{STEPS:07d}") == (0.0, BOUNDARY)


def loaded(folder: Path, config: WanConfig) -> WanModel:
    model = WanModel(config)
    load_into(model, open_weights(folder))
    return model


def alone(batch: Any) -> list[Any]:
    """The samples of a micro-batch, each alone."""
    cut = ("latents", "text", "sample", "draw")
    return [
        {**{key: batch[key][i : i + 1] for key in cut}, "features": {}, "noise": None}
        for i in range(len(batch["draw"]))
    ]


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    named = list(model.named_parameters())
    decayed = [p for n, p in named if p.dim() > 1 and not n.endswith(".bias")]
    others = [p for n, p in named if p.dim() == 1 or n.endswith(".bias")]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999), eps=1e-2)


@pytest.mark.parametrize(
    "row", [row if row in EVERY_DAY else pytest.param(row, marks=pytest.mark.nightly) for row in ROWS]
)
def test_layouts_train_what_one_process_trains(demo: Path, low: Path, single: Path, tmp_path: Path, row: str) -> None:
    layout = {**ROWS[row]}
    if "layerzero" in layout:
        layout["layerzero_config"] = tmp_path / "zero_config.yaml"
        layout["layerzero_config"].write_text(
            "zero3_size: 2\ntransformer_layers: [mm.wan.block.WanBlock]\nreduce_dtype: fp32\n"
        )
    run_ranks(2, train_command.main, words(demo, tmp_path, train_iters=STEPS, **{**experts(low), **layout}))
    require_same(tmp_path, single, 1e-5 if "tp2" in row or "ring" in row else 1e-6)


def require_same(many: Path, single: Path, tolerance: float) -> None:
    """Losses and weights of both experts, of runs on several processes and on one."""
    for ours, theirs in zip(metrics(many), metrics(single), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    for name in (HIGH, LOW):
        found, expected = weights(many / name, kind=""), weights(single / name, kind="")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if key.startswith("model."):
                assert float((found[key] - value).abs().max() / value.abs().max()) < 1e-5, key


def test_a_run_goes_on_bit_for_bit_also_when_it_was_killed_between_the_folders(
    demo: Path, low: Path, single: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The idle expert's state waits in host memory in one of the runs; both optimizers' states are equal at the end."""
    flags = experts(low, offload_expert=True, save_interval=2, keep_latest=1)
    run(demo, tmp_path / "run", train_iters=2, **flags)
    run(demo, tmp_path / "run", train_iters=4, **flags)
    assert [path.name for path in sorted((tmp_path / "run").glob("*/iter_*"))] == ["iter_0000004"] * 2
    shutil.copytree(tmp_path / "run" / LOW, tmp_path / "before")
    run(demo, tmp_path / "run", train_iters=6, **{**flags, "keep_latest": None})
    shutil.rmtree(tmp_path / "run" / LOW)
    (tmp_path / "before").rename(tmp_path / "run" / LOW)  # as if killed when only one of the two was written
    caplog.clear()
    rows = run(demo, tmp_path / "run", train_iters=STEPS, **flags)
    assert "hold different steps" in caplog.text and "steps 5 to 6 will run again" in caplog.text
    assert bits(rows) == bits(metrics(single))
    for name in (HIGH, LOW):
        found, expected = (weights(folder / name, kind="") for folder in (tmp_path / "run", single))
        assert found.keys() == expected.keys()
        assert any(key.startswith("optimizer.exp_avg_sq.") for key in found)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.nightly
def test_each_has_an_average_of_its_own_steps(demo: Path, low: Path, tmp_path: Path) -> None:
    """Of Lion's updates; on two processes, with the other expert in host memory, the same of both."""
    decay, one, two = 0.8, tmp_path / "one", tmp_path / "two"
    flags = {**experts(low), "adam_eps": None, "optimizer": "lion", "lr": 3e-4, "ema_decay": decay, "save_interval": 1}
    run(demo, one, train_iters=STEPS, **flags)
    is_high = [all(timestep >= 1000 * BOUNDARY for timestep in row["timesteps"]) for row in metrics(one)]
    assert {*is_high} == {True, False}
    for name in (HIGH, LOW):
        average = weights(one / name, 1, "ema.")
        for step in range(2, STEPS + 1):
            for key, value in weights(one / name, step).items():
                if is_high[step - 1] == (name == HIGH):
                    key = key.replace("model.", "ema.", 1)
                    average[key] = decay * average[key] + (1 - decay) * value
            for key, value in weights(one / name, step, "ema.").items():
                torch.testing.assert_close(value, average[key], rtol=1e-6, atol=1e-7)
    flags |= {"use_distributed_optimizer": True, "offload_expert": True, "save_interval": STEPS}
    run_ranks(2, train_command.main, words(demo, two, train_iters=STEPS, **flags))
    require_same(two, one, 1e-6)
    for name in (HIGH, LOW):
        for key, value in weights(one / name, kind="ema.").items():
            torch.testing.assert_close(weights(two / name, kind="ema.")[key], value, rtol=0, atol=1e-6)


@pytest.mark.nightly
def test_adapters_of_both_are_trained(demo: Path, low: Path, tmp_path: Path) -> None:
    """Two adapters out; on two processes the same, with the other expert in host memory."""
    lora = {
        "load": None, "load_low_noise": None, "load_base_model": demo / WEIGHTS, "load_base_model_low_noise": low,
        "lora_r": 4, "lora_alpha": 8.0, "lora_target_modules": ["q", "ffn.0"],
    }  # fmt: skip
    run(demo, tmp_path / "one", train_iters=STEPS, **{**experts(low), **lora})
    flags = {**experts(low, offload_expert=True, pipeline_model_parallel_size=2), **lora}
    run_ranks(2, train_command.main, words(demo, tmp_path / "two", train_iters=STEPS, **flags))
    require_same(tmp_path / "two", tmp_path / "one", 1e-6)
    for name, base in ((HIGH, demo / WEIGHTS), (LOW, low)):
        folder = tmp_path / "one" / name / f"iter_{STEPS:07d}"
        assert {PEFT_FILE, COMFYUI_FILE} <= {file.name for file in folder.iterdir()}
        assert read_manifest(folder).scalars["adapters"]["base"]["path"] == str(base)
        assert max(float(value.abs().max()) for key, value in weights(folder.parent).items() if "lora_B" in key) > 0
    model = json.loads((demo / "configs/inference_model.json").read_text())
    (of_high, of_low) = ([{"path": str(tmp_path / "one" / name)}] for name in (HIGH, LOW))
    model |= {"lora": of_low, "low_noise": {"from_pretrained": str(low), "boundary": BOUNDARY, "lora": of_high}}
    (tmp_path / "swapped.json").write_text(json.dumps(model))
    flags = ["--mm-model", str(tmp_path / "swapped.json"), "--load", str(demo / WEIGHTS), "--device", "cpu"]
    with pytest.raises(MMError, match=r"CFG-295: .*one/transformer_2/.*below 0.88; .*one/transformer/.*from 0.88"):
        generate_command.main([*flags, "--prompt", str(demo / "prompts.txt"), "--save-path", str(tmp_path / "clips")])


MIXED: list[tuple[str, dict[str, Any]]] = [
    ("CFG-293", {"load": "HIGH", "load_low_noise": "HIGH"}),
    ("CFG-293", {"load": "LOW", "load_low_noise": "HIGH"}),
    ("CKPT-132", {"load": "HIGH", "load_low_noise": "OLD"}),
    ("CKPT-133", {"save": "SINGLE", "expert_boundary": None, "load_low_noise": None}),
    ("CFG-160", {"save": "SINGLE", "expert_steps": 2}),
    ("CFG-160", {"save": "SINGLE", "expert_boundary": 0.9}),
]


@pytest.mark.parametrize(("error", "flags"), MIXED)
def test_mixed_up_experts_are_named(
    demo: Path, low: Path, single: Path, tmp_path: Path, error: str, flags: dict[str, Any]
) -> None:
    """Of folders that a run wrote; nothing is saved over them."""
    places = {"HIGH": single / HIGH, "LOW": single / LOW, "SINGLE": single, "OLD": low}
    given = {name: places.get(value, value) if isinstance(value, str) else value for name, value in flags.items()}
    save = given.pop("save", tmp_path)
    with pytest.raises(MMError, match=error):
        run(demo, save, train_iters=STEPS + 2, **{**experts(low), **given})
    assert not list(tmp_path.glob("*/iter_*"))


def test_a_folder_without_its_partner_is_told(demo: Path, low: Path, single: Path, tmp_path: Path) -> None:
    shutil.copytree(single / HIGH, tmp_path / HIGH)
    with pytest.raises(MMError, match=f"CKPT-131: .*transformer has {STEPS}; .*transformer_2 has none"):
        run(demo, tmp_path, train_iters=STEPS + 2, **experts(low))
