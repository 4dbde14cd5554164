"""`--ema-decay`: the average is the formula applied to each step's masters, in every layout; what is made of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from ranks import run_ranks
from safetensors.torch import load_file
from test_numerics import with_bad_sample
from training_runs import WEIGHTS, bits, run, words

from mm.checkpoint.formats.folder import PEFT_FILE
from mm.checkpoint.store import read_manifest, read_tensor
from mm.checkpoint.weights import open_weights
from mm.cli import convert as convert_command
from mm.cli import doctor as doctor_command
from mm.cli import train as train_command
from mm.errors import CheckpointError, ConfigError, MMError

DECAY, STEPS = 0.8, 4
FLAGS = {"ema_decay": DECAY, "save_interval": 1, "train_iters": STEPS}
LORA = {"load": None, "lora_r": 4, "lora_alpha": 8.0, "lora_target_modules": ["q", "ffn.0"]}
PIPELINE = "pipeline_model_parallel_size"
ROWS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "dp2-distopt": {"use_distributed_optimizer": True},
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {PIPELINE: 2, "async_save": True},
    "zero2": {"layerzero": True},
    "lora-pp2": {**LORA, PIPELINE: 2},
    "lora-distopt": {**LORA, "use_distributed_optimizer": True},
}
CHANGES = [("pp2", "zero2"), ("tp2", "dp2-distopt"), ("zero2", "tp2"), ("dp2-distopt", "pp2")]


@pytest.fixture(scope="module")
def averaged(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with an average, in one process."""
    folder = tmp_path_factory.mktemp("averaged") / "run"
    run(demo, folder, **FLAGS)
    return folder


@pytest.fixture(scope="module")
def every_layout(demo: Path, averaged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of such a run by each row and change, on two processes; adapters of a base whose head is not zero."""
    folder = tmp_path_factory.mktemp("layouts")
    (folder / "zero.yaml").write_text("zero3_size: 2\n")
    commands, rows = [], {name: (row, None) for name, row in ROWS.items()}
    rows |= {f"{before} to {after}": (ROWS[after], f"{folder / before}/iter_0000002") for before, after in CHANGES}
    for name, (row, before) in rows.items():
        more = {**FLAGS, "micro_batch_size": 2, "global_batch_size": 4, **row}
        if before is not None:
            more["load"] = folder / f"before {name}"
            more["load"].mkdir()
            (more["load"] / "iter_0000002").symlink_to(before)
        more |= {"layerzero_config": folder / "zero.yaml"} if "layerzero" in row else {}
        more |= {"load_base_model": averaged} if "lora_r" in row else {}
        commands.append(words(demo, folder / name, **more))
    run_ranks(2, train_one_after_the_other, commands, timeout_s=300)
    return folder


def train_one_after_the_other(commands: list[list[str]]) -> None:
    for command in commands:
        train_command.main(command)


def tensors(folder: Path, step: int, prefix: str) -> dict[str, torch.Tensor]:
    path = folder / f"iter_{step:07d}"
    manifest = read_manifest(path)
    keys = [key for key in manifest.tensors if key.startswith(prefix)]
    return {key.removeprefix(prefix): read_tensor(path, manifest, key) for key in keys}


def expected(start: dict[str, torch.Tensor], folder: Path, steps: range) -> dict[str, torch.Tensor]:
    """D^n start + (1 - D) sum of D^(n-i) master_i, in fp64."""
    found = {name: value.double() * DECAY ** len(steps) for name, value in start.items()}
    for step in steps:
        for name, master in tensors(folder, step, "model.").items():
            found[name] += (1 - DECAY) * DECAY ** (steps[-1] - step) * master.double()
    return found


def require_close(ours: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == wanted.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value.double(), wanted[name].double(), rtol=1e-6, atol=1e-8, msg=name)


def start_of(demo: Path) -> dict[str, torch.Tensor]:
    source = open_weights(demo / WEIGHTS)
    return {name: source.read(name) for name in source.shapes()}


@pytest.mark.parametrize("flags", [{}, {"bf16": True, "use_distributed_optimizer": True}], ids=["fp32", "bf16"])
def test_the_average_is_the_formula(demo: Path, tmp_path: Path, model_json: Path, flags: dict[str, Any]) -> None:
    run(demo, tmp_path, **FLAGS, mm_model=model_json, **flags)
    ours = tensors(tmp_path, STEPS, "ema.")
    require_close(ours, expected(start_of(demo), tmp_path, range(1, STEPS + 1)))
    trained = tensors(tmp_path, STEPS, "model.")
    assert sum(not torch.equal(value, trained[name]) for name, value in ours.items()) > len(ours) / 2


@pytest.mark.parametrize("row", ROWS)
def test_in_every_layout(every_layout: Path, row: str) -> None:
    """From the first saved average on, because a LoRA run's first adapters are in no file."""
    folder = every_layout / row
    wanted = expected(tensors(folder, 1, "ema."), folder, range(2, STEPS + 1))
    require_close(tensors(folder, STEPS, "ema."), wanted)
    assert tensors(folder, STEPS, "ema.").keys() == tensors(folder, STEPS, "model.").keys()


def test_training_is_the_same_with_it(demo: Path, averaged: Path, tmp_path: Path) -> None:
    from training_runs import metrics

    assert bits(run(demo, tmp_path, train_iters=STEPS)) == bits(metrics(averaged))


def test_a_resumed_average_is_the_same_bit_for_bit(demo: Path, averaged: Path, tmp_path: Path) -> None:
    run(demo, tmp_path, **{**FLAGS, "train_iters": 2})
    run(demo, tmp_path, **FLAGS)
    shard = Path(f"iter_{STEPS:07d}") / "shard-00000-of-00001.safetensors"
    assert (tmp_path / shard).read_bytes() == (averaged / shard).read_bytes()


@pytest.mark.parametrize("row", ["zero2", "pp2", "dp2-distopt", "tp2"])
def test_one_process_goes_on_with_the_average_of_two(demo: Path, every_layout: Path, tmp_path: Path, row: str) -> None:
    """What four steps on two processes gave, from their second step on."""
    theirs = every_layout / row
    run(demo, tmp_path, load=theirs_at(theirs, 2, tmp_path / "copy"), **{**FLAGS, "save_interval": None})
    ours, wanted = tensors(tmp_path, STEPS, "ema."), tensors(theirs, STEPS, "ema.")
    for name, value in ours.items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_two_processes_go_on_in_another_layout(every_layout: Path, before: str, after: str) -> None:
    ours, wanted = (
        tensors(every_layout / f"{before} to {after}", STEPS, "ema."),
        tensors(every_layout / before, STEPS, "ema."),
    )
    assert ours.keys() == wanted.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-6, msg=name)


