"""What is said of two experts beside their run: `mm doctor`, the dry run's memory, the band of converted weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from training_runs import WEIGHTS, run, words

from mm.checkpoint.expert_band import recorded_band
from mm.cli import convert as convert_command
from mm.cli import doctor
from mm.errors import ConfigError

BOUNDARY = 0.88


def experts(demo: Path, **flags: Any) -> dict[str, Any]:
    return {"load": demo / WEIGHTS, "load_low_noise": demo / WEIGHTS, "expert_boundary": BOUNDARY, **flags}


def dry_run(capsys: pytest.CaptureFixture[str], demo: Path, **flags: Any) -> dict[str, Any]:
    capsys.readouterr()
    doctor.main(words(demo, None, train_iters=1, dry_run=True, world_size=2, json_output=True, **flags))
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(
    "layout", [pytest.param({}, marks=pytest.mark.nightly), {"use_distributed_optimizer": True, "bf16": True}]
)
def test_a_dry_run_counts_both(capsys: pytest.CaptureFixture[str], demo: Path, layout: dict[str, Any]) -> None:
    if "bf16" in layout:
        layout = {**layout, "mm_model": in_bf16(demo)}
    one, both, host = (
        dry_run(capsys, demo, **layout, **flags) for flags in ({}, experts(demo), experts(demo, offload_expert=True))
    )
    for kind in ("parameter_bytes", "optimizer_bytes"):
        assert both[kind] == 2 * one[kind] and host[kind] == one[kind]
    kept = one["parameter_bytes"] + one["optimizer_bytes"]
    beside = one["peak_bytes"] + kept + one["gradient_bytes"]
    scalars = {"abs": 64}  # of which some are alive at one run's peak and not at the other's
    assert both["peak_bytes"] == pytest.approx(beside, **scalars)
    assert host["peak_bytes"] == pytest.approx(one["peak_bytes"], **scalars)
    assert (one["expert_bytes"], both["expert_bytes"], host["expert_bytes"]) == (0, 0, 2 * kept)
    assert both["traffic"] == one["traffic"], "a step is one of one expert"


def in_bf16(demo: Path) -> Path:
    content = json.loads((demo / "configs" / "pretrain_model.json").read_text())
    content["predictor"]["dtype"] = "bf16"
    path = demo / "configs" / "bf16_of_experts.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.nightly
def test_converted_experts_say_which_they_are(demo: Path, tmp_path: Path) -> None:
    """Of every format; a run that asks them for the other band is refused, by the doctor too."""
    run(demo, tmp_path / "run", train_iters=1, micro_batch_size=1, **experts(demo))
    for name, band in (("transformer", (BOUNDARY, float("inf"))), ("transformer_2", (0.0, BOUNDARY))):
        source = tmp_path / "run" / name
        for mode in ("hf", "native", "mm"):
            target = tmp_path / mode / name
            convert_command.main(
                ["--mode", f"convert_to_{mode}", "--source_path", str(source), "--target_path", str(target)]
            )
            again = tmp_path / f"{mode}_again" / name
            convert_command.main(
                ["--mode", "convert_to_native", "--source_path", str(target), "--target_path", str(again)]
            )
            assert recorded_band(again) == band, f"{mode}, {name}"
        assert recorded_band(tmp_path / "hf" / name) == band
    folders = {"load": tmp_path / "hf" / "transformer_2", "load_low_noise": tmp_path / "hf" / "transformer"}
    with pytest.raises(ConfigError, match=r"CFG-293: .*hf/transformer_2 was trained on noise levels from 0 to below"):
        run(demo, tmp_path / "swapped", train_iters=1, expert_boundary=BOUNDARY, **folders)
    with pytest.raises(ConfigError, match=r"CFG-293: .*hf/transformer_2 was trained on noise levels"):
        doctor.main(words(demo, None, train_iters=1, expert_boundary=BOUNDARY, **folders))
    shutil.rmtree(tmp_path / "run" / "transformer_2")
    with pytest.raises(ConfigError, match="CKPT-131"):
        doctor.main(words(demo, tmp_path / "run", train_iters=2, micro_batch_size=1, **experts(demo)))
