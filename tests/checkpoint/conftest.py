"""Shared by the tests of checkpoints."""

import pytest
import torch
from diffusers import WanTransformer3DModel

FP32 = ("time_embedder", "scale_shift_table", "norm2")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A sharded folder by diffusers, with the mixed dtypes of the published one and a value no rounding keeps."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, ffn_dim=24, text_dim=12, freq_dim=8
    )
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn_like(parameter)
        if not any(part in name for part in FP32):
            parameter.data = parameter.data.bfloat16()
    folder = tmp_path_factory.mktemp("hf") / "transformer"
    model.save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder
