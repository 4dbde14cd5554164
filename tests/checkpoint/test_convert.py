"""Conversion between HF, MM and native, against folders that diffusers writes and reads."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from mm.checkpoint import convert, fault
from mm.checkpoint.store import save, whole_piece
from mm.checkpoint.weights import open_weights
from mm.cli.convert import main
from mm.cli.entry import run
from mm.config.model import WanConfig
from mm.errors import CheckpointError

REPO = Path(__file__).resolve().parents[2]
CONFIG = WanConfig(hidden_size=16, ffn_dim=24, num_heads=2, num_layers=2, text_dim=12, freq_dim=8)
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


def test_hf_to_mm_to_hf_gives_the_same_bytes_names_and_index(original, tmp_path):
    convert.convert_to_mm(original, tmp_path / "mm")
    convert.convert_to_hf(tmp_path / "mm", tmp_path / "back", original)
    assert names(tmp_path / "back") == names(original)
    for file in original.iterdir():
        copy = tmp_path / "back" / file.name
        if file.suffix == ".json":
            assert copy.read_bytes() == file.read_bytes()
        else:
            assert load_file(copy).keys() == load_file(file).keys()
            assert_same_bits(load_file(copy), load_file(file))
    assert_diffusers_loads(tmp_path / "back")
    assert names(tmp_path) == ["back", "mm"]


def test_the_mm_folder_is_what_megatron_reads(original, tmp_path):
    convert.convert_to_mm(original, tmp_path / "mm")
    assert (tmp_path / "mm" / "latest_checkpointed_iteration.txt").read_bytes() == b"release"
    file = tmp_path / "mm" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    content = torch.load(file, weights_only=True)
    assert set(content) == {"model", "checkpoint_version"}
    assert content["checkpoint_version"] == 3.0
    state, hf = content["model"], tensors_of(original)
    assert len(state) == len(hf)
    pairs = {  # the published key map, one of each kind
        "blocks.1.self_attn.proj_q.weight": "blocks.1.attn1.to_q.weight",
        "blocks.0.cross_attn.proj_out.bias": "blocks.0.attn2.to_out.0.bias",
        "blocks.1.cross_attn.k_norm.weight": "blocks.1.attn2.norm_k.weight",
        "blocks.0.ffn.0.weight": "blocks.0.ffn.net.0.proj.weight",
        "blocks.1.norm3.bias": "blocks.1.norm2.bias",
        "blocks.0.modulation": "blocks.0.scale_shift_table",
        "head.modulation": "scale_shift_table",
        "head.head.weight": "proj_out.weight",
        "text_embedding.linear_1.weight": "condition_embedder.text_embedder.linear_1.weight",
        "time_embedding.2.bias": "condition_embedder.time_embedder.linear_2.bias",
        "time_projection.1.weight": "condition_embedder.time_proj.weight",
        "patch_embedding.weight": "patch_embedding.weight",
    }
    for mm_name, hf_name in pairs.items():
        assert bits(state[mm_name]) == bits(hf[hf_name]), mm_name
    total = sum(tensor.numel() * tensor.element_size() for tensor in hf.values())
    assert file.stat().st_size < total + 600 * len(hf)  # each tensor once, not the storage of its shard


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


def test_native_has_official_names_and_fields_and_leads_back(original, tmp_path):
    convert.convert_to_native(original, tmp_path / "native")
    assert names(tmp_path / "native") == ["config.json", "diffusion_pytorch_model.safetensors"]
    state = load_file(tmp_path / "native" / "diffusion_pytorch_model.safetensors")
    assert bits(state["blocks.1.self_attn.q.weight"]) == bits(tensors_of(original)["blocks.1.attn1.to_q.weight"])
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    official = {
        "_class_name": "WanModel",
        "model_type": "t2v",
        "dim": 16,
        "num_heads": 2,
        "ffn_dim": 24,
        "text_len": 512,
    }
    assert official.items() <= config.items()
    assert open_weights(tmp_path / "native").config() == CONFIG
    convert.convert_to_hf(tmp_path / "native", tmp_path / "hf")
    assert names(tmp_path / "hf") == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert_same_bits(tensors_of(tmp_path / "hf"), tensors_of(original))
    assert_diffusers_loads(tmp_path / "hf")
    convert.convert_to_mm(tmp_path / "native", tmp_path / "mm")
    assert_same_bits(as_native(tmp_path / "mm"), state)


def as_native(path):
    source = open_weights(path)
    return {name: source.read(name) for name in source.shapes()}


@pytest.mark.parametrize("max_bytes", [3000, 8000, 10**9])
def test_new_shards_are_read_by_diffusers(original, tmp_path, max_bytes):
    convert.convert_to_mm(original, tmp_path / "mm")
    convert.convert_to_hf(tmp_path / "mm", tmp_path / "hf", None, max_bytes)
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    index = tmp_path / "hf" / "diffusion_pytorch_model.safetensors.index.json"
    if max_bytes == 10**9:
        assert [file.name for file in files] == ["diffusion_pytorch_model.safetensors"]
        assert not index.exists()
    else:
        assert files[1].name == f"diffusion_pytorch_model-00002-of-{len(files):05d}.safetensors"
        content = json.loads(index.read_text())
        assert set(content["weight_map"].values()) == {file.name for file in files}
        found = tensors_of(tmp_path / "hf")
        assert content["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in found.values())
        for file in files:
            tensors = load_file(file)
            assert len(tensors) == 1 or sum(t.numel() * t.element_size() for t in tensors.values()) <= max_bytes
    model = assert_diffusers_loads(tmp_path / "hf")
    assert_same_bits(tensors_of(tmp_path / "hf"), tensors_of(original))
    assert model.config.num_attention_heads == 2


def training_run(original, root, scalars=None):
    """A training checkpoint with fp32 masters of the original's weights, and optimizer moments beside them."""
    state = {name: tensor.float() for name, tensor in as_native(original).items()}
    pieces = [whole_piece(f"model.{name}", tensor) for name, tensor in state.items()]
    pieces += [whole_piece(f"optimizer.exp_avg.{name}", torch.zeros_like(tensor)) for name, tensor in state.items()]
    scalars = {"wan_config": CONFIG.model_dump(mode="json")} if scalars is None else scalars
    save(root, 10, pieces, {"step": 10, **scalars})
    return state


