"""Opening weights by content, loading them into a model, and files that must not run code."""

import argparse
import os
import pickle

import pytest
import torch
from conversions import CONFIG, as_native, assert_same_bits, copy_of, training_run
from loaded import load_into

from mm.checkpoint import convert
from mm.checkpoint.store import save, whole_piece
from mm.checkpoint.weights import open_weights
from mm.errors import CheckpointError, DataError
from mm.wan.model import WanModel


@pytest.fixture
def formats(original, tmp_path):
    """The same model in every format, and the label each must be given."""
    convert.convert_to_mm(original, tmp_path / "mm")
    convert.convert_to_native(original, tmp_path / "native")
    training_run(original, tmp_path / "run")
    return {
        original: "diffusers weights",
        tmp_path / "native": "native weights",
        tmp_path / "native" / "diffusion_pytorch_model.safetensors": "native weights",
        tmp_path / "mm": "MM weights",
        tmp_path / "mm" / "release": "MM weights",
        tmp_path / "run": "a training checkpoint",
        tmp_path / "run" / "iter_0000010": "a training checkpoint",
    }


def test_every_format_is_recognised_and_gives_the_same_model(formats, original):
    expected = {name: tensor.float() for name, tensor in as_native(original).items()}
    for path, label in formats.items():
        source = open_weights(str(path))
        assert source.label == label
        assert source.config() == CONFIG
        model = WanModel(CONFIG)
        load_into(model, source)
        assert_same_bits({name: p.detach() for name, p in model.named_parameters()}, expected)
        assert source.shapes() == {name: kind.shape for name, kind in source.kinds().items()}


def test_a_model_of_another_shape_is_refused_and_unchanged(original):
    model = WanModel(CONFIG.model_copy(update={"num_layers": 3, "ffn_dim": 32}))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(CheckpointError) as caught:
        load_into(model, open_weights(original))
    assert caught.value.id == "CKPT-011"
    assert "blocks.2." in str(caught.value)
    assert "blocks.0.ffn.0.weight is [24, 16] there, [32, 16] here" in str(caught.value)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_training_wins_over_converted_over_source_in_one_folder(original, tmp_path):
    folder = copy_of(original, tmp_path / "one")
    assert open_weights(folder).label == "diffusers weights"
    convert.convert_to_mm(folder, folder)
    assert open_weights(folder).label == "MM weights"
    training_run(original, folder)
    assert open_weights(folder).label == "a training checkpoint"


def test_what_is_no_weights(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    for path, kind, identifier in (
        (tmp_path / "empty", CheckpointError, "CKPT-019"),
        (tmp_path, CheckpointError, "CKPT-019"),
        (tmp_path / "absent", DataError, "DATA-020"),
        (tmp_path / "notes.txt", DataError, "DATA-020"),
    ):
        with pytest.raises(kind) as caught:
            open_weights(path)
        assert caught.value.id == identifier
        assert str(path) in str(caught.value)
    save(tmp_path / "run", 1, [whole_piece("optimizer.x", torch.ones(1))], {})
    with pytest.raises(CheckpointError) as caught:
        open_weights(tmp_path / "run")
    assert caught.value.id == "CKPT-019"


def mm_file(root):
    folder = root / "release" / "mp_rank_00"
    folder.mkdir(parents=True)
    (root / "latest_checkpointed_iteration.txt").write_text("release")
    return folder / "model_optim_rng.pt"


class Malice:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("place", ["value", "top", "legacy", "plain pickle"])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, place):
    canary = tmp_path / "canary"
    file = mm_file(tmp_path)
    content = {"model": {"blocks.0.ffn.0.weight": torch.ones(2)}, "args": Malice(canary)}
    if place == "value":
        content = {"model": {"blocks.0.ffn.0.weight": Malice(canary)}}
    if place == "plain pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=place != "legacy")
    with pytest.raises(CheckpointError) as caught:
        open_weights(tmp_path)
    assert caught.value.id == "CKPT-021"
    assert not canary.exists()
    torch.load(file, weights_only=False) if place != "plain pickle" else pickle.loads(file.read_bytes())
    assert canary.exists()  # the file is dangerous indeed


@pytest.mark.parametrize(
    "content",
    [b"", b"not a checkpoint", None, [1], {"state_dict": {}}, {"model": {"a": 1}}, {"model": [torch.ones(1)]}],
)
def test_other_contents_of_an_mm_file_are_refused(tmp_path, content):
    file = mm_file(tmp_path)
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(CheckpointError) as caught:
        open_weights(tmp_path)
    assert caught.value.id == "CKPT-021"
    assert str(file) in str(caught.value)


def test_a_training_save_of_mindspeed_is_read(original, tmp_path):
    """With the parsed arguments and the entries without tensors that Megatron adds."""
    convert.convert_to_mm(original, tmp_path / "mm")
    state = torch.load(tmp_path / "mm" / "release" / "mp_rank_00" / "model_optim_rng.pt", weights_only=True)["model"]
    folder = tmp_path / "run" / "iter_0005000" / "mp_rank_00"
    folder.mkdir(parents=True)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("5000")
    arguments = argparse.Namespace(lr=1e-5, params_dtype=torch.bfloat16, data_path=None)
    state["blocks.0.self_attn.proj_q._extra_state"] = None
    torch.save(
        {"model": state, "checkpoint_version": 3.0, "iteration": 5000, "args": arguments},
        folder / "model_optim_rng.pt",
    )
    source = open_weights(tmp_path / "run")
    assert source.config() is None
    assert_same_bits({name: source.read(name) for name in source.shapes()}, as_native(original))
    convert.convert_to_hf(tmp_path / "run", tmp_path / "hf", original)


def test_tensor_parallelism_is_refused_by_name(tmp_path):
    file = mm_file(tmp_path)
    torch.save({"model": {}}, file)
    (tmp_path / "release" / "mp_rank_01").mkdir()
    with pytest.raises(CheckpointError) as caught:
        open_weights(tmp_path)
    assert caught.value.id == "CKPT-018"
    assert "mp_rank_01" in str(caught.value)


@pytest.mark.parametrize("text", ["", "7", "../../etc", "release2"])
def test_a_tracker_that_names_nothing_is_an_error(tmp_path, text):
    torch.save({"model": {}}, mm_file(tmp_path))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        open_weights(tmp_path)
    assert caught.value.id == "CKPT-010"
