"""Weights as people have them: wrappers' prefixes, 8-bit floats with and without scales, missing and extra shards."""

from pathlib import Path

import pytest
import torch
from loaded import load_into
from safetensors.torch import load_file, save_file
from torch import Tensor

from mm.checkpoint import convert
from mm.checkpoint.weights import open_weights
from mm.config.model import WanConfig
from mm.errors import DataError, MMError
from mm.wan.component import load_strictly
from mm.wan.model import WanModel
from mm.wan.names import native_to_diffusers, native_to_mindspeed

CONFIG = WanConfig(text_dim=32, hidden_size=256, ffn_dim=96, num_heads=2, num_layers=2, freq_dim=32)
EIGHT_BITS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
Q = "blocks.0.self_attn.q.weight"


@pytest.fixture(scope="module")
def native() -> dict[str, Tensor]:
    model = WanModel(CONFIG)
    model.init_weights(seed=1)
    random = torch.Generator().manual_seed(0)
    return {name: torch.randn(value.shape, generator=random) for name, value in model.state_dict().items()}


def loaded(path: Path) -> dict[str, Tensor]:
    model = WanModel(CONFIG)
    load_into(model, open_weights(path))
    return model.state_dict()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "ema.",
                                    "ema.module.", "model.", "transformer.", "model.diffusion_model.", "predictor.",
                                    "_fsdp_wrapped_module.", "pipe.dit."])  # fmt: skip
@pytest.mark.parametrize("names", ["native", "diffusers", "mm", "wrapped inside"])
def test_prefixes_and_wrappers_are_read(tmp_path: Path, native: dict[str, Tensor], prefix: str, names: str):
    spell = {
        "native": str,
        "diffusers": native_to_diffusers,
        "mm": native_to_mindspeed,
        "wrapped inside": lambda name: name.replace(".self_attn.", "._fsdp_wrapped_module.self_attn._orig_mod."),
    }
    save_file({prefix + spell[names](name): value for name, value in native.items()}, tmp_path / "x.safetensors")
    found = loaded(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], value) for name, value in native.items())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "predictor."])
def test_prefixes_are_read_in_the_mm_format_too(tmp_path: Path, native: dict[str, Tensor], prefix: str):
    file = tmp_path / "mm" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    file.parent.mkdir(parents=True)
    state = {prefix + native_to_mindspeed(name): value for name, value in native.items()}
    torch.save({"model": state, "checkpoint_version": 3.0}, file)
    (tmp_path / "mm" / "latest_checkpointed_iteration.txt").write_text("release")
    found = loaded(tmp_path / "mm")
    assert all(torch.equal(found[name], value) for name, value in native.items())


def test_weights_and_their_average_in_one_file_are_not_mixed(tmp_path: Path, native: dict[str, Tensor]):
    both = {f"{kind}.{name}": value + (kind == "ema") for name, value in native.items() for kind in ("model", "ema")}
    save_file(both, tmp_path / "x.safetensors")
    with pytest.raises(DataError, match=r"DATA-029.*after ema\., model\.; keep one set"):
        open_weights(tmp_path / "x.safetensors")


def test_a_prefix_of_some_names_is_named(tmp_path: Path, native: dict[str, Tensor]):
    save_file({("module." if name == Q else "model.") + name: value for name, value in native.items()},
              tmp_path / "x.safetensors")  # fmt: skip
    with pytest.raises(MMError, match=r"model\.blocks\.0"):
        loaded(tmp_path / "x.safetensors")