def theirs_at(folder: Path, step: int, target: Path) -> Path:
    target.mkdir()
    (target / f"iter_{step:07d}").symlink_to(folder / f"iter_{step:07d}")
    return target


def test_a_checkpoint_without_one(demo: Path, averaged: Path, tmp_path: Path) -> None:
    run(demo, tmp_path, train_iters=1)
    with pytest.raises(CheckpointError, match=r"CKPT-085.*no average.*--no-load-ema"):
        run(demo, tmp_path, **FLAGS)
    run(demo, tmp_path, no_load_ema=True, **FLAGS)
    wanted = expected(tensors(tmp_path, 1, "model."), tmp_path, range(2, STEPS + 1))
    require_close(tensors(tmp_path, STEPS, "ema."), wanted)


def test_a_run_without_one(demo: Path, averaged: Path, tmp_path: Path) -> None:
    flags = {"load": averaged, "train_iters": STEPS + 1}
    with pytest.raises(CheckpointError, match=r"CKPT-086.*--ema-decay 0.8"):
        run(demo, tmp_path, **flags)
    run(demo, tmp_path, no_load_ema=True, **flags)
    assert tensors(tmp_path, STEPS + 1, "ema.") == {}
    assert tensors(tmp_path, STEPS + 1, "optimizer.exp_avg.")


