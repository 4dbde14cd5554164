"""Weights in e4m3: how far they are from the weights, by kind of layer, and what keeps its precision."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mm
from mm.errors import CheckpointError
from mm.lora.low_bit import STORED, quantise
from mm.wan.precision import keep_fp32

KINDS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2")


def released_like(kind: str) -> Tensor:
    """A matrix of 1.3B's width whose rows have different sizes, as trained ones do; 512 rows or columns of it."""
    width = {"ffn.0": (512, 1536), "ffn.2": (512, 8960)}.get(kind, (512, 1536))
    source = torch.Generator().manual_seed(KINDS.index(kind))
    rows = 0.02 * torch.exp(0.4 * torch.randn(width[0], 1, generator=source))
    return rows * torch.randn(width, generator=source)


@pytest.mark.parametrize("kind", KINDS)
def test_error_is_within_the_bound_of_e4m3(kind: str) -> None:
    """Three bits behind the point: half a step is 2^-4 of the value, and of subnormal numbers half of 2^-9."""
    weight = released_like(kind).double()
    relative = {}
    for name in ("scaled", "unscaled"):
        stored, scale = quantise(weight.float(), "fp8", scaled=name == "scaled")
        assert stored.dtype == STORED["fp8"] and (name == "scaled" or bool((scale == 1).all()))
        scale = scale.double().unsqueeze(1)
        error = (stored.double() * scale - weight).abs()
        # the scale is a bf16 number, so the largest value of a row may be 2^-9 of it above the end of the format
        assert bool((error <= torch.maximum(2**-4 * weight.abs(), 2**-10 * scale) * (1 + 1e-6)).all())
        relative[name] = float(error.norm() / weight.norm())
    assert relative["scaled"] == pytest.approx(0.0265, rel=0.08)
    assert relative["unscaled"] > relative["scaled"]


@pytest.mark.parametrize("deviation", [0.005, 0.002])
def test_small_weights_lose_more_without_scales(deviation: float) -> None:
    """Below 2^-6 steps are 2^-9, so the error is 2^-9 / sqrt(12), however small the weights are."""
    weight = deviation * torch.randn(512, 1536, generator=torch.Generator().manual_seed(0)).double()
    for scaled, expected in ((True, 0.0265), (False, 2**-9 / math.sqrt(12) / deviation)):
        stored, scale = quantise(weight.float(), "fp8", scaled)
        error = float((stored.double() * scale.double().unsqueeze(1) - weight).norm() / weight.norm())
        assert error == pytest.approx(expected, rel=0.08)


def test_a_weight_that_e4m3_cannot_hold_is_refused_without_scales(demo: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = demo / "weights/Wan2.1-T2V-Tiny-Diffusers/transformer"
    values = load_file(source / "diffusion_pytorch_model.safetensors")
    values["blocks.0.ffn.net.2.weight"][0, 0] = 500.0
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    save_file(values, tmp_path / "diffusion_pytorch_model.safetensors")
    assert mm.load_model(tmp_path, device="cpu", residency=mm.Residency(fp8="scaled"))
    with pytest.raises(CheckpointError, match="CKPT-120"):
        mm.load_model(tmp_path, device="cpu", residency=mm.Residency(fp8="unscaled"))


@pytest.mark.parametrize("kind", ["scaled", "unscaled"])
@pytest.mark.parametrize("streams", [False, True])
def test_a_model_in_fp8(demo: Path, kind: Any, streams: bool) -> None:
    """Matrices of the blocks alone; the velocity is that of a plain model with the rounded matrices, on one device."""
    folder = demo / "weights/Wan2.1-T2V-Tiny-Diffusers/transformer"
    staying = 0 if streams else None
    model = mm.load_model(
        folder, dtype="fp32", device="cpu", residency=mm.Residency(fp8=kind, staying_parameters=staying)
    )
    expected = mm.load_model(folder, dtype="fp32", device="cpu")
    rounded = 0
    for name, parameter in expected.named_parameters():
        found = model.get_parameter(name)
        if found.dtype == torch.float32:
            continue
        assert name.endswith(".weight") and name.startswith("blocks.") and not keep_fp32(name) and parameter.ndim == 2
        stored, scale = quantise(parameter, "fp8", scaled=kind == "scaled")
        parameter.copy_(stored.float() * scale.unsqueeze(1))
        rounded += 1
    assert rounded == 10 * expected.config.num_layers
    source = torch.Generator().manual_seed(0)
    given = {
        "latents": torch.randn(1, 16, 3, 8, 8, generator=source),
        "timestep": torch.tensor([500.0]),
        "text": torch.randn(1, 32, expected.config.text_dim, generator=source),
    }
    found, wanted = (one.velocity(**given) for one in (model, expected))
    assert math.isfinite(float(found.sum()))
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
