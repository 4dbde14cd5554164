"""A run begins with the same loss from every format of the same weights."""

from pathlib import Path

import torch
from training_runs import WEIGHTS, run

from mm.checkpoint import convert
from mm.checkpoint.weights import open_weights
from mm.wan.names import native_to_mindspeed


def layer_zero_save(source: Path, folder: Path) -> None:
    """Two ranks' files of a module that cuts nothing: both have the whole of every parameter."""
    weights = open_weights(source)
    state = {f"predictor.{native_to_mindspeed(name)}": weights.read(name).clone() for name in weights.shapes()}
    folder.mkdir(parents=True)
    for rank in range(2):
        content = {"model": state, "shard_state_dict": {}, "parallel_state": {"global_rank": rank}}
        torch.save(content, folder / f"model_{rank}.pt")


def test_the_first_loss_is_that_of_the_hugging_face_folder(demo: Path, tmp_path: Path) -> None:
    run(demo, tmp_path / "trained", train_iters=5)  # the head of a new model is zero, and hides all before it
    source = tmp_path / "hf"
    convert.convert_to_hf(tmp_path / "trained", source, demo / WEIGHTS)
    num_layers = open_weights(source).config().num_layers
    convert.convert_to_mm(source, tmp_path / "stages", ((1, num_layers - 1),))
    convert.convert_to_mm(source, tmp_path / "virtual", ((1, 1), (1, num_layers - 3)))
    layer_zero_save(source, tmp_path / "zero" / "iter_0000700")
    loads = [source, tmp_path / "stages", tmp_path / "virtual" / "release", tmp_path / "zero"]
    first = [run(demo, tmp_path / f"run{i}", train_iters=1, load=load)[0] for i, load in enumerate(loads)]
    assert [row["loss_hex"] for row in first] == [first[0]["loss_hex"]] * len(loads)
    assert run(demo, tmp_path / "other", train_iters=1)[0]["loss"] != first[0]["loss"]
