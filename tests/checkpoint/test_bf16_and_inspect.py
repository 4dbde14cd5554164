"""Training checkpoints as bf16 weights, by the guide's own command, and what `inspect` says of every format."""

import contextlib
import io
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conversions import (
    CONFIG,
    REPO,
    as_native,
    assert_same_bits,
    flags,
    names,
    tensors_of,
    training_run,
)
from safetensors.torch import load_file, save_file

from mm.checkpoint import convert
from mm.checkpoint.store import save, whole_piece
from mm.checkpoint.weights import open_weights
from mm.cli.convert import main, parse_size
from mm.errors import CheckpointError, ConfigError

INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.mark.parametrize("max_bytes", [10**9, 9000])
def test_a_training_checkpoint_in_bf16(original, tmp_path, max_bytes):
    state = training_run(original, tmp_path / "run")
    convert.zero_to_bf16(tmp_path / "run", tmp_path / "out", max_bytes)
    expected = {name: value.to(torch.bfloat16) for name, value in state.items()}
    assert_same_bits(tensors_of(tmp_path / "out"), expected)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    if max_bytes == 10**9:
        assert names(tmp_path / "out") == ["config.json", "diffusion_pytorch_model.safetensors"]
    else:
        assert files[1].name == f"diffusion_pytorch_model-00002-of-{len(files):05d}.safetensors"
        weight_map = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
        assert all(weight_map[name] == file.name for file in files for name in load_file(file))
        assert weight_map.keys() == expected.keys()
        assert all(sum(t.nbytes for t in load_file(file).values()) <= max_bytes for file in files)
    assert open_weights(tmp_path / "out").config() == CONFIG
    assert_same_bits(as_native(tmp_path / "out"), expected)


def test_a_weight_beyond_bf16_is_refused(original, tmp_path):
    source = open_weights(original)
    values = {name: source.read(name).float() for name in source.shapes()}
    values["blocks.1.ffn.0.weight"][2, 3] = 3.4e38  # finite in fp32, and an infinity in bf16
    scalars = {"step": 1, "wan_config": source.config().model_dump(mode="json")}
    save(tmp_path / "run", 1, [whole_piece(f"model.{name}", value) for name, value in values.items()], scalars)
    with pytest.raises(CheckpointError, match=r"CKPT-120: blocks.1.ffn.0.weight reaches 3.4e\+38, and bfloat16 ends"):
        convert.zero_to_bf16(tmp_path / "run", tmp_path / "out")
    assert names(tmp_path) == ["run"]