@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=str)
def test_plain_eight_bit_floats_are_weights_like_others(tmp_path: Path, native: dict[str, Tensor], dtype):
    """ComfyUI's wan2.1_t2v_1.3B_fp8_e4m3fn.safetensors is such a file."""
    small = {name: value.to(dtype) if value.ndim == 2 else value for name, value in native.items()}
    save_file(small, tmp_path / "x.safetensors")
    found = loaded(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], value.float()) for name, value in small.items())
    convert.convert_to_mm(tmp_path / "x.safetensors", tmp_path / "mm")
    convert.convert_to_hf(tmp_path / "mm", tmp_path / "hf")
    convert.convert_to_native(tmp_path / "hf", tmp_path / "native")
    back = load_file(tmp_path / "native" / "diffusion_pytorch_model.safetensors")
    assert back.keys() == small.keys()
    for name, value in small.items():
        assert back[name].dtype == value.dtype
        assert torch.equal(back[name].view(torch.uint8), value.view(torch.uint8)), name


@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("shape", ["number", "[1]", "[out]", "[out, 1]"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_scaled_eight_bit_weights_are_multiplied(tmp_path: Path, native: dict[str, Tensor], suffix, shape, prefix):
    stored: dict[str, Tensor] = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    expected = dict(native)
    for name, value in native.items():
        if value.ndim == 2 and name.startswith("blocks."):
            rows = value.abs().amax(dim=1) if "out" in shape else value.abs().amax().reshape(1)
            scale = rows / 448
            stored[name] = (value / scale.reshape(-1, 1)).to(torch.float8_e4m3fn)
            kept = {"number": scale.reshape(-1)[0].clone(), "[1]": scale, "[out]": scale, "[out, 1]": scale[:, None]}
            stored[f"{name.removesuffix('weight')}{suffix}"] = kept[shape].contiguous()
            stored[f"{name.removesuffix('weight')}scale_input"] = torch.tensor(3.0)
            expected[name] = stored[name].float() * scale.reshape(-1, 1)
        else:
            stored[name] = value
    save_file({prefix + name: value for name, value in stored.items()}, tmp_path / "x.safetensors")
    found = loaded(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    convert.convert_to_native(tmp_path / "x.safetensors", tmp_path / "out")
    back = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert back.keys() == native.keys() and back[Q].dtype == torch.float32
    assert all(torch.equal(back[name], value) for name, value in expected.items())


@pytest.mark.parametrize(("scale", "said"), [(torch.ones(7), r"\[7\]"), (torch.ones(256, 2), r"\[256, 2\]"),
                                             (torch.ones(1, 256), r"\[1, 256\]")])  # fmt: skip
def test_scales_that_are_not_understood_are_refused(tmp_path: Path, native: dict[str, Tensor], scale, said):
    stored = native | {Q: native[Q].to(torch.float8_e4m3fn), "blocks.0.self_attn.q.scale_weight": scale}
    save_file(stored, tmp_path / "x.safetensors")
    with pytest.raises(DataError, match=f"DATA-031.*scale_weight {said}"):
        open_weights(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["blocks.0.self_attn.q.weight_scale_inv", "blocks.0.self_attn.q.comfy_quant"])
def test_other_marks_of_quantised_weights_are_never_ignored(tmp_path: Path, native: dict[str, Tensor], name: str):
    value = torch.ones(1, dtype=torch.uint8 if name.endswith("quant") else torch.float32)
    save_file(native | {Q: native[Q].to(torch.float8_e4m3fn), name: value}, tmp_path / "x.safetensors")
    with pytest.raises(MMError, match=name.replace(".", r"\.")) as caught:
        loaded(tmp_path / "x.safetensors")
    assert caught.value.id in ("CKPT-011", "DATA-031")


def shards(folder: Path, tensors: dict[str, Tensor], stem: str = "diffusion_pytorch_model") -> list[Path]:
    """Three shards without an index."""
    folder.mkdir()
    names = sorted(tensors)
    files = [folder / f"{stem}-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    for start, file in enumerate(files):
        save_file({name: tensors[name] for name in names[start::3]}, file, {"format": "pt"})
    return files


def test_a_missing_shard_is_called_that(tmp_path: Path, native: dict[str, Tensor]):
    files = shards(tmp_path / "x", native)
    assert loaded(tmp_path / "x").keys() == native.keys()
    with pytest.raises(DataError, match=r"DATA-024.*00001-of-00003.safetensors is one of 3 shards.*Give the folder"):
        open_weights(files[0])
    files[1].unlink()
    with pytest.raises(DataError, match=r"DATA-024.*lacks 1 of 3 shards: diffusion_pytorch_model-00002-of-00003"):
        open_weights(tmp_path / "x")


def test_an_extra_and_a_truncated_shard_are_named(tmp_path: Path, native: dict[str, Tensor]):
    files = shards(tmp_path / "x", native)
    save_file({Q: native[Q]}, tmp_path / "x" / "more.safetensors")
    with pytest.raises(DataError, match=r"DATA-030.*more.safetensors"):
        open_weights(tmp_path / "x")
    (tmp_path / "x" / "more.safetensors").unlink()
    files[2].write_bytes(files[2].read_bytes()[:-5])
    with pytest.raises(DataError, match=r"DATA-022.*00003-of-00003.safetensors is damaged"):
        open_weights(tmp_path / "x")


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"], ids=["text encoder", "VAE"])
def test_a_missing_or_truncated_shard_of_an_encoder_is_named(tmp_path: Path, stem: str):
    files = shards(tmp_path / "x", {f"t{number}": torch.ones(4) for number in range(6)}, stem)
    (tmp_path / "x" / "config.json").write_text("{}")
    files[0].write_bytes(files[0].read_bytes()[:-3])
    with pytest.raises(DataError, match=r"DATA-042.*00001-of-00003.safetensors is damaged"):
        load_strictly(torch.nn.Linear, tmp_path / "x")
    files[0].unlink()
    with pytest.raises(DataError, match=f"DATA-024.*{stem}-00001-of-00003"):
        load_strictly(torch.nn.Linear, tmp_path / "x")


def bad(native: dict[str, Tensor], value: float) -> dict[str, Tensor]:
    return native | {Q: torch.full_like(native[Q], 1.0).index_fill_(0, torch.tensor([3]), value)}


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("write", ["hf", "native", "mm", "like", "pipeline"])
def test_no_conversion_writes_what_is_not_finite(tmp_path: Path, native: dict[str, Tensor], value, write):
    save_file(bad(native, value), tmp_path / "x.safetensors")
    save_file(native, tmp_path / "good.safetensors")
    convert.convert_to_hf(tmp_path / "good.safetensors", tmp_path / "like")
    before = sorted(tmp_path.rglob("*"))
    source, target = tmp_path / "x.safetensors", tmp_path / "out"
    with pytest.raises(MMError, match=r"CKPT-016: blocks.0.(self_attn.(proj_)?|attn1.to_)q.weight holds 256 values"):
        {
            "hf": lambda: convert.convert_to_hf(source, target),
            "like": lambda: convert.convert_to_hf(source, target, tmp_path / "like"),
            "native": lambda: convert.convert_to_native(source, target),
            "mm": lambda: convert.convert_to_mm(source, target),
            "pipeline": lambda: convert.convert_to_mm(source, target, ((1, 1),)),
        }[write]()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 65600.0), (torch.bfloat16, 3.4e38),
                                              (torch.float8_e4m3fn, 460.0)])  # fmt: skip
def test_a_folder_in_a_narrower_dtype_does_not_get_what_it_cannot_hold(tmp_path: Path, native, dtype, value):
    save_file({name: tensor.to(dtype) for name, tensor in native.items()}, tmp_path / "narrow.safetensors")
    convert.convert_to_hf(tmp_path / "narrow.safetensors", tmp_path / "like")
    save_file(bad(native, value), tmp_path / "x.safetensors")
    with pytest.raises(MMError, match=r"CKPT-120: blocks.0.attn1.to_q.weight reaches"):
        convert.convert_to_hf(tmp_path / "x.safetensors", tmp_path / "out", tmp_path / "like")
    assert not (tmp_path / "out").exists()
    save_file(bad(native, value / 4), tmp_path / "y.safetensors")
    convert.convert_to_hf(tmp_path / "y.safetensors", tmp_path / "out", tmp_path / "like")
