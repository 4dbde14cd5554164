"""What other programs find in the two files beside a checkpoint, by small models of how each of them matches keys.

diffusers is the library itself; the others are written from their documented rules, without any of `mm.lora`.
"""

from collections.abc import Callable
from pathlib import Path

import lora_example as example
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from published_names import diffusers_to_native
from safetensors.torch import load_file
from torch import Tensor

from mm.checkpoint.formats.folder import PEFT_FILE
from mm.lora.adapter import Adapter, Update
from mm.lora.files import COMFYUI_FILE, write_adapter

State = dict[str, Tensor]
LINEARS = [f"blocks.{block}.{name}" for block in range(example.CONFIG.num_layers) for name in example.LINEARS]


def delta(up: Tensor, down: Tensor, alpha: Tensor | None) -> Tensor:
    return up @ down * (1.0 if alpha is None else alpha.item() / down.shape[0])


def by_pairs(state: State, names: dict[str, str]) -> State:
    """Looks for the halves of every name that the model could have in a file."""
    found = {}
    for name, linear in names.items():
        for up, down in (("lora_up", "lora_down"), ("lora_B", "lora_A"), ("lora.up", "lora.down")):
            if f"{name}.{up}.weight" in state:
                halves = state[f"{name}.{up}.weight"], state[f"{name}.{down}.weight"]
                found[linear] = delta(*halves, state.get(f"{name}.alpha"))
    return found


def comfyui(state: State) -> State:
    """Native names after diffusion_model., or with underscores after lora_unet_."""
    names = {f"diffusion_model.{linear}": linear for linear in LINEARS}
    return by_pairs(state, names | {f"lora_unet_{linear.replace('.', '_')}": linear for linear in LINEARS})


def wrapper(state: State) -> State:
    """ComfyUI-WanVideoWrapper: what does not begin with diffusion_model. is dropped, the rest looked up without it."""
    inside = {key.removeprefix("diffusion_model."): value for key, value in state.items()
              if key.startswith("diffusion_model.")}  # fmt: skip
    return by_pairs(inside, {linear: linear for linear in LINEARS})


def videox_fun(state: State) -> State:
    """The part before the first dot is a layer's name with underscores; halves are lora_up and lora_down."""
    layers: dict[str, State] = {}
    for key, value in state.items():
        if "diffusion_model." in key:
            key = key.replace("diffusion_model.", "lora_unet__").replace("blocks.", "blocks_")
            for part in ("self_attn", "cross_attn", "ffn"):
                key = key.replace(f".{part}.", f"_{part}_")
        layer, _, element = key.partition(".")
        layers.setdefault(layer, {})[element] = value
    return {
        linear: delta(parts["lora_up.weight"], parts["lora_down.weight"], parts.get("alpha"))
        for linear in LINEARS
        if (parts := layers.get(f"lora_unet__{linear.replace('.', '_')}")) and "lora_up.weight" in parts
    }


def diffsynth(state: State) -> State:
    """Every key with the upper half gives a name: what is left without it, a part after it, and diffusion_model."""
    found = {}
    for key, value in state.items():
        up, down = ("lora_up", "lora_down") if ".lora_up." in key else ("lora_B", "lora_A")
        if f".{up}." in key:
            name = key.split(f".{up}.")[0].removeprefix("diffusion_model.")
            found[name] = delta(value, state[key.replace(up, down)], state.get(f"{key.split(f'.{up}.')[0]}.alpha"))
    return {name: value for name, value in found.items() if name in LINEARS}


def diffusers(state: State) -> State:
    model = example.base()
    WanPipeline(None, None, None, UniPCMultistepScheduler(), model).load_lora_weights(dict(state))
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default_0" in module.lora_A:
            linear = diffusers_to_native(f"{name}.weight").removesuffix(".weight")
            up, down = module.lora_B["default_0"].weight, module.lora_A["default_0"].weight
            found[linear] = up @ down * module.scaling["default_0"]
    return found


READERS: dict[str, Callable[[State], State]] = {
    "diffusers": diffusers, "ComfyUI": comfyui, "WanVideoWrapper": wrapper, "VideoX-Fun": videox_fun,
    "DiffSynth-Studio": diffsynth,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    adapter = Adapter({name: Update(*plain) for name, plain in example.adapter().items()})
    write_adapter(tmp_path / PEFT_FILE, adapter, "peft")
    write_adapter(tmp_path / COMFYUI_FILE, adapter, "comfyui")
    return tmp_path


@torch.no_grad()
@pytest.mark.parametrize("reader", READERS)
def test_the_file_in_comfyui_names_is_exact_in_every_reader(folder: Path, reader: str):
    found = READERS[reader](load_file(folder / COMFYUI_FILE))
    assert sorted(found) == sorted(LINEARS)
    for name, (a, b, alpha) in example.adapter().items():
        expected = alpha / a.shape[0] * (b.double() @ a.double())
        assert (found[name].double() - expected).abs().max() <= 1e-6, name


@torch.no_grad()
def test_a_folder_with_both_files_is_what_diffusers_takes_the_right_one_from(folder: Path):
    model, other = example.base(), example.base()
    WanPipeline(None, None, None, UniPCMultistepScheduler(), model).load_lora_weights(folder)
    WanPipeline(None, None, None, UniPCMultistepScheduler(), other).load_lora_weights(folder / PEFT_FILE)
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@torch.no_grad()
@pytest.mark.parametrize("reader", ["ComfyUI", "WanVideoWrapper", "VideoX-Fun", "DiffSynth-Studio"])
def test_why_there_are_two_files(folder: Path, reader: str):
    """In diffusers' names the others find no linear, and say nothing."""
    assert READERS[reader](load_file(folder / PEFT_FILE)) == {}
