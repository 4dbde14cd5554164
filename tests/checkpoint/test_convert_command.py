"""The conversion command and its scripts."""

import os
import subprocess
import sys

import pytest
from conversions import REPO, as_native, assert_same_bits, flags, names, tensors_of


def test_the_commands_flags_in_both_spellings(original, tmp_path):
    underscored = ("--source_path", original, "--target_path", tmp_path / "mm", "--mode", "convert_to_mm")
    assert flags(*underscored) == 0
    dashed = (f"--source-path={tmp_path / 'mm'}", "--target-path", tmp_path / "hf", "--mode", "convert_to_hf")
    assert flags(*dashed, "--ckpt-path", original) == 0
    assert_same_bits(tensors_of(tmp_path / "hf"), tensors_of(original))
    assert flags("--source_path", original, "--target_path", tmp_path / "native", "--mode", "convert_to_native") == 0


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--mode", "convert_to_native", "--pp_vpp_layers", "[2]"], 64, ["CFG-073", "--pp_vpp_layers"]),
        (["--mode", "resplit"], 64, ["CFG-107", "--pp_vpp_layers"]),
        (["--mode", "convert_to_mn"], 64, ["CFG-071", "convert_to_mm"]),
        (["--mode", "convert_to_mm", "--ckpt_path", "x"], 64, ["CFG-073"]),
        ([], 64, ["--mode"]),
        (["--mode", "convert_to_mm"], 65, ["DATA-020"]),
    ],
)
def test_what_cannot_work_is_said_with_an_id(tmp_path, capsys, words, code, text):
    assert flags("--source_path", tmp_path / "absent", "--target_path", tmp_path / "out", *words) == code
    error = capsys.readouterr().err
    assert all(part in error for part in text), error
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "script", ["tools/convert_ckpt.py", pytest.param("examples/wan2.1/convert_ckpt.py", marks=pytest.mark.nightly)]
)
def test_the_scripts_run_from_any_folder(original, tmp_path, script):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = ["--source_path", original, "--target_path", "out", "--mode", "convert_to_mm"]
    done = subprocess.run(
        [sys.executable, REPO / script, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert_same_bits(as_native(tmp_path / "out"), as_native(original))
    done = subprocess.run(
        [sys.executable, REPO / script, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 74
    assert "CKPT-020" in done.stderr
    assert "Traceback" not in done.stderr
