"""A folder by diffusers that tests convert, and what they compare."""

import os
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from mm.checkpoint import convert
from mm.checkpoint.store import save, whole_piece
from mm.checkpoint.weights import open_weights
from mm.cli.convert import main
from mm.cli.entry import run
from mm.config.model import WanConfig

REPO = Path(__file__).resolve().parents[2]
CONFIG = WanConfig(hidden_size=16, ffn_dim=24, num_heads=2, num_layers=2, text_dim=12, freq_dim=8)


def tensors_of(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert bits(first[name]) == bits(second[name]), name


def read_native(folder):
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def read_native_of(original, tmp_path):
    convert.convert_to_native(original, tmp_path / "expected")
    return read_native(tmp_path / "expected")


class Loadable(WanTransformer3DModel):
    """diffusers wants the package accelerate for modules kept in fp32; files and names are read as ever."""

    _keep_in_fp32_modules = None


def assert_diffusers_loads(folder):
    model, info = Loadable.from_pretrained(folder, output_loading_info=True, low_cpu_mem_usage=False)
    assert not any(info.values()), info
    return model


def copy_of(folder, target):
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def as_native(path):
    source = open_weights(path)
    return {name: source.read(name) for name in source.shapes()}


def training_run(original, root, scalars=None):
    """A training checkpoint with fp32 masters of the original's weights, and optimizer moments beside them."""
    state = {name: tensor.float() for name, tensor in as_native(original).items()}
    pieces = [whole_piece(f"model.{name}", tensor) for name, tensor in state.items()]
    pieces += [whole_piece(f"optimizer.exp_avg.{name}", torch.zeros_like(tensor)) for name, tensor in state.items()]
    scalars = {"wan_config": CONFIG.model_dump(mode="json")} if scalars is None else scalars
    save(root, 10, pieces, {"step": 10, **scalars})
    return state


def edited(original, target, edit):
    """A copy of a folder, as one file without index, whose tensors were edited."""
    tensors = tensors_of(original)
    edit(tensors)
    target.mkdir()
    save_file(tensors, target / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (target / "config.json").write_bytes((original / "config.json").read_bytes())
    return target


WRONG = {
    "missing": (lambda t: t.pop("blocks.1.attn1.to_q.weight"), "missing: blocks.1.self_attn.q.weight"),
    "extra": (lambda t: t.update({"blocks.7.attn1.to_q.weight": torch.ones(2)}), "unexpected: blocks.7.self_attn.q"),
    "unknown": (lambda t: t.update({"blocks.0.surprise": torch.ones(2)}), "unexpected: blocks.0.surprise"),
    "shape": (lambda t: t.update({"proj_out.bias": torch.ones(65)}), "head.head.bias is [65] there, [64] here"),
}
ACTIONS = {
    "mm": convert.convert_to_mm,
    "hf": convert.convert_to_hf,
    "native": convert.convert_to_native,
    "like": lambda source, target: convert.convert_to_hf(source, target, source),
}


def killed(setting, action, *arguments):
    """Run a conversion in a process that MM_FAULT kills."""
    pid = os.fork()
    if pid == 0:  # nothing of pytest may run in the child
        try:
            os.environ["MM_FAULT"] = setting
            action(*arguments)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == 9


def flags(*words):
    """The exit code of the conversion command with these words."""
    return run(main, [str(word) for word in words])