def test_a_training_checkpoint_becomes_the_original_again(original, tmp_path):
    state = training_run(original, tmp_path / "run")
    for path in (tmp_path / "run", tmp_path / "run" / "iter_0000010"):
        convert.convert_to_hf(path, tmp_path / path.name / "hf", original)
        assert_same_bits(tensors_of(tmp_path / path.name / "hf"), tensors_of(original))
    convert.convert_to_hf(tmp_path / "run", tmp_path / "fp32")
    assert {t.dtype for t in tensors_of(tmp_path / "fp32").values()} == {torch.float32}
    assert_diffusers_loads(tmp_path / "fp32")
    convert.convert_to_native(tmp_path / "run", tmp_path / "native")
    assert_same_bits(load_file(tmp_path / "native" / "diffusion_pytorch_model.safetensors"), state)
    convert.convert_to_mm(tmp_path / "run", tmp_path / "mm")
    assert_same_bits(as_native(tmp_path / "mm"), state)


def test_without_a_configuration_the_original_is_asked_for(original, tmp_path):
    training_run(original, tmp_path / "run", scalars={})
    for action in (convert.convert_to_hf, convert.convert_to_native, convert.convert_to_mm):
        with pytest.raises(CheckpointError) as caught:
            action(tmp_path / "run", tmp_path / "out")
        assert caught.value.id == "CKPT-023"
    convert.convert_to_hf(tmp_path / "run", tmp_path / "out", original)


