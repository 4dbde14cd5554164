"""Conversions into the folder of their source, as MindSpeed-MM's guide has them, and kills in the middle of one."""

import shutil
from pathlib import Path

import pytest
import torch
from conversions import (
    assert_diffusers_loads,
    assert_same_bits,
    copy_of,
    killed,
    names,
    read_native,
    read_native_of,
    tensors_of,
)
from safetensors.torch import load_file

from mm.checkpoint import convert
from mm.checkpoint.store import save, whole_piece
from mm.checkpoint.weights import open_weights
from mm.cli.convert import main
from mm.cli.entry import run
from mm.errors import CheckpointError


def test_the_guides_own_example_writes_into_the_source_folder(original, tmp_path):
    folder = copy_of(original, tmp_path / "transformer")
    convert.convert_to_mm(folder, folder)
    assert set(names(folder)) - set(names(original)) == {
        "release", "latest_checkpointed_iteration.txt", "mm_config.json",
    }  # fmt: skip
    assert open_weights(folder).label == "MM weights"
    convert.convert_to_hf(folder, tmp_path / "back", folder)
    assert_same_bits(tensors_of(tmp_path / "back"), tensors_of(original))
    with pytest.raises(CheckpointError) as caught:
        convert.convert_to_mm(folder, folder)
    assert caught.value.id == "CKPT-020"


@pytest.mark.parametrize("kind", ["a run", "mm"])
@pytest.mark.parametrize("like", [True, False], ids=["as the original", "new files"])
def test_the_guides_way_back_adds_to_the_folder_of_the_checkpoints(original, tmp_path, kind, like):
    """Source and target are one folder there. What is in it stays, and is what training goes on with."""
    folder, state = tmp_path / "saved", tensors_of(original)
    if kind == "mm":
        convert.convert_to_mm(original, folder)
    else:
        source = open_weights(original)
        pieces = [whole_piece(f"model.{name}", source.read(name)) for name in source.shapes()]
        save(folder, 7, pieces, {"step": 7, "wan_config": source.config().model_dump(mode="json")})
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    words = ["--mode", "convert_to_hf", "--source_path", str(folder), "--target_path", str(folder)]
    words += ["--ckpt_path", str(original)] if like else []
    assert run(main, words) == 0
    assert all(file.read_bytes() == data for file, data in before.items())
    added = {file.name for file in folder.rglob("*") if file.is_file() and file not in before}
    assert added == (set(names(original)) if like else {"config.json", "diffusion_pytorch_model.safetensors"})
    assert not list(folder.glob(".tmp*"))
    assert_same_bits({name: value for file in added if file.endswith(".safetensors")
                      for name, value in load_file(folder / file).items()}, state)  # fmt: skip
    assert_diffusers_loads(folder)
    assert open_weights(folder).label == ("MM weights" if kind == "mm" else "a training checkpoint")
    with pytest.raises(CheckpointError, match=r"CKPT-020.*config.json exists") as caught:
        convert.convert_to_hf(folder, folder, original if like else None)
    assert "delete" not in str(caught.value)


@pytest.mark.parametrize("fails", ["while writing", "while moving"])
def test_a_failed_way_back_leaves_the_folder_as_it_was(original, tmp_path, fails, monkeypatch):
    folder = tmp_path / "saved"
    convert.convert_to_mm(original, folder)
    before = sorted(folder.rglob("*"))
    if fails == "while writing":
        file = folder / "release" / "mp_rank_00" / "model_optim_rng.pt"
        content = torch.load(file, weights_only=True)
        content["model"]["head.head.bias"][0] = float("nan")
        torch.save(content, file)
    else:
        rename, moved = Path.rename, []

        def refused(self, target):
            moved.append(target)
            if len(moved) == 3:
                raise OSError(28, "No space left on device", str(target))
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(CheckpointError, match=r"CKPT-016|CKPT-031"):
        convert.convert_to_hf(folder, folder, original)
    assert sorted(folder.rglob("*")) == before


def test_a_folder_of_weights_themselves_is_no_target_of_its_own(original, tmp_path):
    folder = copy_of(original, tmp_path / "hf")
    convert.convert_to_mm(folder, tmp_path / "mm")
    for target in (folder, tmp_path / "mm" / "release"):
        before = sorted(target.rglob("*"))
        with pytest.raises(CheckpointError, match="CKPT-020") as caught:
            convert.convert_to_hf(target, target, original)
        assert "delete" not in str(caught.value)
        assert sorted(target.rglob("*")) == before


def in_mm_format(original, folder):
    """Files of weights that `convert_to_hf` adds to, as MindSpeed-MM's guide has them."""
    convert.convert_to_mm(original, folder)
    return folder


@pytest.mark.parametrize("moved", [0, 1, 2, 3])
def test_a_kill_while_a_release_is_added_is_finished_by_the_same_command(original, tmp_path, moved):
    """The source's own folder gets `release/`, mm_config.json and, last, the tracker; a kill may come between them."""
    folder = tmp_path / "weights"
    shutil.copytree(original, folder)
    before = names(folder)
    killed(f"convert.entry_moved:{moved}:kill9" if moved else "convert.files_written:1:kill9",
           convert.convert_to_mm, folder, folder)  # fmt: skip
    left = [name for name in names(folder) if not name.startswith(".tmp-")]
    assert len(left) == len(before) + moved
    words = ["--mode", "convert_to_mm", "--source_path", str(folder), "--target_path", str(folder)]
    assert run(main, words) == (74 if moved == 3 else 0), "with the tracker it was finished"
    added = ["latest_checkpointed_iteration.txt", "mm_config.json", "release"]
    assert [name for name in names(folder) if not name.startswith(".tmp-")] == sorted([*before, *added])
    convert.convert_to_native(folder, tmp_path / "back")
    assert_same_bits(read_native(tmp_path / "back"), read_native_of(original, tmp_path))


@pytest.mark.parametrize("moved", [1, 2])
def test_a_kill_while_hf_files_are_added_is_finished_by_the_same_command(original, tmp_path, moved):
    folder = in_mm_format(original, tmp_path / "mm")
    killed(f"convert.entry_moved:{moved}:kill9", convert.convert_to_hf, folder, folder, original)
    assert not (folder / "config.json").exists()
    words = ["--mode", "convert_to_hf", "--source_path", str(folder), "--target_path", str(folder)]
    assert run(main, [*words, "--max_shard_size", "20KB"]) == 74, "other files than the first run's"
    assert run(main, [*words, "--ckpt_path", str(original)]) == 0
    assert_same_bits(tensors_of(folder), tensors_of(original))


def test_what_another_conversion_left_is_not_taken_over(original, tmp_path, caplog):
    folder = tmp_path / "weights"
    shutil.copytree(original, folder)
    killed("convert.entry_moved:2:kill9", convert.convert_to_mm, folder, folder, ((1, 1),))
    left = names(folder)
    with pytest.raises(CheckpointError, match=r"CKPT-020.*release"):
        convert.convert_to_mm(folder, folder)
    assert names(folder) == left
    assert "was left by an interrupted conversion" in caplog.text
