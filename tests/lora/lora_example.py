"""A tiny base model, an adapter with another r and alpha for every linear, and files of tools that we do not write.

The files are built from the tools' documented key patterns, without any of `mm.lora`.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import WanTransformer3DModel
from published_names import diffusers_to_native
from safetensors.torch import save_file
from torch import Tensor

from mm.config.model import WanConfig

CONFIG = WanConfig(text_dim=16, text_len=6, hidden_size=24, ffn_dim=40, num_heads=2, num_layers=2, freq_dim=16)
WIDTH, WIDE = CONFIG.hidden_size, CONFIG.ffn_dim
LINEARS = {  # native name in a block: (out, in)
    **{f"{kind}_attn.{letter}": (WIDTH, WIDTH) for kind in ("self", "cross") for letter in "qkvo"},
    "ffn.0": (WIDE, WIDTH),
    "ffn.2": (WIDTH, WIDE),
}
DIFFUSERS = {  # from diffusers' own modules
    **{f"self_attn.{letter}": f"attn1.to_{letter}" for letter in "qkv"},
    **{f"cross_attn.{letter}": f"attn2.to_{letter}" for letter in "qkv"},
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.o": "attn2.to_out.0",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}


class Plain(NamedTuple):
    """A [r, in], B [out, r], alpha."""

    a: Tensor
    b: Tensor
    alpha: float


def adapter() -> dict[str, Plain]:
    """All twenty linears by native name."""
    random = torch.Generator().manual_seed(3)
    found = {}
    for block in range(CONFIG.num_layers):
        for index, (name, (out, inner)) in enumerate(LINEARS.items()):
            rank = 2 + (index + block) % 3
            alpha = (rank, 1.0, 0.5 * rank, 7.0)[index % 4]
            a, b = torch.randn(rank, inner, generator=random), torch.randn(out, rank, generator=random)
            found[f"blocks.{block}.{name}"] = Plain(a * 0.2, b * 0.2, float(alpha))
    return found


def base() -> WanTransformer3DModel:
    """diffusers' model with random weights, norms and modulation too."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=CONFIG.patch_size, num_attention_heads=CONFIG.num_heads, attention_head_dim=CONFIG.head_dim,
        in_channels=CONFIG.in_dim, out_channels=CONFIG.out_dim, text_dim=CONFIG.text_dim, freq_dim=CONFIG.freq_dim,
        ffn_dim=CONFIG.ffn_dim, num_layers=CONFIG.num_layers,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "scale_shift_table" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def native_state(model: WanTransformer3DModel) -> dict[str, Tensor]:
    return {diffusers_to_native(name): value.detach().clone() for name, value in model.state_dict().items()}


def merged(state: dict[str, Tensor], updates: dict[str, Plain], strength: float = 1.0) -> dict[str, Tensor]:
    """The closed formula in fp64, by native name."""
    result = {name: value.double() for name, value in state.items()}
    for name, (a, b, alpha) in updates.items():
        result[f"{name}.weight"] += strength * alpha / a.shape[0] * (b.double() @ a.double())
    return result


def kohya_file(path: Path, updates: dict[str, Plain], prefix: str = "lora_unet_") -> Path:
    tensors = {}
    for name, (a, b, alpha) in updates.items():
        key = prefix + name.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(alpha)}
    save_file(tensors, path, metadata={"ss_network_module": "networks.lora_wan"})
    return path


def diffsynth_file(path: Path, updates: dict[str, Plain], prefix: str = "") -> Path:
    """It has no alpha, which means r; so the scale goes into B."""
    tensors = {}
    for name, (a, b, alpha) in updates.items():
        tensors[f"{prefix}{name}.lora_A.default.weight"] = a
        tensors[f"{prefix}{name}.lora_B.default.weight"] = b * (alpha / a.shape[0])
    save_file(tensors, path)
    return path