@pytest.mark.nightly
def test_the_guides_command(original, tmp_path):
    training_run(original, tmp_path / "run")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    line = [sys.executable, str(REPO / "scripts" / "zero_to_bf16.py")]
    words = ["run/iter_0000010", "run-outputs", "--max_shard_size", "80GB", "--safe_serialization"]
    done = subprocess.run(line + words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {t.dtype for t in tensors_of(tmp_path / "run-outputs").values()} == {torch.bfloat16}
    for bad, text in ((words[:1], "CFG-004"), ([*words, "--tag", "x"], "CFG-008"), (words, "CKPT-020")):
        done = subprocess.run(line + bad, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert text in done.stderr, done.stderr


@pytest.mark.parametrize("inside", ["", "pytorch_model", "global_step500"])
def test_checkpoints_of_deepspeed_are_refused_with_what_to_do(tmp_path, inside):
    folder = tmp_path / "checkpoint-500" / inside
    folder.mkdir(parents=True)
    (tmp_path / "checkpoint-500" / "latest").write_text("global_step500")
    for name in ("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        (folder / name).write_bytes(b"x")
    with pytest.raises(CheckpointError) as caught:
        convert.zero_to_bf16(tmp_path / "checkpoint-500", tmp_path / "out")
    assert caught.value.id == "CKPT-047"
    assert "zero_to_fp32.py" in str(caught.value)
    assert names(tmp_path) == ["checkpoint-500"]


def test_weights_beside_deepspeeds_files_are_used_or_named(original, tmp_path):
    folder = tmp_path / "checkpoint-500"
    (folder / "pytorch_model").mkdir(parents=True)
    (folder / "pytorch_model" / "mp_rank_00_model_states.pt").write_bytes(b"x")
    shutil.copytree(original, folder / "transformer")
    with pytest.raises(CheckpointError) as caught:
        open_weights(folder)
    assert caught.value.id == "CKPT-047"
    assert f"Give {folder / 'transformer'}" in str(caught.value)
    assert_same_bits(as_native(folder / "transformer"), as_native(original))
    convert.convert_to_native(original, tmp_path / "native")
    shutil.copy(tmp_path / "native" / "diffusion_pytorch_model.safetensors", folder)  # as ZeRO-3 runs also leave it
    assert_same_bits({n: open_weights(folder).read(n) for n in open_weights(folder).shapes()}, as_native(original))


def test_other_formats_are_not_taken_for_training(original, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        convert.zero_to_bf16(original, tmp_path / "out")
    assert caught.value.id == "CKPT-048"
    assert names(tmp_path) == []


@pytest.mark.parametrize(("text", "size"), [("80GB", 80 * 10**9), ("5 GiB", 5 * 2**30), ("7", 7), ("1KB", 1000)])
def test_sizes_as_hugging_face_writes_them(text, size):
    from transformers.utils.hub import convert_file_size_to_int

    assert parse_size(text) == size == convert_file_size_to_int(text.replace(" ", "") if text != "7" else 7)


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "1.5GB", "1gigabyte", "80gb"])
def test_what_is_no_size(text):
    with pytest.raises(ConfigError) as caught:
        parse_size(text)
    assert caught.value.id == "CFG-109"


# inspect


def looked_at(path, code=0):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert flags("--mode", "inspect", "--source_path", path, "--json_output") == code
    return json.loads(printed.getvalue())


def test_every_format_is_described(original, tmp_path, capsys):
    state = training_run(original, tmp_path / "run")
    convert.convert_to_mm(original, tmp_path / "mm", ((1, 1),))
    convert.convert_to_native(original, tmp_path / "native")
    stored = tensors_of(original)
    parameters = sum(math.prod(value.shape) for value in state.values())
    rows = {
        original: "diffusers weights",
        tmp_path / "native": "native weights",
        tmp_path / "mm": "MM weights, 2 pipeline ranks",
        tmp_path / "run": "a training checkpoint",
    }
    for path, label in rows.items():
        found = looked_at(path)
        assert found["format"] == label
        assert (found["num_tensors"], found["num_parameters"]) == (len(stored), parameters)
        assert found["model"] == "t2v, width 16, 2 blocks, 2 heads"
        assert found["problems"] == []
        if label == "a training checkpoint":
            assert (found["step"], found["dtypes"]) == (10, {"F32": parameters})
        else:
            bf16 = sum(value.numel() for value in stored.values() if value.dtype == torch.bfloat16)
            assert found["dtypes"] == {"BF16": bf16, "F32": parameters - bf16}
            assert found["num_bytes"] == sum(value.nbytes for value in stored.values())
    assert looked_at(tmp_path / "mm")["files"] == [
        "mp_rank_00_000/model_optim_rng.pt", "mp_rank_00_001/model_optim_rng.pt",
    ]  # fmt: skip
    assert looked_at(original)["files"] == [name for name in names(original) if name.endswith(".safetensors")]
    capsys.readouterr()
    assert flags("--mode", "inspect", "--source_path", tmp_path / "mm") == 0
    printed = capsys.readouterr().out
    assert "MM weights, 2 pipeline ranks" in printed
    assert f"{parameters:,}" in printed


def test_what_is_wrong_is_said_and_is_the_exit_code(original, tmp_path, capsys):
    convert.convert_to_mm(original, tmp_path / "mm", ((1, 1),))
    file = tmp_path / "mm" / "release" / "mp_rank_00_001" / "model_optim_rng.pt"
    content = torch.load(file, weights_only=True)
    del content["model"]["blocks.0.norm3.bias"]
    torch.save(content, file)
    found = looked_at(tmp_path / "mm", 74)
    assert "CKPT-011" in found["problems"][0]
    assert "blocks.1.norm3.bias" in found["problems"][0]
    file.unlink()
    found = looked_at(tmp_path / "mm", 74)
    assert found["format"] == "unknown"
    assert "CKPT-041" in found["problems"][0]
    assert "error CKPT-041" in capsys.readouterr().err
    assert looked_at(tmp_path / "absent", 65)["problems"][0].startswith("DATA-020")


def test_what_is_wrong_with_an_adapter_is_said(tmp_path):
    key = "diffusion_model.blocks.0.self_attn.q"
    halves = {f"{key}.lora_down.weight": torch.ones(2, 16), f"{key}.lora_up.weight": torch.ones(16, 2)}
    save_file(halves, tmp_path / "x.safetensors")
    assert looked_at(tmp_path / "x.safetensors", 0)["format"] == "a LoRA adapter"
    save_file(halves | {f"{key}.dora_scale": torch.ones(16)}, tmp_path / "x.safetensors")
    assert "1 keys of DoRA" in looked_at(tmp_path / "x.safetensors", 65)["problems"][0]


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [
        ("Wan2.1 T2V 1.3B", 825, 1_418_996_800),
        ("Wan2.1 Fun-InP 1.3B", 983, 1_564_428_608),
        ("Wan2.1 Fun-Control 1.3B", 983, 1_564_502_336),
        ("Wan2.1 Fun-Control 14B", 1303, 16_395_124_544),
        ("Wan2.1 Fun-V1.1-Control 14B", 1305, 16_395_457_344),
        ("Wan2.1 Fun-V1.1-Control-Camera 1.3B", 989, 1_616_313_152),
        ("Wan2.1 Fun-V1.1-Control-Camera 14B", 1309, 16_898_128_704),
        ("Wan2.1 VACE 1.3B", 1264, 1_418_996_800 + 734_975_232),
        ("Wan2.1 VACE 14B", 1331, 14_288_491_584 + 3_049_101_312),
        ("Wan2.2 I2V A14B", 1095, 14_288_901_184),
        ("Wan2.2 TI2V 5B", 825, 4_999_787_712),
    ],
)
def test_a_published_model_is_called_by_its_name(tmp_path, name, tensors, parameters):
    """From its shapes alone, which MindSpeed-MM's files have; tensors of no size stand for the weights.

    The numbers are those of the published files.
    """
    from mm.config.model import PUBLISHED
    from mm.wan.model import whole_shapes

    shapes = whole_shapes(PUBLISHED[name])
    folder = tmp_path / "mm" / "iter_0000700" / "mp_rank_00"
    folder.mkdir(parents=True)
    from mm.wan.names import native_to_mindspeed

    state = {native_to_mindspeed(key): torch.zeros(1).expand(shape) for key, shape in shapes.items()}
    torch.save({"model": state}, folder / "model_optim_rng.pt")
    found = looked_at(folder.parent)
    assert (found["model"], found["step"]) == (name, 700)
    assert (found["num_tensors"], found["num_parameters"]) == (tensors, parameters)
    assert found["problems"] == []


def test_flags_of_inspect(original, tmp_path, capsys):
    words = ["--mode", "inspect", "--source_path", original]
    assert flags(*words, "--target_path", tmp_path / "x") == 64
    assert "CFG-073" in capsys.readouterr().err
    assert flags("--mode", "convert_to_native", "--source_path", original) == 64
    assert "CFG-107" in capsys.readouterr().err
    line = ["--mode", "convert_to_native", "--source_path", original, "--target_path", tmp_path / "x"]
    assert flags(*line, "--json_output") == 64
    assert "CFG-073" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_checkpoint_without_weights_is_said_to_be_one(tmp_path):
    save(tmp_path / "run", 1, [whole_piece("optimizer.x", torch.ones(1))], {})
    with pytest.raises(CheckpointError) as caught:
        main(["--mode", "inspect", "--source_path", str(tmp_path / "run")])
    assert caught.value.id == "CKPT-019"
