"""Adapters of side blocks: diffusers' VACE reads our file, and what other tools write of them is read."""

from pathlib import Path

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanVACEPipeline, WanVACETransformer3DModel
from lora_example import LINEARS, Plain, diffsynth_file, kohya_file
from peft.utils import get_peft_model_state_dict
from published_names import diffusers_to_native
from safetensors.torch import load_file, save_file

from mm.checkpoint.formats.folder import PEFT_FILE
from mm.checkpoint.weights import open_weights
from mm.config.model import WanConfig
from mm.errors import DataError
from mm.lora.adapter import Adapter, Update, merge, require_fit
from mm.lora.convert import read_any
from mm.lora.files import read_adapter, write_adapter
from mm.lora.mindspeed import write_mindspeed
from mm.lora.targets import linears_of
from mm.wan.model import WanModel, whole_shapes

CONFIG = WanConfig(
    model_type="vace", vace_layers=(0, 2), text_dim=16, text_len=6, hidden_size=24, ffn_dim=40, num_heads=2,
    num_layers=3, freq_dim=16,
)  # fmt: skip


def updates() -> dict[str, Plain]:
    """Of all linears of the side blocks, and of one beside them."""
    random = torch.Generator().manual_seed(3)
    names = [f"vace_blocks.{block}.{name}" for block in (0, 1) for name in LINEARS] + ["blocks.1.self_attn.q"]
    found = {}
    for index, name in enumerate(names):
        out, inner = LINEARS[name.split(".", 2)[2]]
        rank = 2 + index % 3
        a, b = torch.randn(rank, inner, generator=random), torch.randn(out, rank, generator=random)
        found[name] = Plain(a * 0.2, b * 0.2, (float(rank), 1.0, 7.0)[index % 3])
    return found


def ours() -> Adapter:
    return Adapter({name: Update(*plain) for name, plain in updates().items()})


def diffusers_model() -> WanVACETransformer3DModel:
    torch.manual_seed(0)
    model = WanVACETransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=16, ffn_dim=40, num_layers=3,
        vace_layers=[0, 2],
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2 or not parameter.any():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    state = {diffusers_to_native(name): value.contiguous() for name, value in diffusers_model().state_dict().items()}
    save_file(state, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def inputs() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(1, 16, 2, 4, 6, generator=random),
        "timestep": torch.tensor([637.0]),
        "text": torch.randn(1, 6, 16, generator=random),
        "vace_context": torch.randn(1, 96, 2, 4, 6, generator=random),
    }


@torch.no_grad()
def theirs(model: WanVACETransformer3DModel) -> torch.Tensor:
    given = inputs()
    beside = {"control_hidden_states": given["vace_context"], "control_hidden_states_scale": torch.ones(2)}
    return model(given["latents"], given["timestep"], given["text"], **beside, return_dict=False)[0]


@torch.no_grad()
def of_merged(file: Path, base: Path) -> torch.Tensor:
    model = WanModel(CONFIG)
    model.load_state_dict(dict(merge(open_weights(base), read_any(file))))
    return model.velocity(**inputs())


def difference(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value - expected).abs().max() / expected.abs().max()).item()


def test_diffusers_reads_our_file_as_we_merge_it(tmp_path: Path, base: Path) -> None:
    write_adapter(tmp_path / "adapter" / PEFT_FILE, ours(), "peft")
    model = diffusers_model()
    plain = theirs(model)
    pipeline = WanVACEPipeline(None, None, None, UniPCMultistepScheduler(), model)
    pipeline.load_lora_weights(tmp_path / "adapter")
    expected = theirs(model)
    assert difference(plain, expected) > 0.05  # the adapter does something
    assert difference(of_merged(tmp_path / "adapter", base), expected) <= 1e-5
    loaded = get_peft_model_state_dict(model, adapter_name=model.active_adapters()[0])
    assert len(loaded) == 2 * len(updates())  # none was left out
    assert "vace_blocks.1.attn1.to_q.lora_A.weight" in loaded


def test_files_of_other_tools_and_back(tmp_path: Path, base: Path) -> None:
    """ComfyUI's names are native behind diffusion_model., kohya's with underscores, DiffSynth's native."""
    write_adapter(tmp_path / "peft.safetensors", ours(), "peft")
    write_adapter(tmp_path / "comfyui.safetensors", ours(), "comfyui")
    write_mindspeed(tmp_path / "mm", ours())
    files = [
        tmp_path / "comfyui.safetensors",
        tmp_path / "mm",
        kohya_file(tmp_path / "kohya.safetensors", updates()),
        diffsynth_file(tmp_path / "diffsynth.safetensors", updates()),
    ]
    assert "diffusion_model.vace_blocks.1.self_attn.q.lora_down.weight" in load_file(files[0])
    expected = of_merged(tmp_path / "peft.safetensors", base)
    for file in files:
        assert difference(of_merged(file, base), expected) <= 1e-6, file


def test_an_adapter_of_a_projection_is_merged_and_not_trained(tmp_path: Path, base: Path) -> None:
    """Of tools that adapt every linear."""
    a, b = torch.randn(2, 24), torch.randn(24, 2)
    write_adapter(tmp_path / "all.safetensors", Adapter({"vace_blocks.0.after_proj": Update(a, b, 2.0)}), "peft")
    adapter = read_adapter(tmp_path / "all.safetensors")
    merged, before = dict(merge(open_weights(base), adapter)), open_weights(base)
    name = "vace_blocks.0.after_proj.weight"
    assert torch.allclose(merged[name], before.read(name) + b @ a)
    with pytest.raises(DataError, match=r"DATA-093.*after_proj is none of the model's linears"):
        require_fit(adapter, linears_of(whole_shapes(CONFIG)))