def test_another_decay_is_asked_for(
    demo: Path, averaged: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = {"load": averaged, "ema_decay": 0.5, "train_iters": STEPS + 1}
    with pytest.raises(ConfigError, match=r"CFG-160.*--ema-decay was 0.8 and is 0.5.*--resume-changed average"):
        run(demo, tmp_path, **flags)
    run(demo, tmp_path, resume_changed=["average"], **flags)
    assert "--ema-decay was 0.8 and is 0.5" in caplog.text
    before, after = tensors(averaged, STEPS, "ema."), tensors(tmp_path, STEPS + 1, "ema.")
    for name, master in tensors(tmp_path, STEPS + 1, "model.").items():
        torch.testing.assert_close(after[name], (before[name] + master) / 2, msg=name)


def convert(mode: str, source: Path, target: Path, *more: Any) -> None:
    convert_command.main(["--mode", mode, "--source_path", str(source), "--target_path", str(target), *map(str, more)])


def test_conversions_of_the_average(averaged: Path, tmp_path: Path) -> None:
    wanted = tensors(averaged, STEPS, "ema.")
    for mode, dtype in (
        ("convert_to_hf", torch.float32), ("convert_to_native", torch.float32), ("convert_to_mm", torch.float32),
        ("zero_to_bf16", torch.bfloat16),
    ):  # fmt: skip
        convert(mode, averaged, tmp_path / mode, "--weights", "ema")
        source = open_weights(tmp_path / mode)
        for name, value in wanted.items():
            assert torch.equal(source.read(name), value.to(dtype)), (mode, name)
    model = WanTransformer3DModel.from_pretrained(tmp_path / "convert_to_hf")
    head = model.get_parameter("proj_out.weight")
    assert torch.equal(head, wanted["head.head.weight"])
    assert not torch.equal(head, tensors(averaged, STEPS, "model.")["head.head.weight"])
    convert("convert_to_native", averaged, tmp_path / "trained")
    plain = load_file(next((tmp_path / "trained").glob("*.safetensors")))
    assert all(torch.equal(plain[name], value) for name, value in tensors(averaged, STEPS, "model.").items())


def test_adapters_are_averaged(every_layout: Path, tmp_path: Path) -> None:
    """The PEFT file beside a checkpoint is what was trained; `--weights ema` asks for the average."""
    folder = every_layout / "lora-pp2"
    for kind, more in (("model.", []), ("ema.", ["--weights", "ema"])):
        convert("lora_to_hf", folder, tmp_path / f"{kind}safetensors", *more)
        convert("lora_to_mm", folder, tmp_path / f"{kind}mm", *more)
        file = load_file(tmp_path / f"{kind}safetensors")
        mm = torch.load(tmp_path / f"{kind}mm/release/mp_rank_00/model_optim_rng.pt", weights_only=True)["model"]
        value = tensors(folder, STEPS, kind)["blocks.0.self_attn.q.lora_B"]
        assert value.any()
        assert torch.equal(file["transformer.blocks.0.attn1.to_q.lora_B.weight"], value)
        assert torch.equal(mm["blocks.0.self_attn.proj_q.lora_B.default.weight"], value)
    beside = load_file(folder / f"iter_{STEPS:07d}" / PEFT_FILE)
    assert all(torch.equal(beside[name], value) for name, value in load_file(tmp_path / "model.safetensors").items())


def test_inspect_says_that_it_is_there(averaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert_command.main(["--mode", "inspect", "--source_path", str(averaged), "--json_output"])
    assert json.loads(capsys.readouterr().out)["ema_decay"] == DECAY


@pytest.mark.parametrize("kind", ["hf", "trained"])
def test_an_average_that_is_not_there(demo: Path, tmp_path: Path, kind: str) -> None:
    source = demo / WEIGHTS
    if kind == "trained":
        source = tmp_path / "run"
        run(demo, source, train_iters=1)
    with pytest.raises(CheckpointError, match="CKPT-049"):
        convert("convert_to_native", source, tmp_path / "out", "--weights", "ema")
    with pytest.raises(CheckpointError, match="CKPT-049"):
        convert("lora_to_hf", demo / WEIGHTS, tmp_path / "out", "--weights", "ema")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--optimizer-selection", "fused_ema_adamw"], "CFG-008.*--ema-decay"),
        (["--ema-decay", "1"], "CFG-00"),
        (["--ema-decay", "0"], "CFG-00"),
    ],
)
def test_flags_that_are_refused(demo: Path, tmp_path: Path, more: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        train_command.main([*words(demo, tmp_path, train_iters=1), *more])


def test_an_average_that_nobody_keeps(demo: Path) -> None:
    with pytest.raises(MMError, match=r"CFG-024.*--ema-decay"):
        run(demo, None, train_iters=1, ema_decay=0.9)


@pytest.mark.parametrize(
    ("more", "share"), [([], 1), (["--use-distributed-optimizer"], 4), (["--bf16"], 1)], ids=["ddp", "distopt", "bf16"]
)
def test_the_dry_run_counts_it(
    demo: Path, model_json: Path, capsys: pytest.CaptureFixture[str], more: list[str], share: int
) -> None:
    """4 bytes for each parameter that rank 0 of four replicas owns."""
    common = words(demo, None, load=None, init_from_scratch=True, train_iters=1, mm_model=model_json)
    common = [word for word in common if word != "--no-progress-bar"]
    reports = []
    for extra in ([], ["--ema-decay", "0.9", "--save", "out"]):
        doctor_command.main([*common, "--dry-run", "--world-size", "4", "--json-output", *more, *extra])
        reports.append(json.loads(capsys.readouterr().out))
    plain, kept = reports
    padded = pytest.approx(4 * plain["parameters"] / share, rel=0.01)
    assert kept["optimizer_bytes"] - plain["optimizer_bytes"] == padded
    assert kept["peak_bytes"] - plain["peak_bytes"] == padded
    assert kept["parameter_bytes"] == plain["parameter_bytes"]


def test_a_skipped_step_leaves_it_as_it_is(demo_of_files: Path, tmp_path: Path) -> None:
    home, _ = with_bad_sample(demo_of_files, tmp_path / "demo", 1e25)
    root = tmp_path / "run"
    rows = run(home, root, ema_decay=DECAY, save_interval=1, train_iters=4, on_nonfinite="skip:1")
    [skipped] = [row["step"] for row in rows if row["skipped"]]
    assert 1 < skipped <= 4
    for step in range(2, 5):
        before, after = tensors(root, step - 1, "ema."), tensors(root, step, "ema.")
        same = all(torch.equal(value, before[name]) for name, value in after.items())
        assert same == (step == skipped)
