"""docs/dry-run.md shows what the tool prints."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "wan2.1" / "14b" / "t2v" / "pretrain_model.json"


def example() -> tuple[str, str]:
    """The command of the page, and what it is said to print."""
    block = re.search(r"```\n\$ (DRY_RUN=1 [^\n]+)\n\n(.*?)```", (ROOT / "docs" / "dry-run.md").read_text(), re.DOTALL)
    assert block is not None
    return block[1], block[2]


def printed(command: str, **environment: str) -> str:
    variables = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env={**variables, **environment}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def form(text: str) -> list[set[str]]:
    """The labels of each table: facts by their first column, memory by kind, traffic by axis and operation."""
    facts, memory, traffic = text.strip().split("\n\n")
    return [
        {re.split(r"  +", line)[0] for line in facts.splitlines()},
        {re.split(r"  +", line)[0] for line in memory.splitlines() if not line.startswith("--")},
        {" by ".join(re.split(r"  +", line)[:2]) for line in traffic.splitlines() if not line.startswith("--")},
    ]


@pytest.mark.nightly
def test_the_tables_have_the_form_that_is_shown(tmp_path: Path) -> None:
    """With fewer blocks, which change no label."""
    command, shown = example()
    model = json.loads(MODEL.read_text())
    model["predictor"] |= {"num_layers": 2, "pipeline_num_layers": None}
    (tmp_path / "model.json").write_text(json.dumps(model))
    assert form(printed(command, MM_MODEL=str(tmp_path / "model.json"))) == form(shown)


@pytest.mark.nightly
def test_the_example_shows_what_is_printed() -> None:
    command, shown = example()
    assert printed(command).strip() == shown.strip()
