"""`mm doctor --dry-run`, asked through the scripts that start a training.

Where a test is about what is told, the script's words are given to the command in this process: Python and its imports
take seconds.
"""

import json
import os
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from script_words import words_of

from mm.cli import doctor

EXAMPLES = Path(__file__).parents[2] / "examples" / "wan2.1"


def dry_run(
    size: str, *words: str, script: str = "pretrain.sh", **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", EXAMPLES / size / "t2v" / script, *words],
        env={**os.environ, "DRY_RUN": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def seconds_computed() -> float:
    """Of processes that this one has started and seen end: the time of one that has a core to itself."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def report_of_a_process(size: str, *words: str, **environment: str) -> Any:
    done = dry_run(size, "--json-output", *words, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


Report = Callable[..., Any]


@pytest.fixture
def report(tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]) -> Report:
    """What the command tells in this process, of the words that a script gives it."""

    def report(size: str, *words: str, task: str = "t2v", script: str = "pretrain.sh", **environment: str) -> Any:
        folder, path = tmp_path_factory.mktemp("words"), EXAMPLES / size / task / script
        _, module, given = words_of(path, folder, "--json-output", *words, DRY_RUN="1", **environment)
        assert module == "mm.cli.doctor"
        capsys.readouterr()
        doctor.main(given)
        return json.loads(capsys.readouterr().out)

    return report


@pytest.fixture
def two_blocks(tmp_path: Path) -> str:
    """pretrain_model.json of 1.3B with two of its blocks, in fp32."""
    config = json.loads((EXAMPLES / "1.3b" / "t2v" / "pretrain_model.json").read_text())
    config["predictor"] |= {"dtype": "fp32", "num_layers": 2, "pipeline_num_layers": [2]}
    (tmp_path / "model.json").write_text(json.dumps(config))
    return str(tmp_path / "model.json")


def test_one_process_holds_the_model_that_diffusers_builds(two_blocks: str, report: Report) -> None:
    with torch.device("meta"):
        model = WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=2)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    words, environment = ("--latent-size", "3", "4", "4"), {"NPUS_PER_NODE": "1", "PRECISION": "fp32"}
    found = report("1.3b", *words, MM_MODEL=two_blocks, **environment)
    assert found["parameters"] == parameters
    assert found["parameter_bytes"] >= 4 * parameters
    assert found["optimizer_bytes"] == pytest.approx(8 * parameters, rel=1e-3)  # two moments; fp32 needs no masters
    lion = report("1.3b", *words, "--optimizer", "lion", MM_MODEL=two_blocks, **environment)
    assert lion["optimizer_bytes"] == pytest.approx(4 * parameters, rel=1e-3)
    assert found["peak_bytes"] == sum(found["peak"].values())


def test_references_are_latent_frames_more(tmp_path: Path, report: Report) -> None:
    config = json.loads((EXAMPLES / "1.3b" / "vace" / "pretrain_model.json").read_text())
    config["predictor"] |= {"dtype": "fp32", "num_layers": 2, "pipeline_num_layers": [2], "vace_layers": [0]}
    (tmp_path / "model.json").write_text(json.dumps(config))
    job = {"task": "vace", "MM_MODEL": str(tmp_path / "model.json"), "NPUS_PER_NODE": "1", "PRECISION": "fp32"}
    found = report("1.3b", "--latent-size", "3", "4", "4", "--references", "2", **job)
    assert found == report("1.3b", "--latent-size", "5", "4", "4", **job)
    assert found["tokens"] == 5 * 2 * 2


@pytest.mark.parametrize("blocks", [2, pytest.param(5, marks=pytest.mark.nightly)], ids=["16 blocks", "14B"])
@pytest.mark.nightly
def test_a_rank_of_4096_in_less_than_a_minute(tmp_path: Path, blocks: int) -> None:
    """Tensor, sequence, context, pipeline and virtual-pipeline parallelism and layer-zero on 512 nodes."""
    model = json.loads((EXAMPLES / "14b" / "t2v" / "pretrain_model.json").read_text())
    model["predictor"] |= {"num_layers": 8 * blocks, "pipeline_num_layers": [[blocks] * 4] * 2}
    (tmp_path / "model.json").write_text(json.dumps(model))
    started = seconds_computed()
    found = report_of_a_process(
        "14b", "--sequence-parallel", "--rank", "4095",
        NNODES="512", TP="2", CP="4", PP="4", VP="2", GRAD_ACC_STEP="16", MM_MODEL=str(tmp_path / "model.json"),
    )  # fmt: skip
    assert seconds_computed() - started < 60
    assert [found[f"{axis}_rank"] for axis in ("tp", "cp", "dp", "pp")] == [1, 3, 127, 3]
    assert found["tokens"] == 21 * 30 * 52
    assert found["rank_tokens"] == found["tokens"] / 8
    assert found["bubble"] == pytest.approx(3 / (2 * 16 + 3))
    sent = {(row["axis"], row["operation"]): row["calls"] for row in found["traffic"]}
    assert sent["pp", "send"] == 16 * (1 + 2)  # forward once, backward from both chunks
    assert sent["ulysses", "all-to-all"] == 16 * 2 * blocks * (2 + 2 + 2)  # forward, recomputed, backward


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("words", "environment"),
    [((), {}), ((), {"CP": "8"}), (("--sequence-parallel",), {"TP": "8", "CP": "5", "NNODES": "480"})],
    ids=["dp", "cp8", "tp8sp-cp5"],
)
def test_14b_without_a_pipeline_in_less_than_a_minute(words: tuple[str, ...], environment: dict[str, str]) -> None:
    """All 40 blocks on one rank, two micro-batches: the most that a dry run has to do."""
    started = seconds_computed()
    report_of_a_process("14b", *words, **{"NNODES": "512", "GRAD_ACC_STEP": "4", **environment})
    assert seconds_computed() - started < 60


@pytest.mark.nightly
def test_tables_for_people(two_blocks: str) -> None:
    done = dry_run(
        "1.3b", "--latent-size", "3", "6", "10", "--context-parallel-algo", "megatron_cp_algo",
        CP="8", PRECISION="fp32", MM_MODEL=two_blocks,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["layout", "cp8(r8)", "on", "8", "processes"]
    assert any(
        line.startswith("tokens") and line.endswith("45 a sample, 6 on this rank, 0 of them padding") for line in lines
    )
    for heading in ("memory at the peak (predicted)", "together", "sent in a step over", "ring"):
        assert any(line.startswith(heading) for line in lines), heading
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("--rank", "8"), "CFG-047: --rank 8 is not one of --world-size 8."),
        (("--latent-size", "3", "5", "4"), "CFG-047: --latent-size is 3 5 4"),
        (("--latent-size", "3", "4"), "CFG-047: --latent-size is 3 4"),
        (("--references", "1"), "CFG-437: --references is 1, and a T2V model takes none"),
        (("--use-cp-send-recv-overlap",), "CFG-03"),
        (("--ranks", "1"), 'CFG-007: --ranks is not a flag. Did you mean "--rank"?'),
    ],
)
def test_what_cannot_be_asked_is_refused(words: tuple[str, ...], found: str) -> None:
    done = dry_run("1.3b", *words)
    assert done.returncode == 64
    assert found in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    "words", [(), pytest.param(("--lora-base-dtype", "int8"), marks=pytest.mark.nightly)], ids=["bf16", "int8"]
)
@pytest.mark.parametrize("blocks", [2, pytest.param(40, marks=pytest.mark.nightly)], ids=["2 blocks", "14B"])
def test_lora_of_14b_fits_one_device_of_80_gb(
    tmp_path: Path, report: Report, words: tuple[str, ...], blocks: int
) -> None:
    """480x832x81 in bf16 with full recomputation: no gradients and no masters of the base, little of adapters."""
    content = json.loads((EXAMPLES / "14b" / "t2v" / "pretrain_model.json").read_text())
    content["predictor"] |= {"num_layers": blocks, "pipeline_num_layers": [blocks]}
    (tmp_path / "model.json").write_text(json.dumps(content))
    found = report(
        "14b", *words, "--latent-size", "21", "60", "104",
        script="finetune_lora.sh", NPUS_PER_NODE="1", MM_MODEL=str(tmp_path / "model.json"),
    )  # fmt: skip
    with torch.device("meta"):
        model = WanTransformer3DModel(num_attention_heads=40, ffn_dim=13824, num_layers=blocks)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith("blocks.")}
    adapters = sum(16 * (m.in_features + m.out_features) for n, m in linears.items() if ".attn" in n)
    own = sum(parameter.numel() for parameter in model.parameters())
    scales = sum(m.out_features for m in linears.values()) if words else 0
    assert found["trained"] == adapters
    assert found["parameters"] == own + adapters + scales
    weights = sum(m.weight.numel() for m in linears.values())
    fp32 = ("time_embedder", "time_proj", "proj_out", "scale_shift_table", "norm2")
    exact = sum(p.numel() for n, p in model.named_parameters() if any(word in n for word in fp32))
    in_bytes = 2 * own + 2 * exact - (weights if words else 0) + 4 * (adapters + scales)
    assert found["parameter_bytes"] == pytest.approx(in_bytes, rel=1e-3)
    assert found["gradient_bytes"] == pytest.approx(4 * adapters, rel=1e-3)
    assert found["optimizer_bytes"] == pytest.approx(8 * adapters, rel=1e-3)
    assert found["peak_bytes"] < (80 if blocks == 40 else 12) * 10**9
