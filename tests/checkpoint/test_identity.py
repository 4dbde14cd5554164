"""Sixteen digits that are the same for the same weights in every format, and others for others."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mm.checkpoint.convert import convert_to_hf, convert_to_mm
from mm.checkpoint.identity import identity
from mm.checkpoint.weights import open_weights
from mm.config.model import WanConfig
from mm.wan.config_json import wan_config_to_original
from mm.wan.model import WanModel

CONFIG = WanConfig(text_dim=16, hidden_size=24, ffn_dim=40, num_heads=2, num_layers=2, freq_dim=16)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A native file of a model with random weights."""
    model = WanModel(CONFIG)
    model.init_weights(1)
    folder = tmp_path / "native"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(wan_config_to_original(CONFIG)))
    save_file(model.state_dict(), folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    return folder / "diffusion_pytorch_model.safetensors"


def digits(path: Path) -> str:
    return identity(open_weights(path))


def test_formats_and_places_make_no_difference(file: Path, tmp_path: Path) -> None:
    expected = digits(file.parent)
    assert len(expected) == 16
    convert_to_hf(file.parent, tmp_path / "hf", max_shard_bytes=20_000)
    convert_to_mm(tmp_path / "hf", tmp_path / "mm")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    assert [digits(tmp_path / name) for name in ("hf", "mm")] == [expected] * 2


@pytest.mark.parametrize(
    ("name", "place"), [("blocks.1.ffn.0.weight", 0), ("blocks.0.self_attn.q.weight", -1), ("head.head.bias", 30)]
)
def test_another_value_dtype_or_shape_is_another_model(file: Path, name: str, place: int) -> None:
    before = digits(file.parent)
    tensors = load_file(file)
    tensors[name].view(-1)[place] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    changed = digits(file.parent)
    save_file({n: t.to(torch.bfloat16) if n == name else t for n, t in tensors.items()}, file)
    assert len({before, changed, digits(file.parent)}) == 3


def test_a_merged_adapter_is_seen_wherever_it_is(file: Path) -> None:
    """Training changes whole matrices: any linear of them is enough."""
    before = digits(file.parent)
    tensors = load_file(file)
    for name in ("blocks.0.cross_attn.v.weight", "blocks.1.ffn.2.weight"):
        rows, columns = tensors[name].shape
        update = 1e-3 * torch.randn(rows, 2) @ torch.randn(2, columns)
        save_file({**tensors, name: tensors[name] + update}, file, metadata={"format": "pt"})
        assert digits(file.parent) != before
