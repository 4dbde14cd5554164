"""Files of other people: pickles that would run code, and indexes and manifests that point out of their folder.

Each pickle is run once by the unsafe reader afterwards, which shows that it was dangerous.
"""

import builtins
import importlib
import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conversions import CONFIG, names, training_run
from safetensors.torch import save_file

from mm.checkpoint import convert
from mm.checkpoint.weights import open_weights
from mm.errors import CheckpointError, DataError

NAME = "blocks.0.ffn.0.weight"


class Calls:
    """Pickles as a call of `function`; `state` is set on what it returns."""

    def __init__(self, function, *arguments, state=None):
        self.result = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.result


class Setter:
    """Runs code when its state is set: no argument of its own does harm."""

    def __init__(self, canary=None):
        self.canary = canary

    def __setstate__(self, state):
        Path(state["canary"]).touch()


class Dict(dict):
    """Runs code when an item is stored in it."""

    def __setitem__(self, key, value):
        Path(value).touch()


VECTORS = {
    "a command": lambda canary: Calls(os.system, f"touch {canary}"),
    "a process": lambda canary: Calls(subprocess.check_call, ["touch", str(canary)]),
    "source text": lambda canary: Calls(builtins.exec, f"open({str(canary)!r}, 'w').close()"),
    "an expression": lambda canary: Calls(builtins.eval, f"open({str(canary)!r}, 'w').close()"),
    "a file that is opened": lambda canary: Calls(builtins.open, str(canary), "w"),
    "a method by its name": lambda canary: Calls(getattr(Path(canary), "touch")),  # noqa: B009
    "a state that is set": lambda canary: Setter(str(canary)),
    "an item that is stored": lambda canary: Dict(x=str(canary)),
}


def pt_files(folder, content):
    """The same content as MM file, as the second stage of a pipeline, and as a layer-zero save."""
    whole = folder / "whole" / "mp_rank_00" / "model_optim_rng.pt"
    stage = folder / "stages" / "mp_rank_00_001" / "model_optim_rng.pt"
    rank = folder / "zero" / "model_0.pt"
    for file in (whole, stage, rank):
        file.parent.mkdir(parents=True)
        torch.save(content, file)
    first = folder / "stages" / "mp_rank_00_000" / "model_optim_rng.pt"
    first.parent.mkdir()
    torch.save({"model": {NAME: torch.ones(2)}}, first)
    return {whole: folder / "whole", stage: folder / "stages", rank: folder / "zero"}


@pytest.mark.parametrize("vector", VECTORS)
def test_no_pickle_runs_code(tmp_path, vector):
    canary = tmp_path / "canary"
    malice = VECTORS[vector](canary)
    content = {
        "model": {NAME: torch.ones(2)},
        "shard_state_dict": {},
        "parallel_state": {"global_rank": 0},
        "x": malice,
    }
    files = pt_files(tmp_path, content)
    for path in files.values():
        with pytest.raises(CheckpointError) as caught:
            open_weights(path)
        assert caught.value.id == "CKPT-021"
        assert ", which could run code" in str(caught.value)
        assert not canary.exists()
    torch.load(next(iter(files)), weights_only=False)
    assert canary.exists()


def test_a_class_that_is_allowed_by_name_is_not_theirs(tmp_path):
    """The name of MindSpeed's record stands for a class of ours: no module of that name is imported."""
    source = tmp_path / "site" / "mindspeed" / "core" / "distributed" / "layerzero" / "state"
    source.mkdir(parents=True)
    (source / "fqn.py").write_text(
        f"open({str(tmp_path / 'canary')!r}, 'w').close()\nclass ShardFlattenInfo:\n    pass\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path / "site"))
        module = importlib.import_module("mindspeed.core.distributed.layerzero.state.fqn")
        info = module.ShardFlattenInfo()
        info.shape = torch.Size([2])
        content = {"model": {NAME: torch.ones(2)}, "shard_state_dict": {NAME: info}}
        (tmp_path / "zero").mkdir()
        torch.save({**content, "parallel_state": {"global_rank": 0}}, tmp_path / "zero" / "model_0.pt")
        for name in [name for name in importlib.sys.modules if name.split(".")[0] == "mindspeed"]:
            patch.delitem(importlib.sys.modules, name)
        (tmp_path / "canary").unlink()
        assert open_weights(tmp_path / "zero").shapes() == {NAME: (2,)}
        assert not (tmp_path / "canary").exists()


def test_pickles_under_other_names_are_not_weights(tmp_path):
    for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin", "model.ckpt", "model.pth"):
        (tmp_path / name).write_bytes(pickle.dumps(Calls(os.system, f"touch {tmp_path / 'canary'}")))
    with pytest.raises(CheckpointError) as caught:
        open_weights(tmp_path)
    assert caught.value.id == "CKPT-019"
    assert not (tmp_path / "canary").exists()


ESCAPES = {
    "the folder above": "../secret.safetensors",
    "an absolute path": "{root}/secret.safetensors",
    "below and up again": "sub/../../secret.safetensors",
    "a folder below": "sub/inside.safetensors",
    "a dot in front": "./inside.safetensors",
    "a home": "~/secret.safetensors",
    "a backslash": "..\\secret.safetensors",
    "a NUL": "inside.safetensors\0.safetensors",
    "an address": "file://{root}/secret.safetensors",
    "nothing": "",
}


@pytest.fixture
def place(tmp_path):
    """A folder with one shard, and a secret beside it that no index may reach."""
    folder = tmp_path / "weights"
    (folder / "sub").mkdir(parents=True)
    for file in (folder / "inside.safetensors", folder / "sub" / "inside.safetensors", tmp_path / "secret.safetensors"):
        save_file({NAME: torch.ones(2)}, file)
    return folder


@pytest.mark.parametrize("escape", ESCAPES)
def test_an_index_names_files_of_its_folder_alone(place, tmp_path, escape):
    shard = ESCAPES[escape].format(root=tmp_path)
    (place / "x.safetensors.index.json").write_text(json.dumps({"weight_map": {NAME: shard}}))
    with pytest.raises(DataError) as caught:
        open_weights(place)
    # A backslash is no separator here and "~" is no home: these are names, of files that are not there.
    assert caught.value.id == ("DATA-024" if escape == "a backslash" else "DATA-023"), str(caught.value)


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_manifest_names_shards_of_its_folder_alone(original, tmp_path, escape):
    training_run(original, tmp_path / "run")
    folder = tmp_path / "run" / "iter_0000010"
    (shard,) = folder.glob("shard-*")
    shutil.copy(shard, tmp_path / "secret.safetensors")
    text = (folder / "manifest.json").read_text()
    renamed = json.dumps(ESCAPES[escape].format(root=tmp_path))[1:-1]
    (folder / "manifest.json").write_text(text.replace(shard.name, renamed))
    with pytest.raises(CheckpointError) as caught:
        convert.convert_to_native(folder, tmp_path / "out")
    assert caught.value.id == "CKPT-012"
    assert "out" not in names(tmp_path)


@pytest.mark.parametrize("text", ["../../release", "/etc", "release/..", "iter_0000010", "-1", "1e1", "release\0", "٣"])
def test_a_tracker_names_a_step_alone(tmp_path, text):
    (tmp_path / "release").mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        open_weights(tmp_path)
    assert caught.value.id == "CKPT-010"


def test_the_model_of_these_tests_is_one(original):
    """What the damages were made of is sound."""
    assert open_weights(original).config() == CONFIG
