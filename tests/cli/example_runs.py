"""Example scripts run as a user runs them, with the tiny models of the embedded default."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from ranks import ANY_PORT

EXAMPLES = Path(__file__).parents[2] / "examples"
EXTRACTION = EXAMPLES / "wan2.1" / "feature_extract" / "feature_extraction.sh"
TWO_STEPS = (
    "--train-iters", "2", "--save-interval", "1", "--keep-latest", "1", "--num-workers", "0", "--device", "cpu",
)  # fmt: skip


def bash(script: Path, *words: str, timeout_s: int, **environment: str) -> str:
    """What a script prints; it must end well."""
    done = subprocess.run(
        ["bash", str(script), *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def pretrain_on_two_processes(
    script: str, data: Path, model: Path, weights: Path, tmp_path: Path, **environment: str
) -> list[dict[str, Any]]:
    """Two steps of a script's own layout, as far as two processes can have it; returns the metrics.

    Args:
        script: folder below `examples`. data, model: feature_data.json and pretrain_model.json.
        weights: to start from. tmp_path: where the run goes, as `run`. environment: further variables.
    """
    (tmp_path / "zero.yaml").write_text("zero3_size: 2\n")  # the shipped file is for eight devices in bf16
    bash(
        EXAMPLES / script / "pretrain.sh",
        *TWO_STEPS,
        timeout_s=120,
        NPUS_PER_NODE="2",
        MASTER_PORT=ANY_PORT,
        MBS="2",
        GRAD_ACC_STEP="2",
        PRECISION="fp32",
        MM_DATA=str(data),
        MM_MODEL=str(model),
        LOAD_PATH=str(weights),
        SAVE_PATH=str(tmp_path / "run"),
        layerzero_config=str(tmp_path / "zero.yaml"),
        **environment,
    )
    assert [path.name for path in (tmp_path / "run").glob("iter_*")] == ["iter_0000002"]
    assert "step 2/2" in (tmp_path / "run" / "train.log").read_text()
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


def finetune_on_two_processes(script: str, data: Path, model: Path, weights: Path, tmp_path: Path) -> Path:
    """Two steps of a script of LoRA, with the arguments of `pretrain_on_two_processes`; returns the checkpoint."""
    bash(
        EXAMPLES / script / "finetune_lora.sh",
        *TWO_STEPS,
        timeout_s=120,
        NPUS_PER_NODE="2",
        MASTER_PORT=ANY_PORT,
        MBS="2",
        PRECISION="fp32",
        MM_DATA=str(data),
        MM_MODEL=str(model),
        LOAD_BASE_MODEL=str(weights),
        SAVE_PATH=str(tmp_path / "lora"),
    )
    rows = [json.loads(line) for line in (tmp_path / "lora" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert re.search(r"lora +r 16, alpha 16, .* trainable parameters", (tmp_path / "lora" / "train.log").read_text())
    (folder,) = (tmp_path / "lora").glob("iter_*")
    return folder


def few_clips(configs: Path, out: Path) -> None:
    """Copy a task's files to `out`, for four clips of its list and a store of their own."""
    shutil.copytree(configs, out)
    folder, listed = (configs / "data.txt").read_text().strip().split(",")
    rows = json.loads((Path(folder) / listed).read_text())[:4]
    (out / "rows.json").write_text(json.dumps(rows))
    (out / "data.txt").write_text(f"{folder},{out / 'rows.json'}\n")
    (out / "feature_data.txt").write_text(f"{out / 'store'}\n")
    for name, section, value in (
        ("data.json", ("dataset_param", "basic_parameters", "data_path"), "data.txt"),
        ("feature_data.json", ("dataset_param", "basic_parameters", "data_path"), "feature_data.txt"),
        ("tools.json", ("sorafeature", "save_path"), "store"),
    ):
        content = json.loads((out / name).read_text())
        inner = content
        for key in section[:-1]:
            inner = inner[key]
        inner[section[-1]] = str(out / value)
        (out / name).write_text(json.dumps(content))


def in_tiny(shipped: Path, tiny: Path, out: Path) -> Path:
    """Write a shipped pretrain_model.json with the transformer of a tiny one's; returns the file."""
    values = json.loads(shipped.read_text())
    values["predictor"] = json.loads(tiny.read_text())["predictor"]
    out.write_text(json.dumps(values))
    return out
