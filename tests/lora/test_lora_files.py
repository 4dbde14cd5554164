"""Adapter files: every route from every format to merged weights, diffusers as reader and writer, and bad files."""

import json
import os
from itertools import combinations
from pathlib import Path

import lora_example as example
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from mm.checkpoint.formats.folder import PEFT_FILE
from mm.checkpoint.weights import open_weights
from mm.errors import CheckpointError, DataError, MMError
from mm.lora.adapter import Adapter, Update, merge, require_fit
from mm.lora.files import read_adapter, write_adapter
from mm.lora.layer import Adapted
from mm.wan.model import WanModel

TOUCHED = ("blocks.0.self_attn.q", "blocks.1.ffn.2")


def ours(updates: dict[str, example.Plain]) -> Adapter:
    return Adapter({name: Update(*plain) for name, plain in updates.items()})


def merged_from(file: Path, base: Path, strength: float = 1.0) -> dict[str, torch.Tensor]:
    return dict(merge(open_weights(base), read_adapter(file), strength))


@pytest.fixture
def base_file(tmp_path: Path) -> Path:
    save_file(example.native_state(example.base()), tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def test_every_route_gives_the_same_merged_weights(tmp_path: Path, base_file: Path):
    updates = example.adapter()
    files = {
        "kohya": example.kohya_file(tmp_path / "kohya.safetensors", updates),
        "VideoX-Fun": example.kohya_file(tmp_path / "videox.safetensors", updates, "lora_unet__"),
        "DiffSynth": example.diffsynth_file(tmp_path / "diffsynth.safetensors", updates),
        "DiffSynth with prefix": example.diffsynth_file(tmp_path / "prefix.safetensors", updates, "pipe.dit."),
    }
    for family in ("peft", "comfyui"):
        files[family] = tmp_path / f"{family}.safetensors"
        write_adapter(files[family], ours(updates), family)
    for name, file in list(files.items()):  # what was imported is exported, and imported again
        for family in ("peft", "comfyui"):
            files[f"{name}, {family}"] = tmp_path / f"{name}-{family}.safetensors"
            write_adapter(files[f"{name}, {family}"], read_adapter(file), family)
    results = {name: merged_from(file, base_file) for name, file in files.items()}
    expected = example.merged(example.native_state(example.base()), updates)
    assert len(results) == 18
    for name, result in results.items():
        assert result.keys() == expected.keys()
        assert max((result[k].double() - expected[k]).abs().max().item() for k in expected) <= 1e-6, name
    for one, other in combinations(results.values(), 2):
        assert max((one[k] - other[k]).abs().max().item() for k in expected) <= 1e-6


def pipeline(transformer: WanTransformer3DModel) -> WanPipeline:
    return WanPipeline(None, None, None, UniPCMultistepScheduler(), transformer)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    latents, text = torch.randn(1, 16, 2, 4, 6, generator=random), torch.randn(1, 6, 16, generator=random)
    return latents, torch.tensor([637.0]), text


def difference(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
@pytest.mark.parametrize("family", ["peft", "comfyui", "kohya"])
@pytest.mark.parametrize("uniform", [False, True], ids=["r and alpha differ", "one r and alpha"])
def test_diffusers_reads_our_files_as_we_merge_them(tmp_path: Path, base_file: Path, family: str, uniform: bool):
    """The kohya file is not ours: it shows that the example is what diffusers takes kohya's format to be."""
    updates = example.adapter()
    if uniform:
        updates = {name: example.Plain(a[:2], b[:, :2], 5.0) for name, (a, b, _) in updates.items()}
    folder = tmp_path / "adapter"
    if family == "kohya":
        folder.mkdir()
        example.kohya_file(folder / PEFT_FILE, {n: example.Plain(a.contiguous(), b.contiguous(), s)
                                                for n, (a, b, s) in updates.items()})  # fmt: skip
    else:
        write_adapter(folder / PEFT_FILE, ours(updates), family)
    theirs = example.base()
    plain = theirs(*inputs()).sample
    pipeline(theirs).load_lora_weights(folder)
    expected = theirs(*inputs()).sample
    assert difference(plain, expected) > 0.05  # the adapter does something

    model = WanModel(example.CONFIG)
    model.load_state_dict(merged_from(folder, base_file))
    assert difference(model.velocity(*inputs()), expected) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("by_root", [False, True], ids=["alpha / r", "alpha / root of r"])
def test_files_that_diffusers_writes_are_read_with_their_alpha(tmp_path: Path, base_file: Path, by_root: bool):
    theirs = example.base()
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        init_lora_weights=False,
        target_modules=["to_q", "to_out.0", "net.2"],
        rank_pattern={"blocks.1.attn1.to_q": 2},
        alpha_pattern={"attn2.to_q": 1.5, "^blocks.0.ffn.net.2": 8},
        use_rslora=by_root,
    )
    theirs.add_adapter(config)
    WanPipeline.save_lora_weights(
        tmp_path / "saved", get_peft_model_state_dict(theirs), **_collate_lora_metadata({"transformer": theirs})
    )
    read = read_adapter(tmp_path / "saved")
    root = 3**0.5 if by_root else 1
    assert read.adapted()["blocks.1.cross_attn.q"] == pytest.approx(Adapted(3, 1.5 * root))
    assert read.adapted()["blocks.0.ffn.2"] == pytest.approx(Adapted(3, 8 * root))
    assert read.adapted()["blocks.1.self_attn.q"] == pytest.approx(Adapted(2, 5 * (2**0.5 if by_root else 1)))
    model = WanModel(example.CONFIG)
    model.load_state_dict(merged_from(tmp_path / "saved", base_file))
    assert difference(model.velocity(*inputs()), theirs(*inputs()).sample) <= 1e-5


def test_what_a_written_file_says(tmp_path: Path):
    updates = {name: plain for name, plain in example.adapter().items() if name in TOUCHED}
    adapter = Adapter(ours(updates).updates, {"base_model": "Wan2.1-T2V-1.3B"})
    write_adapter(tmp_path / "comfyui.safetensors", adapter, "comfyui")
    assert set(load_file(tmp_path / "comfyui.safetensors")) == {
        f"diffusion_model.{name}.{part}" for name in TOUCHED for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    write_adapter(tmp_path / "peft.safetensors", adapter, "peft")
    assert set(load_file(tmp_path / "peft.safetensors")) == {
        f"transformer.blocks.{name}.lora_{half}.weight" for name in ("0.attn1.to_q", "1.ffn.net.2") for half in "AB"
    }
    for family in ("comfyui", "peft"):
        again = read_adapter(tmp_path / f"{family}.safetensors")
        assert again.texts == adapter.texts
        assert again.adapted() == {name: Adapted(len(a), alpha) for name, (a, _, alpha) in updates.items()}
        for name, value in adapter.parameters().items():
            assert torch.equal(again.parameters()[name], value)


def test_halves_that_share_a_buffer_are_written(tmp_path: Path):
    """As parameters of a data-parallel model do."""
    buffer = torch.randn(4 * 24)
    a, b = buffer[:48].view(2, 24), buffer[48:].view(24, 2)
    parameters = {f"{TOUCHED[0]}.lora_A": a, f"{TOUCHED[0]}.lora_B": b, "blocks.0.self_attn.q.weight": torch.zeros(1)}
    adapter = Adapter.of_parameters(parameters, {TOUCHED[0]: Adapted(2, 3.0)})
    for family in ("comfyui", "peft"):
        write_adapter(tmp_path / family / "x.safetensors", adapter, family)
        update = read_adapter(tmp_path / family / "x.safetensors").updates[TOUCHED[0]]
        assert torch.equal(update.a, a) and torch.equal(update.b, b) and update.alpha == 3.0


def test_linears_outside_the_blocks_are_merged_too(tmp_path: Path, base_file: Path):
    state = example.native_state(example.base())
    names = {"time_projection.1": "condition_embedder.time_proj", "head.head": "proj_out"}
    updates, tensors = {}, {}
    for native, theirs in names.items():
        out, inner = state[f"{native}.weight"].shape
        updates[native] = example.Plain(torch.randn(2, inner), torch.randn(out, 2), 2.0)
        tensors[f"transformer.{theirs}.lora_A.weight"] = updates[native].a
        tensors[f"transformer.{theirs}.lora_B.weight"] = updates[native].b
    save_file(tensors, tmp_path / "x.safetensors")
    expected = example.merged(state, updates)
    result = merged_from(tmp_path / "x.safetensors", base_file)
    assert max(difference(result[name].double(), expected[name]) for name in expected) <= 1e-6


@pytest.mark.parametrize("strength", [0.0, 0.35, -2.0])
def test_strength_scales_the_update_and_nothing_else_changes(tmp_path: Path, base_file: Path, strength: float):
    updates = {name: plain for name, plain in example.adapter().items() if name in TOUCHED}
    file = example.kohya_file(tmp_path / "x.safetensors", updates)
    state = example.native_state(example.base())
    expected = example.merged(state, updates, strength)
    for name, value in merged_from(file, base_file, strength).items():
        if name.removesuffix(".weight") in TOUCHED and strength:
            assert (value.double() - expected[name]).abs().max() <= 1e-6
            assert not torch.equal(value, state[name])
        else:
            assert torch.equal(value, state[name])


def test_bf16_weights_are_rounded_once(tmp_path: Path, base_file: Path):
    state = {name: value.bfloat16() for name, value in example.native_state(example.base()).items()}
    save_file(state, tmp_path / "bf16.safetensors")
    updates = example.adapter()
    expected = example.merged(state, updates)
    file = example.kohya_file(tmp_path / "x.safetensors", updates)
    for name, value in merged_from(file, tmp_path / "bf16.safetensors").items():
        assert value.dtype == torch.bfloat16
        # bf16's unit roundoff is 2^-8; the rest is what fp32 may be beside it
        assert ((value.double() - expected[name]).abs() <= expected[name].abs() * 2**-8 + 1e-6).all(), name


def q_file(path: Path, prefix: str = "diffusion_model.", **changes: torch.Tensor | None) -> Path:
    """One linear in ComfyUI's names, with parts replaced, added, or left out (None); `__` in a name is a dot."""
    parts: dict[str, torch.Tensor | None] = {
        "lora_down.weight": torch.ones(2, 24), "lora_up.weight": torch.ones(24, 2), "alpha": torch.tensor(2.0),
    }  # fmt: skip
    parts |= {name.replace("__", "."): value for name, value in changes.items()}
    save_file({f"{prefix}blocks.0.self_attn.q.{n}": v for n, v in parts.items() if v is not None}, path)
    return path


@pytest.mark.parametrize(
    ("changes", "id", "said"),
    [
        ({"lora_up__weight": None}, "DATA-091", "blocks.0.self_attn.q"),
        ({"diff_b": torch.ones(24)}, "DATA-091", r"1 keys of biases \(.*self_attn.q.diff_b"),
        ({"dora_scale": torch.ones(24)}, "DATA-091", r"1 keys of DoRA \(.*self_attn.q.dora_scale"),
        ({"lora_mid__weight": torch.ones(2, 2, 1, 1)}, "DATA-091", r"Tucker-decomposed LoRA \(.*lora_mid"),
        ({"lora_B__bias": torch.ones(24)}, "DATA-091", r"1 keys of biases \(.*lora_B.bias"),
        ({"diff": torch.ones(24)}, "DATA-091", r"1 keys of whole weights or norms \("),
        ({"lora_up__weight": None, "lora_down__weight": None, "lokr_w1": torch.ones(2)}, "DATA-091", "1 keys of LoKr"),
        (
            {"lora_up__weight": None, "lora_down__weight": None, "hada_w1_a": torch.ones(2)},
            "DATA-091",
            "1 keys of LoHa",
        ),
        ({"strange": torch.ones(24)}, "DATA-091", r"1 keys are unknown \(.*self_attn.q.strange"),
        ({"lora_A__weight": torch.ones(2, 24)}, "DATA-091", "self_attn.q.lora_"),
        ({"lora_up__weight": torch.ones(24, 3)}, "DATA-092", r"\[2, 24\] and B \[24, 3\]"),
        ({"lora_up__weight": torch.ones(24, 2, 1, 1)}, "DATA-092", r"\[24, 2, 1, 1\]"),
        ({"lora_up__weight": torch.ones(24, 2, dtype=torch.int32)}, "DATA-092", "int32"),
        ({"alpha": torch.ones(2)}, "DATA-092", r"\[2\]"),
        ({"alpha": torch.tensor(float("nan"))}, "DATA-092", "nan"),
        ({"prefix": "unet."}, "DATA-090", "unet.blocks.0.self_attn.q"),
    ],
)
def test_bad_keys_and_shapes_are_refused(tmp_path: Path, changes, id, said):
    with pytest.raises(DataError, match=said) as caught:
        read_adapter(q_file(tmp_path / "x.safetensors", **changes))
    assert caught.value.id == id


def test_weights_are_no_adapter(base_file: Path):
    with pytest.raises(DataError, match="DATA-090"):
        read_adapter(base_file)


def test_damaged_and_missing_files(tmp_path: Path):
    file = q_file(tmp_path / "x.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    for path in (file, tmp_path):
        with pytest.raises(DataError, match="DATA-022"):
            read_adapter(path)
    file.rename(tmp_path / "x.bin")
    for path in (tmp_path / "none.safetensors", tmp_path, tmp_path / "x.bin"):
        with pytest.raises(DataError, match="DATA-020"):
            read_adapter(path)


PEFT_VALUES = {"r": 2, "lora_alpha": 4}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({**PEFT_VALUES, "r": 3}, "rank 2, and 3 in PEFT's configuration"),
        ({**PEFT_VALUES, "rank_pattern": {"attn1.to_q": 5}}, "rank 2, and 5 in PEFT's configuration"),
        ({**PEFT_VALUES, "use_dora": True}, "DoRA"),
        ({**PEFT_VALUES, "alpha_pattern": {r"blocks\.\d+\.attn1": 5}}, "is not a name"),
        ({**PEFT_VALUES, "lora_alpha": "many"}, "not understood"),
        ({**PEFT_VALUES, "lora_alpha": float("inf")}, "alpha inf"),
        ({"lora_alpha": 4}, "not understood"),
        ([], "not understood"),
    ],
)
def test_bad_headers_are_refused(tmp_path: Path, header, said):
    if isinstance(header, dict):
        header = {f"transformer.{key}": value for key, value in header.items()}
    key = "transformer.blocks.0.attn1.to_q"
    save_file(
        {f"{key}.lora_A.weight": torch.ones(2, 24), f"{key}.lora_B.weight": torch.ones(24, 2)},
        tmp_path / "x.safetensors",
        metadata={"lora_adapter_metadata": json.dumps(header)},
    )
    with pytest.raises(DataError, match=said) as caught:
        read_adapter(tmp_path / "x.safetensors")
    assert caught.value.id == "DATA-092"


def test_an_alpha_that_is_not_there_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("WARNING")
    file = q_file(tmp_path / "x.safetensors", alpha=None)
    assert read_adapter(file).adapted() == {"blocks.0.self_attn.q": Adapted(2, 2.0)}
    assert "no alpha for 1 of 1" in caplog.text


def test_updates_that_do_not_fit_are_refused_before_anything_is_read(base_file: Path):
    other = {
        "blocks.0.cross_attn.k_img": Update(torch.ones(2, 24), torch.ones(24, 2), 2.0),
        "blocks.1.ffn.0": Update(torch.ones(2, 24), torch.ones(24, 2), 2.0),
        "blocks.0.self_attn.q": Update(torch.ones(2, 24), torch.ones(24, 2), 2.0),
    }
    with pytest.raises(DataError) as caught:
        merge(open_weights(base_file), Adapter(other))
    assert caught.value.id == "DATA-093"
    assert "2 of the 3" in str(caught.value)
    assert "k_img" in str(caught.value) and "[24, 24] in the adapter, [40, 24] in the model" in str(caught.value)
    require_fit(Adapter({"blocks.0.self_attn.q": other["blocks.0.self_attn.q"]}), {"blocks.0.self_attn.q": (24, 24)})


def test_an_existing_file_is_left_alone_and_nothing_lies_around(tmp_path: Path):
    target = q_file(tmp_path / "x.safetensors")
    before = target.read_bytes()
    with pytest.raises(CheckpointError, match="CKPT-020"):
        write_adapter(target, ours(example.adapter()), "peft")
    assert target.read_bytes() == before
    (tmp_path / "file").touch()
    with pytest.raises(MMError, match="CKPT-031"):
        write_adapter(tmp_path / "file" / "x.safetensors", ours(example.adapter()), "peft")
    assert sorted(os.listdir(tmp_path)) == ["file", "x.safetensors"]


@pytest.mark.parametrize(
    ("key", "native"),
    [
        ("linear.0.weight", "motion_controller.linear.0.weight"),
        ("pipe.motion_controller.linear.4.bias", "motion_controller.linear.4.bias"),
        ("motion_controller.linear.2.weight", "motion_controller.linear.2.weight"),
        ("pipe.vace.vace_blocks.0.ffn.0.weight", "vace_blocks.0.ffn.0.weight"),
        ("vace_patch_embedding.bias", "vace_patch_embedding.bias"),
        ("pipe.dit.head.head.weight", "head.head.weight"),
        ("blocks.1.modulation", "blocks.1.modulation"),
        ("linear.1.weight", None),
        ("pipe.vae.conv1.weight", None),
    ],
)
def test_what_diffsynth_has_trained_beside_its_lora(tmp_path: Path, key: str, native: str | None) -> None:
    """Its names in the pipeline, or what --remove_prefix_in_ckpt leaves of them; nothing like it in others' files."""
    file, value = tmp_path / "lora.safetensors", torch.arange(6, dtype=torch.bfloat16)
    halves = {"lora_A": torch.ones(2, 24), "lora_B": torch.ones(24, 2)}
    lora = {f"blocks.0.self_attn.q.{half}.default.weight": tensor for half, tensor in halves.items()}
    save_file({**lora, key: value}, file)
    if native is None:
        with pytest.raises(DataError, match="DATA-091"):
            read_adapter(file)
        return
    adapter = read_adapter(file)
    assert list(adapter.updates) == ["blocks.0.self_attn.q"] and list(adapter.parts) == [native]
    assert torch.equal(adapter.parts[native], value)
    plain = {name.replace(".default", ""): tensor for name, tensor in lora.items()}
    save_file({**plain, key: value}, file)
    with pytest.raises(DataError, match="DATA-091"):
        read_adapter(file)
    save_file({**lora, key: value * float("nan")}, file)
    with pytest.raises(DataError, match="DATA-130"):
        read_adapter(file)
