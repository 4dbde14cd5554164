"""The Python that README.md and docs/api.md show runs where the quickstart has been."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from released import COMMON, write_common_files, write_release
from train.training_runs import run

import mm
from mm.data.video import probe

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def place(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that quickstart.sh is started in, after it: with a model of one step, as its own takes minutes."""
    home = tmp_path_factory.mktemp("reader")
    workspace = home / "workspace"
    workspace.mkdir()
    (workspace / "demo").symlink_to(demo)
    run(demo, workspace / "checkpoints", train_iters=1, lr_decay_iters=1200, lr_warmup_iters=100, micro_batch_size=16)
    mm.convert_weights(workspace / "checkpoints", workspace / "trained_hf", "hf")
    return home


def blocks(page: str) -> list[str]:
    found = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    assert found
    return found


def run_code(code: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that a piece of code leaves."""
    (tmp_path / "code.py").write_text(code)
    monkeypatch.chdir(place)
    return runpy.run_path(str(tmp_path / "code.py"))


def test_ten_lines(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [code] = blocks("README.md")
    assert len([line for line in code.splitlines() if line]) == 10
    left = run_code(code, place, tmp_path, monkeypatch)
    assert left["sample"].latents.shape == (16, 3, 8, 8)
    assert [step.step for step in left["run"].steps] == list(range(1, 11))
    assert left["frames"].dtype == torch.uint8 and left["frames"].shape == (9, 64, 64, 3)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("number", "name", "shape"),
    [
        (0, None, None),
        (1, "velocity", (1, 16, 3, 8, 8)),
        *((number, "frames", (9, 64, 64, 3)) for number in (2, 3, 4)),
    ],
)
def test_examples_of_the_page(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, name: str | None, shape: tuple[int, ...]
) -> None:
    every = blocks("docs/api.md")
    assert len(every) == 6
    left = run_code(every[number], place, tmp_path, monkeypatch)
    assert name is None or left[name].shape == shape


def test_the_pipeline_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the released files in tiny, for a small clip of few steps."""
    code, small = blocks("docs/api.md")[5], "num_inference_steps=2, height=32, width=48, num_frames=5"
    size = "height=480, width=832, num_frames=81"
    assert size in code
    write_common_files(tmp_path / "models")
    write_release(tmp_path / "models", COMMON, "t2v")
    left = run_code(code.replace(size, small), tmp_path, tmp_path, monkeypatch)
    assert len(left["frames"]) == 5 and left["frames"][0].size == (48, 32)
    assert probe(tmp_path / "video.mp4").num_frames == 5
