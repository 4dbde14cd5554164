"""One expert of two in a run: the noise levels that it draws, what its checkpoints record, and a mix-up of experts."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from training_runs import WEIGHTS, metrics, run

from mm.checkpoint.expert_band import recorded_band, recorded_boundary
from mm.errors import ConfigError

BOUNDARY = 0.875


@pytest.fixture(scope="module")
def demo(demo_of_files: Path) -> Path:
    return demo_of_files


def objective(demo: Path, path: Path, **values: Any) -> Path:
    """pretrain_model.json of the embedded default with more of an objective."""
    content = json.loads((demo / "configs" / "pretrain_model.json").read_text())
    content["diffusion"].update(values)
    path.write_text(json.dumps(content))
    return path


def two_experts(demo: Path, folder: Path) -> Path:
    """A folder as diffusers writes it of two experts, both of the embedded default's weights."""
    for name in ("transformer", "transformer_2"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(demo / WEIGHTS)
    (folder / "model_index.json").write_text(json.dumps({"boundary_ratio": BOUNDARY}))
    return folder


def test_folders_of_diffusers_tell_their_experts(demo: Path, tmp_path: Path) -> None:
    folder = two_experts(demo, tmp_path / "a14b")
    assert recorded_band(folder / "transformer") == (BOUNDARY, math.inf)
    assert recorded_band(folder / "transformer_2") == (0.0, BOUNDARY)
    assert recorded_band(folder / "transformer_2" / "diffusion_pytorch_model.safetensors") == (0.0, BOUNDARY)
    assert recorded_boundary(folder / "transformer") == BOUNDARY
    assert recorded_band(demo / WEIGHTS) is None, "of one transformer nothing is recorded"


def test_a_run_draws_its_band_records_it_and_refuses_the_other_expert(
    demo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, save = two_experts(demo, tmp_path / "a14b"), tmp_path / "high"
    high = objective(demo, tmp_path / "high.json", band_from=BOUNDARY)
    low = objective(demo, tmp_path / "low.json", band_below=BOUNDARY)
    run(demo, save, mm_model=high, load=folder / "transformer", train_iters=4)
    assert min(timestep for row in metrics(save) for timestep in row["timesteps"]) >= 1000 * BOUNDARY
    (checkpoint,) = save.glob("iter_*")
    assert recorded_band(checkpoint) == (BOUNDARY, math.inf)
    with pytest.raises(ConfigError, match=r"CFG-293: .*transformer_2 was trained .* from 0 to below 0.875"):
        run(demo, tmp_path / "swapped", mm_model=high, load=folder / "transformer_2", train_iters=4)
    with pytest.raises(ConfigError, match=r"CFG-293: .*from 0.875 on, and this run draws those from 0 to below 0.875"):
        run(demo, tmp_path / "other", mm_model=low, load=checkpoint, train_iters=4)
    with pytest.raises(ConfigError, match=r"CFG-160: .*band_from of --mm-model was 0.875 and is null"):
        run(demo, save, mm_model=low, train_iters=6)
    caplog.clear()
    run(demo, tmp_path / "all", load=folder / "transformer", train_iters=1)
    assert "was trained on noise levels from 0.875 on, and this run draws those from 0 on" in caplog.text
