"""Layer-zero saves of MindSpeed to the MM format: files with its own class names, written here as it writes them."""

import argparse
import sys
import types
from collections import OrderedDict

import pytest
import torch
from conversions import as_native, assert_same_bits, names, tensors_of

from mm.checkpoint import convert
from mm.checkpoint.weights import open_weights
from mm.cli.convert import main
from mm.cli.entry import run
from mm.errors import CheckpointError

THEIRS = "mindspeed.core.distributed.layerzero.state.fqn"


@pytest.fixture
def shard_info(monkeypatch):
    """MindSpeed's class under its own name, there while files are written and gone when they are read."""
    parts = THEIRS.split(".")
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    kind = type("ShardFlattenInfo", (), {"__module__": THEIRS})
    sys.modules[THEIRS].ShardFlattenInfo = kind
    return kind


@pytest.fixture
def state(original, tmp_path):
    """The whole model in MM names."""
    convert.convert_to_mm(original, tmp_path / "expected")
    return torch.load(tmp_path / "expected" / "release" / "mp_rank_00" / "model_optim_rng.pt", weights_only=True)[
        "model"
    ]


def cut(value, world, shift):
    """Uneven vectors: parameters share a flat buffer, so that one may be on a few of the ranks alone."""
    flat = value.reshape(-1)
    ends = sorted((flat.numel() * place // world + shift) % (flat.numel() + 1) for place in range(1, world))
    return [piece.clone() for piece in torch.tensor_split(flat, ends)]


def save(root, state, shard_info, world=3, step=500, prefix="predictor.", **extra):
    """What every rank of layer-zero writes; norms are not cut, as of modules that it leaves alone."""
    folder = root / f"iter_{step:07d}"
    folder.mkdir(parents=True)
    models, infos = [OrderedDict() for _ in range(world)], {}
    for index, (name, value) in enumerate(state.items()):
        wrapped = prefix + name.replace("blocks.1.", "blocks.1._zero3_wrapped_module._checkpoint_wrapped_module.")
        pieces = [value] * world if "norm3" in name else cut(value, world, index % 5)
        for model, piece in zip(models, pieces, strict=True):
            model[wrapped] = piece
        if "norm3" not in name:
            info = shard_info()
            info.__dict__.update(
                in_shard=True, numel=1, intra_param_start_idx=0, intra_param_end_idx=1, shape=value.shape,
                tensor_model_parallel=False, partition_dim=(-1,), partition_stride=(1,),
            )  # fmt: skip
            infos[prefix + name] = info
    for rank, model in enumerate(models):
        content = {
            "args": argparse.Namespace(num_layers=2, params_dtype=torch.bfloat16), "checkpoint_version": 3.0,
            "iteration": step, "model": model, "shard_state_dict": infos,
            "parallel_state": {"tp_rank": 0, "pp_rank": 0, "dp_rank": rank, "tp_degree": 1, "pp_degree": 1,
                               "dp_degree": world, "global_rank": rank},
            "num_floating_point_operations_so_far": 0.0, **extra,
        }  # fmt: skip
        torch.save(content, folder / f"model_{rank}.pt")
    return folder


@pytest.mark.parametrize("world", [1, 3, 12])
def test_a_save_becomes_the_whole_model(original, state, shard_info, tmp_path, world):
    save(tmp_path / "run", state, shard_info, world)
    convert.layerzero_to_mm(tmp_path / "run", tmp_path / "mm")
    content = torch.load(tmp_path / "mm" / "release" / "mp_rank_00" / "model_optim_rng.pt", weights_only=True)
    assert set(content) == {"model", "checkpoint_version"}  # and no checkpoint within a checkpoint
    assert_same_bits(content["model"], state)
    assert (tmp_path / "mm" / "latest_checkpointed_iteration.txt").read_text() == "release"
    convert.convert_to_hf(tmp_path / "mm", tmp_path / "hf", original)
    assert_same_bits(tensors_of(tmp_path / "hf"), tensors_of(original))


def test_the_latest_save_is_taken_and_averaged_weights_are_not(state, shard_info, tmp_path):
    old = {name: value * 0 for name, value in state.items()}
    save(tmp_path / "run", old, shard_info, step=900)
    save(tmp_path / "run", state, shard_info, step=1000, ema_model={"predictor.head.modulation": torch.ones(1)})
    source = open_weights(tmp_path / "run")
    assert source.path.name == "iter_0001000"
    assert_same_bits(as_native(tmp_path / "run"), as_native(tmp_path / "expected"))
    assert not as_native(tmp_path / "run" / "iter_0000900")["head.head.bias"].any()


def test_a_prefix_is_not_needed_and_stages_are_cut(state, shard_info, tmp_path):
    save(tmp_path / "run", state, shard_info, prefix="")
    words = ["--mode", "layerzero_to_mm", "--source_path", tmp_path / "run", "--target_path", tmp_path / "mm"]
    assert run(main, [str(word) for word in [*words, "--pp_vpp_layers", "[1,1]"]]) == 0
    assert names(tmp_path / "mm" / "release") == ["mp_rank_00_000", "mp_rank_00_001"]
    assert_same_bits(as_native(tmp_path / "mm"), as_native(tmp_path / "expected"))


def changed(folder, rank, change):
    file = folder / f"model_{rank}.pt"
    content = torch.load(file, weights_only=False)
    change(content)
    torch.save(content, file)


NAME = "predictor.head.head.weight"
DAMAGES = {
    "a rank is missing": (lambda f: (f / "model_1.pt").unlink(), "CKPT-045", "no model_1.pt"),
    "the last rank is missing": (lambda f: (f / "model_2.pt").unlink(), "CKPT-045", "elements of"),
    "two ranks changed places": (lambda f: (f / "model_1.pt").write_bytes((f / "model_2.pt").read_bytes()), "CKPT-045",
                                 "rank 2"),
    "a parameter is missing": (lambda f: changed(f, 1, lambda c: c["model"].pop(NAME)), "CKPT-045", "different"),
    "elements are missing": (
        lambda f: changed(f, 1, lambda c: c["model"].update({NAME: c["model"][NAME][:-1]})), "CKPT-045", NAME),
    "another dtype": (
        lambda f: changed(f, 1, lambda c: c["model"].update({NAME: c["model"][NAME].double()})), "CKPT-045", NAME),
    "tensor parallel": (lambda f: changed(f, 0, lambda c: c["parallel_state"].update(tp_degree=2)), "CKPT-018", "TP 2"),
    "a pipeline": (lambda f: changed(f, 0, lambda c: c["parallel_state"].update(pp_degree=4)), "CKPT-018", "PP 4"),
    "no shapes": (lambda f: changed(f, 0, lambda c: c.pop("shard_state_dict")), "CKPT-021", "shard_state_dict"),
    "a foreign class": (lambda f: changed(f, 2, lambda c: c.update(extra=Foreign())), "CKPT-021", "model_2.pt"),
    "megatron's folder beside": (lambda f: (f / "mp_rank_00").mkdir(), "CKPT-042", "mp_rank_*"),
}  # fmt: skip


class Foreign:
    """No class that is allowed."""


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_are_not_one_save_are_refused(state, shard_info, tmp_path, damage):
    change, identifier, text = DAMAGES[damage]
    change(save(tmp_path / "run", state, shard_info))
    with pytest.raises(CheckpointError) as caught:
        convert.layerzero_to_mm(tmp_path / "run", tmp_path / "mm")
    assert caught.value.id == identifier, str(caught.value)
    assert text in str(caught.value)
    assert not (tmp_path / "mm").exists()


def test_other_formats_are_refused(state, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        convert.layerzero_to_mm(tmp_path / "expected", tmp_path / "mm")
    assert caught.value.id == "CKPT-046"