def test_another_models_original_is_refused(original, tmp_path):
    other = copy_of(original, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config.update(num_attention_heads=4, attention_head_dim=4)  # the same shapes
    (other / "config.json").write_text(json.dumps(config))
    convert.convert_to_mm(original, tmp_path / "mm")
    with pytest.raises(CheckpointError) as caught:
        convert.convert_to_hf(tmp_path / "mm", tmp_path / "out", other)
    assert caught.value.id == "CKPT-024"
    assert "num_heads 2 instead of 4" in str(caught.value)
    convert.convert_to_native(original, tmp_path / "native")
    with pytest.raises(CheckpointError) as caught:
        convert.convert_to_hf(tmp_path / "mm", tmp_path / "out", tmp_path / "native")
    assert caught.value.id == "CKPT-022"
    assert not (tmp_path / "out").exists()


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


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_tensors_are_named(original, tmp_path, wrong):
    edit, text = WRONG[wrong]
    source = edited(original, tmp_path / "source", edit)
    for action in (convert.convert_to_mm, convert.convert_to_native, convert.convert_to_hf):
        with pytest.raises(CheckpointError) as caught:
            action(source, tmp_path / "out")
        assert caught.value.id == "CKPT-011"
        assert text in str(caught.value)
        assert names(tmp_path) == ["source"]


def test_tensors_that_only_the_original_has_are_copied(original, tmp_path, caplog):
    key = "blocks.0.attn2.norm_added_q.weight"
    richer = edited(original, tmp_path / "richer", lambda t: t.update({key: torch.arange(16.0)}))
    convert.convert_to_mm(original, tmp_path / "mm")
    with caplog.at_level("INFO"):
        convert.convert_to_hf(tmp_path / "mm", tmp_path / "out", richer)
    assert key in caplog.text
    assert_same_bits(tensors_of(tmp_path / "out"), tensors_of(richer))


def test_an_original_that_lacks_a_tensor_is_refused(original, tmp_path):
    poorer = edited(original, tmp_path / "poorer", WRONG["missing"][0])
    convert.convert_to_mm(original, tmp_path / "mm")
    with pytest.raises(CheckpointError) as caught:
        convert.convert_to_hf(tmp_path / "mm", tmp_path / "out", poorer)
    assert caught.value.id == "CKPT-011"
    assert "poorer" in str(caught.value)
    assert names(tmp_path) == ["mm", "poorer"]


def test_existing_targets_are_left_alone(original, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for action in (convert.convert_to_hf, convert.convert_to_native):
        for target in ("full", "file", "link"):
            with pytest.raises(CheckpointError) as caught:
                action(original, tmp_path / target)
            assert caught.value.id == "CKPT-020"
    assert names(tmp_path / "full") == ["mine"]
    (tmp_path / "empty").mkdir()
    convert.convert_to_native(original, tmp_path / "empty")
    assert len(names(tmp_path / "empty")) == 2
    for present in ("release", "latest_checkpointed_iteration.txt"):
        target = tmp_path / f"mm with {present}"
        target.mkdir()
        (target / present).write_text("1")
        with pytest.raises(CheckpointError) as caught:
            convert.convert_to_mm(original, target)
        assert caught.value.id == "CKPT-020"
        assert names(target) == [present]


ACTIONS = {
    "mm": convert.convert_to_mm,
    "hf": convert.convert_to_hf,
    "native": convert.convert_to_native,
    "like": lambda source, target: convert.convert_to_hf(source, target, source),
}


@pytest.mark.parametrize("action", ["raise", "enospc"])
@pytest.mark.parametrize("point", [p for p in fault.CONVERT_POINTS if p != "convert.committed"])
@pytest.mark.parametrize("kind", ACTIONS)
def test_an_error_leaves_nothing(original, tmp_path, monkeypatch, kind, point, action):
    monkeypatch.setenv("MM_FAULT", f"{point}:1:{action}")
    monkeypatch.setattr(fault, "_passed", Counter())
    with pytest.raises((fault.FaultInjected, CheckpointError)):
        ACTIONS[kind](original, tmp_path / "out")
    assert names(tmp_path) == []


@pytest.mark.parametrize("point", fault.CONVERT_POINTS)
def test_a_kill_leaves_nothing_or_everything_at_the_target(original, tmp_path, point):
    pid = os.fork()
    if pid == 0:  # nothing of pytest may run in the child
        try:
            os.environ["MM_FAULT"] = f"{point}:1:kill9"
            convert.convert_to_hf(original, tmp_path / "out", original)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == 9
    if point == "convert.committed":
        assert_same_bits(tensors_of(tmp_path / "out"), tensors_of(original))
    else:
        assert not (tmp_path / "out").exists()
        convert.convert_to_hf(original, tmp_path / "out", original)
        assert_same_bits(tensors_of(tmp_path / "out"), tensors_of(original))


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


def test_too_little_space_is_said_before_writing(original, tmp_path, monkeypatch):
    from test_store import files, namedtuple

    monkeypatch.setattr(files.os, "statvfs", lambda path: namedtuple("disk", "f_bavail f_frsize")(1, 4096))
    for action in ACTIONS.values():
        with pytest.raises(CheckpointError) as caught:
            action(original, tmp_path / "deep" / "out")
        assert caught.value.id == "CKPT-030"
    assert names(tmp_path) == []


def test_memory_of_a_conversion_is_about_one_tensor(tmp_path):
    """Anonymous memory, as a mapped file's pages are the system's to take back; 93 MB of weights, 8 MB the largest."""
    code = f"""
import gc, threading, time
from pathlib import Path
from mm.checkpoint import convert
from mm.checkpoint.store import save, whole_piece
from mm.config.model import WanConfig
from mm.wan.model import WanModel

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

def watch():
    while not done:
        seen.append(anonymous())
        time.sleep(0.002)

root = Path({str(tmp_path)!r})
config = WanConfig(hidden_size=512, ffn_dim=4096, num_heads=4, num_layers=3)
model = WanModel(config)
pieces = [whole_piece("model." + name, p.detach()) for name, p in model.named_parameters()]
total = sum(piece.tensor.numel() * 4 for piece in pieces)
save(root / "run", 1, pieces, {{"wan_config": config.model_dump(mode="json")}})
del model, pieces
gc.collect()
done, seen = False, [anonymous()]
thread = threading.Thread(target=watch)
thread.start()
convert.convert_to_hf(root / "run", root / "hf", None, 20_000_000)
convert.convert_to_mm(root / "hf", root / "mm")
convert.convert_to_hf(root / "mm", root / "back", root / "hf")
done = True
thread.join()
print(total, max(seen) - seen[0])
"""
    # A fixed threshold makes glibc give freed tensors back at once, so that what is measured is what is held.
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    env = {**os.environ, **allocator, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert finished.returncode == 0, finished.stderr
    total, growth = map(int, finished.stdout.split())
    assert total > 90e6
    assert growth < 12e6


def test_two_random_walks_through_the_formats_end_with_the_same_bits(original, tmp_path):
    rng = random.Random(5)
    for walk in range(2):
        current = original
        for leg in range(6):
            following = tmp_path / f"{walk}-{leg}"
            ACTIONS[rng.choice(["mm", "hf", "native"])](current, following)
            current = following
        assert_same_bits(as_native(current), as_native(original))


# The command line


def flags(*words):
    return run(main, [str(word) for word in words])


def test_the_commands_flags_in_both_spellings(original, tmp_path):
    underscored = ("--source_path", original, "--target_path", tmp_path / "mm", "--mode", "convert_to_mm")
    assert flags(*underscored) == 0
    dashed = (f"--source-path={tmp_path / 'mm'}", "--target-path", tmp_path / "hf", "--mode", "convert_to_hf")
    assert flags(*dashed, "--ckpt-path", original) == 0
    assert_same_bits(tensors_of(tmp_path / "hf"), tensors_of(original))
    assert flags("--source_path", original, "--target_path", tmp_path / "native", "--mode", "convert_to_native") == 0


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--mode", "convert_to_native", "--pp_vpp_layers", "[2]"], 64, ["CFG-073", "--pp_vpp_layers"]),
        (["--mode", "resplit"], 64, ["CFG-107", "--pp_vpp_layers"]),
        (["--mode", "convert_to_mn"], 64, ["CFG-071", "convert_to_mm"]),
        (["--mode", "convert_to_mm", "--ckpt_path", "x"], 64, ["CFG-073"]),
        ([], 64, ["--mode"]),
        (["--mode", "convert_to_mm"], 65, ["DATA-020"]),
    ],
)
def test_what_cannot_work_is_said_with_an_id(tmp_path, capsys, words, code, text):
    assert flags("--source_path", tmp_path / "absent", "--target_path", tmp_path / "out", *words) == code
    error = capsys.readouterr().err
    assert all(part in error for part in text), error
    assert names(tmp_path) == []


@pytest.mark.parametrize("script", ["tools/convert_ckpt.py", "examples/wan2.1/convert_ckpt.py"])
def test_the_scripts_run_from_any_folder(original, tmp_path, script):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = ["--source_path", original, "--target_path", "out", "--mode", "convert_to_mm"]
    done = subprocess.run(
        [sys.executable, REPO / script, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert_same_bits(as_native(tmp_path / "out"), as_native(original))
    done = subprocess.run(
        [sys.executable, REPO / script, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 74
    assert "CKPT-020" in done.stderr
    assert "Traceback" not in done.stderr
