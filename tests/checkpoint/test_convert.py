"""Conversion between HF, MM and native, against folders that diffusers writes and reads."""

import json
import os
import random
import subprocess
import sys

import pytest
import torch
from conversions import (
    ACTIONS,
    CONFIG,
    REPO,
    as_native,
    assert_diffusers_loads,
    assert_same_bits,
    bits,
    edited,
    names,
    tensors_of,
    training_run,
)
from safetensors.torch import load_file

from mm.checkpoint import convert
from mm.checkpoint.weights import open_weights


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


def test_tensors_that_only_the_original_has_are_copied(original, tmp_path, caplog):
    key = "blocks.0.attn2.norm_added_q.weight"
    richer = edited(original, tmp_path / "richer", lambda t: t.update({key: torch.arange(16.0)}))
    convert.convert_to_mm(original, tmp_path / "mm")
    with caplog.at_level("INFO"):
        convert.convert_to_hf(tmp_path / "mm", tmp_path / "out", richer)
    assert key in caplog.text
    assert_same_bits(tensors_of(tmp_path / "out"), tensors_of(richer))


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
