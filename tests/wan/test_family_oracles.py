"""The models of the Wan family against the numbers of the systems that they come from."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mm
from mm.wan.model import WanModel

VELOCITY, GRADIENT = 5e-6, 1e-4
"""Relative to the largest element; systems differ from each other by up to 6e-7 and 2e-5."""

FILES = [
    "fun_inp.videox_fun",
    "fun_control.videox_fun",
    "fun_v11_control.videox_fun",
    "fun_v11_camera.videox_fun",
    "vace.videox_fun",
    "wan22_a14b_i2v.wan22",
    "wan22_ti2v_5b.wan22",
    "speedcontrol.diffsynth",
]
FEATURES = {
    "image_features": "image_features",
    "condition": "y",
    "reference_latents": "reference_latents",
    "camera": "camera",
    "vace_context": "vace_context",
    "motion_bucket_id": "motion_bucket_id",
}
"""Names of our features, and of the files' inputs."""


def oracle(file: str) -> tuple[dict[str, Tensor], dict]:
    folder = os.environ.get("MM_ORACLES")
    if not folder:
        pytest.skip("MM_ORACLES is not set; it names the folder of numbers of other systems")
    return load_file(Path(folder) / f"{file}.safetensors"), json.loads((Path(folder) / f"{file}.json").read_text())


def written(folder: Path, tensors: dict[str, Tensor], facts: dict, **changes: object) -> Path:
    """Weights as the system keeps them: native names and its config.json."""
    config = {key: value for key, value in facts["config"].items() if key != "motion_controller"} | changes
    if str(config.get("cross_attn_type")).startswith("cross_attn"):
        config["cross_attn_type"] = "cross_attn"
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name.removeprefix("weights."): t.float() for name, t in tensors.items() if name.startswith("weights.")}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    return folder


def loaded(folder: Path) -> WanModel:
    return mm.load_model(folder, dtype="fp32", device="cpu").requires_grad_()


def inputs_of(tensors: dict[str, Tensor], facts: dict, case: str) -> dict[str, Tensor]:
    """The inputs of a case: its own, those that are zero, and else those of the main case."""
    said = facts["cases"][case].get("same_inputs_as_main_except", {"zero": [], "absent": []})
    found = {}
    for ours, theirs in {"latents": "latents", "timestep": "timestep", "text": "text", **FEATURES}.items():
        value = tensors.get(f"case.{case}.input.{theirs}", tensors.get(f"input.{theirs}"))
        if value is None or theirs in said["absent"]:
            continue
        value = value.float()
        found[ours] = torch.zeros_like(value) if theirs in said["zero"] else value
    if "input.timestep_per_token" in tensors and "timestep_per_token" not in said["absent"]:
        found["timestep"] = tensors["input.timestep_per_token"]
    return found


def relative(value: Tensor, expected: Tensor, least: float = 1e-8) -> float:
    return float((value - expected).abs().max() / max(float(expected.abs().max()), least))


CASES = [
    *[(file, "main", {}, {}) for file in FILES],
    ("fun_inp.videox_fun", "t2v_mode", {}, {}),
    ("fun_control.videox_fun", "control_only", {}, {}),
    ("fun_v11_control.videox_fun", "zero_reference", {}, {}),
    ("fun_v11_control.videox_fun", "no_reference", {}, {}),
    ("fun_v11_camera.videox_fun", "zero_camera", {}, {}),
    ("fun_v11_camera.videox_fun", "no_camera", {}, {}),
    ("vace.videox_fun", "scale_60_percent", {}, {"vace_scale": 0.6}),
    ("vace.videox_fun", "scale_0_percent", {}, {"vace_scale": 0.0}),
    ("vace.videox_fun", "layers_0_1", {"vace_layers": [0, 1]}, {}),
    ("wan22_ti2v_5b.wan22", "text_only", {}, {}),
    ("speedcontrol.diffsynth", "no_motion", {}, {}),
]


@pytest.mark.parametrize(("file", "case", "config", "more"), CASES)
def test_velocity_and_gradients_are_theirs(
    file: str, case: str, config: dict, more: dict[str, float], tmp_path: Path
) -> None:
    tensors, facts = oracle(file)
    model = loaded(written(tmp_path, tensors, facts, **config))
    prefix = "" if case == "main" else f"case.{case}."
    velocity = model.velocity(**inputs_of(tensors, facts, case), **more)
    assert relative(velocity, tensors[f"{prefix}output.velocity"]) <= VELOCITY

    theirs = {n.removeprefix(f"{prefix}grad."): t for n, t in tensors.items() if n.startswith(f"{prefix}grad.")}
    if not theirs:
        return
    (velocity * tensors.get(f"{prefix}cotangent", tensors["cotangent"])).sum().backward()
    least = 1e-3 * max(float(value.abs().max()) for value in theirs.values())
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    errors = {name: relative(ours[name], value, least) for name, value in theirs.items()}
    assert max(errors.values()) <= GRADIENT, max(errors.items(), key=lambda item: item[1])
    if case == "main":
        assert {name for name in ours if name not in theirs} == too_large(tensors)


def too_large(tensors: dict[str, Tensor]) -> set[str]:
    """Parameters of which the file has a part of the gradient."""
    start = "grad_norm."
    return {name.removeprefix(start) for name in tensors if name.startswith(start)}


def test_the_gradient_of_the_cameras_first_convolution_is_theirs(tmp_path: Path) -> None:
    tensors, facts = oracle("fun_v11_camera.videox_fun")
    model = loaded(written(tmp_path, tensors, facts))
    (model.velocity(**inputs_of(tensors, facts, "main")) * tensors["cotangent"]).sum().backward()
    (name,) = too_large(tensors)
    gradient = model.get_parameter(name).grad
    assert gradient is not None
    of_ours = {
        "every_9th_column": gradient[:, ::9],
        "sum_over_rows": gradient.sum(0),
        "sum_over_columns": gradient.sum(1),
        "norm": gradient.norm(),
    }
    for part, value in of_ours.items():
        expected = tensors[f"grad_{part}.{name}"]
        assert relative(value.reshape(expected.shape), expected) <= GRADIENT, part


def test_every_case_is_here() -> None:
    tested = {(file, case) for file, case, *_ in CASES}
    for file in FILES:
        _, facts = oracle(file)
        assert {(file, case) for case, said in facts["cases"].items() if said.get("stored", True)} <= tested
