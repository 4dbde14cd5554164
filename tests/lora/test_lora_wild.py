"""Adapters as people have them: 8-bit floats, PEFT's and diffusers' own ways to save, wrappers, all linears."""

import json
import logging
from pathlib import Path

import lora_example as example
import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_lora_files import difference, inputs, merged_from

from mm.checkpoint.mismatch import Expected
from mm.cli.convert import main
from mm.cli.entry import run
from mm.config.model import WAN_1_3B, WAN_FLF2V_14B, WAN_I2V_14B, WanConfig
from mm.config.run.generation import AdapterFile
from mm.config.run.origins import Word
from mm.errors import DataError
from mm.generate.weights import open_generation_weights
from mm.lora.adapter import Adapter, Update
from mm.lora.convert import read_any
from mm.lora.files import read_adapter, write_adapter
from mm.lora.layer import Adapted
from mm.lora.mindspeed import write_mindspeed
from mm.lora.targets import every_linear
from mm.wan.adapter_keys import sort_keys
from mm.wan.model import WanModel
from mm.wan.names import native_to_diffusers

EIGHT_BITS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
DTYPES = [*EIGHT_BITS, torch.float16, torch.bfloat16, torch.float32, torch.float64]
Q = "blocks.0.self_attn.q"
MODEL = Expected(example.CONFIG, Word, "CFG-065")
ORIGINAL = {  # the official config.json of the example's model
    "_class_name": "WanModel", "model_type": "t2v", "dim": 24, "ffn_dim": 40, "num_heads": 2, "num_layers": 2,
    "freq_dim": 16, "text_dim": 16, "text_len": 6, "in_dim": 16, "out_dim": 16, "patch_size": [1, 2, 2],
}  # fmt: skip


def write_base(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The example's base model with its config.json; returns the file of its weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(ORIGINAL))
    file = folder / "base.safetensors"
    save_file({name: value.to(dtype) for name, value in example.native_state(example.base()).items()}, file)
    return file


@pytest.fixture
def base_file(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


def linear_file(path: Path, a: torch.Tensor, b: torch.Tensor, alpha: object = 1.0) -> Path:
    """One linear in ComfyUI's names."""
    tensors = {f"diffusion_model.{Q}.lora_down.weight": a, f"diffusion_model.{Q}.lora_up.weight": b}
    save_file(tensors | {f"diffusion_model.{Q}.alpha": torch.as_tensor(alpha)}, path)
    return path


def bits(value: torch.Tensor) -> tuple[object, ...]:
    return value.dtype, tuple(value.shape), value.contiguous().reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("dtypes", [*((d, d) for d in DTYPES), (torch.float8_e4m3fn, torch.bfloat16),
                                    (torch.float64, torch.float8_e5m2)], ids=str)  # fmt: skip
def test_every_floating_dtype_is_merged_written_and_read(tmp_path: Path, base_file: Path, dtypes):
    a, b = torch.randn(4, 24).to(dtypes[0]), torch.randn(24, 4).to(dtypes[1])
    source = linear_file(tmp_path / "x.safetensors", a, b, torch.tensor(2.0, dtype=torch.bfloat16))
    state = load_file(base_file)
    expected = state[f"{Q}.weight"].double() + 0.5 * b.double() @ a.double()
    assert (merged_from(source, base_file)[f"{Q}.weight"].double() - expected).abs().max() <= 1e-5
    for mode in ("lora_to_hf", "lora_to_comfyui", "lora_to_mm"):
        target = tmp_path / (mode if mode == "lora_to_mm" else f"{mode}.safetensors")
        assert run(main, ["--mode", mode, "--source_path", str(source), "--target_path", str(target)]) == 0
        update = read_any(target).updates[Q]
        assert (bits(update.a), bits(update.b), update.alpha) == (bits(a), bits(b), 2.0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool])
def test_whole_numbers_are_refused(tmp_path: Path, dtype):
    file = linear_file(tmp_path / "x.safetensors", torch.ones(2, 24, dtype=dtype), torch.ones(24, 2))
    with pytest.raises(DataError, match=f"DATA-092.*{dtype}"):
        read_adapter(file)


@torch.no_grad()
@pytest.mark.parametrize("by_root", [False, True], ids=["alpha / r", "alpha / root of r"])
@pytest.mark.parametrize("how", ["save_lora_adapter", "PEFT's folder", "PEFT's file"])
def test_what_a_model_saves_itself_is_read_with_its_alpha(tmp_path: Path, base_file: Path, how, by_root):
    theirs, config = example.base(), LoraConfig(
        r=4, lora_alpha=8, init_lora_weights=False, target_modules=["to_q", "to_out.0", "proj_out", "time_proj"],
        rank_pattern={"blocks.1.attn1.to_q": 2}, alpha_pattern={"attn2.to_q": 1.5}, use_rslora=by_root,
    )  # fmt: skip
    if how == "save_lora_adapter":
        theirs.add_adapter(config)
        theirs.save_lora_adapter(tmp_path / "saved")
        source = tmp_path / "saved"
    else:
        wrapped = get_peft_model(theirs, config)
        wrapped.save_pretrained(tmp_path / "saved")
        source = tmp_path / "saved" / ("adapter_model.safetensors" if how == "PEFT's file" else "")
    root = 2 if by_root else 1
    read = read_adapter(source).adapted()
    assert read["blocks.0.self_attn.q"] == Adapted(4, 8.0 * root)
    assert read["blocks.1.cross_attn.q"] == Adapted(4, 1.5 * root)
    assert read["blocks.1.self_attn.q"] == pytest.approx(Adapted(2, 8 * (2**0.5 if by_root else 1)))
    model = WanModel(example.CONFIG)
    model.load_state_dict(merged_from(source, base_file))
    assert difference(model.velocity(*inputs()), theirs(*inputs()).sample) <= 1e-5


def test_dora_and_adapters_that_change_the_base_are_refused_by_name(tmp_path: Path):
    get_peft_model(example.base(), LoraConfig(r=2, target_modules=["to_q"], use_dora=True)).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="keys of DoRA"):
        read_adapter(tmp_path)
    config = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights="pissa")
    get_peft_model(example.base(), config).save_pretrained(tmp_path / "pissa")
    with pytest.raises(DataError, match=r"DATA-092.*pissa, which changes the base"):
        read_adapter(tmp_path / "pissa")


SPELLINGS = [
    *("transformer.", "base_model.model.", "base_model.model.transformer.", "module.", "_orig_mod.", ""),
    *("module._orig_mod.", "_orig_mod.module.", "ema.", "ema.module.", "model.", "_fsdp_wrapped_module."),
    *("diffusion_model.", "model.diffusion_model.", "pipe.dit.", "dit.", "transformer._orig_mod."),
]


@pytest.mark.parametrize("prefix", SPELLINGS)
@pytest.mark.parametrize("names", ["diffusers", "native", "wrapped inside"])
def test_prefixes_and_wrappers_in_any_order_are_read(tmp_path: Path, prefix: str, names: str):
    tensors = {}
    for name, (a, b, _) in example.adapter().items():
        spelled = native_to_diffusers(f"{name}.weight").removesuffix(".weight") if names == "diffusers" else name
        if names == "wrapped inside":
            block, number, rest = name.split(".", 2)
            spelled = f"{block}.{number}._fsdp_wrapped_module._checkpoint_wrapped_module.{rest}"
        tensors |= {f"{prefix}{spelled}.lora_A.default.weight": a, f"{prefix}{spelled}.lora_B.default.weight": b}
    save_file(tensors, tmp_path / "x.safetensors")
    read = read_adapter(tmp_path / "x.safetensors")
    assert read.updates.keys() == example.adapter().keys()
    assert all(torch.equal(read.updates[name].a, a) for name, (a, _, _) in example.adapter().items())


def test_one_linear_behind_two_prefixes_is_there_twice(tmp_path: Path):
    a, b = torch.randn(2, 24), torch.randn(24, 2)
    spelled = ["transformer.blocks.0.attn1.to_q.lora_A.weight", "transformer.blocks.0.attn1.to_q.lora_B.weight"]
    same = ["module.blocks.0.attn1.to_q.lora_down.weight", "module.blocks.0.attn1.to_q.lora_up.weight"]
    save_file({name: value.clone() for name, value in zip(spelled + same, [a, b, a, b], strict=True)},
              tmp_path / "x.safetensors")  # fmt: skip
    with pytest.raises(DataError, match=r"DATA-091.*2 keys are there twice"):
        read_adapter(tmp_path / "x.safetensors")
    other = {
        f"module.blocks.1.attn1.to_q.{half}.weight": value.clone() for half, value in (("lora_A", a), ("lora_B", b))
    }
    save_file(dict(zip(spelled, [a, b], strict=True)) | other, tmp_path / "y.safetensors")
    assert read_adapter(tmp_path / "y.safetensors").updates.keys() == {Q, "blocks.1.self_attn.q"}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"use_dora": True}, "is of DoRA"),
        ({"alora_invocation_tokens": [1, 2]}, "is of activated LoRA"),
        ({"layer_replication": [[0, 2]]}, "is of repeated layers"),
        ({"use_qalora": True}, "is of QALoRA"),
        ({"r": 2.5}, "2.5 is not a whole number"),
        ({"lora_alpha": float("nan")}, "alpha nan"),
    ],
)
def test_a_header_of_more_than_plain_lora_is_refused(tmp_path: Path, config: dict, told: str):
    header = {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": 1} | config)}
    names = [f"blocks.0.attn1.to_q.{half}.weight" for half in ("lora_A", "lora_B")]
    save_file(dict(zip(names, [torch.ones(2, 24), torch.ones(24, 2)], strict=True)), tmp_path / "x.safetensors", header)
    with pytest.raises(DataError, match=f"DATA-092.*{told}"):
        read_adapter(tmp_path / "x.safetensors")


def meta_linears(config: WanConfig) -> dict[str, tuple[int, int]]:
    with torch.device("meta"):
        return every_linear({name: tuple(value.shape) for name, value in WanModel(config).named_parameters()})


@pytest.mark.parametrize("config", [WAN_1_3B, WAN_I2V_14B, WAN_FLF2V_14B], ids=["t2v", "i2v", "flf2v"])
@pytest.mark.parametrize("prefix", ["lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_"])
@pytest.mark.parametrize("names", ["native", "diffusers", "some dots"])
def test_every_linear_of_a_model_has_its_name_with_underscores(config: WanConfig, prefix: str, names: str):
    """VideoX-Fun's default adapts all linears: head, embedders and projections too."""
    linears = meta_linears(config)
    spelled = {
        name: name.replace(".", "_", 1)  # lora_unet_blocks_12.self_attn..., which also goes around
        if names == "some dots"
        else (native_to_diffusers(f"{name}.weight").removesuffix(".weight") if names == "diffusers" else name)
        .replace(".", "_")
        for name in linears
    }  # fmt: skip
    files = [f"{prefix}{name}.{part}" for name in spelled.values() for part in ("lora_down.weight", "alpha")]
    keys = sort_keys(files)
    assert keys is not None and not keys.left_over
    assert {native for native, _, _ in keys.parts.values()} == linears.keys()
    assert len(linears) == 10 * config.num_layers + 6 if config is WAN_1_3B else len(linears) > 12 * config.num_layers
    assert all(keys.parts[f"{prefix}{name}.alpha"][0] == native for native, name in spelled.items())


@torch.no_grad()
def test_a_videox_fun_file_of_all_linears_is_merged_and_generated_with(tmp_path: Path, base_file: Path):
    state = load_file(base_file)
    linears = every_linear({name: tuple(value.shape) for name, value in state.items()})
    updates = {name: example.Plain(torch.randn(2, i) * 0.1, torch.randn(o, 2) * 0.1, 1.0)
               for name, (o, i) in linears.items()}  # fmt: skip
    assert {"head.head", "text_embedding.0", "time_embedding.2", "time_projection.1"} <= updates.keys()
    file = example.kohya_file(tmp_path / "videox.safetensors", updates, "lora_unet__")
    expected = example.merged(state, updates)
    for name, value in merged_from(file, base_file).items():
        assert (value.double() - expected[name]).abs().max() <= 1e-6, name
    section = AdapterFile(path=str(file), strength=1.0)
    weights = open_generation_weights(str(base_file), [section], MODEL, torch.float32)
    value = weights.value_of("head.head.weight", tuple(state["head.head.weight"].shape))
    assert (value.double() - expected["head.head.weight"]).abs().max() <= 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("half", ["A", "B"])
@pytest.mark.parametrize("kind", ["file", "mm"])
def test_an_adapter_that_is_not_finite_is_never_used(tmp_path: Path, base_file: Path, bad, half, kind):
    a, b = torch.randn(4, 24), torch.randn(24, 4)
    (a if half == "A" else b)[1, 2] = bad
    source = linear_file(tmp_path / "x.safetensors", a, b)
    if kind == "mm":
        save = tmp_path / "mm" / "release" / "mp_rank_00" / "model_optim_rng.pt"
        save.parent.mkdir(parents=True)
        module = f"{Q.replace('.q', '.proj_q')}.lora_%s.default.weight"
        torch.save({"model": {module % "A": a, module % "B": b}, "checkpoint_version": 3.0}, save)
        (tmp_path / "mm" / "latest_checkpointed_iteration.txt").write_text("release")
        source = tmp_path / "mm"
    with pytest.raises(DataError, match=f"DATA-130: {half} of .*{Q}.* holds 1 values that are not finite"):
        read_any(source)
    before = sorted(tmp_path.rglob("*"))
    words = ["--source_path", str(source), "--target_path", str(tmp_path / "out.safetensors")]
    merging = ["--mode", "merge_lora", "--base_path", str(base_file)]
    for mode in (merging, *(["--mode", mode] for mode in ("lora_to_hf", "lora_to_comfyui", "lora_to_mm"))):
        assert run(main, [*words, *mode]) == 65
    assert sorted(tmp_path.rglob("*")) == before
    section = AdapterFile(path=str(source), strength=1.0)
    with pytest.raises(DataError, match="DATA-130"):
        open_generation_weights(str(base_file), [section], MODEL, torch.float32)


def test_nothing_that_is_not_finite_is_written_whoever_made_it(tmp_path: Path):
    adapter = Adapter({Q: Update(torch.full((2, 24), float("nan")), torch.ones(24, 2), 2.0)})
    for name, write in (
        ("peft.safetensors", lambda path: write_adapter(path, adapter, "peft")),
        ("comfyui.safetensors", lambda path: write_adapter(path, adapter, "comfyui")),
        ("mm", lambda path: write_mindspeed(path, adapter)),
    ):
        with pytest.raises(Exception, match=r"CKPT-016.*48 values that are not finite"):
            write(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float16, 7e4), (torch.float8_e4m3fn, 500.0), (torch.float8_e5m2, 6e4), (torch.bfloat16, 3.4e38)],
)
def test_a_sum_that_does_not_fit_the_base_is_refused(tmp_path: Path, dtype, size):
    """e4m3fn has no infinity: torch makes 448 of 500, which no look at the result would find."""
    base = write_base(tmp_path / "base", dtype)
    file = linear_file(tmp_path / "x.safetensors", torch.ones(1, 24), torch.full((24, 1), size), 1.0)
    words = [
        "--mode",
        "merge_lora",
        "--source_path",
        str(file),
        "--base_path",
        str(base),
        "--to",
        "native",
    ]
    for target in ("out", "half"):
        error = run(main, [*words, "--target_path", str(tmp_path / target), "--lora_strength",
                           "1" if target == "out" else "1e-9"])  # fmt: skip
        assert error == (74 if target == "out" else 0)
    assert not (tmp_path / "out").exists()
    assert load_file(tmp_path / "half" / "diffusion_pytorch_model.safetensors")[f"{Q}.weight"].dtype == dtype


def test_generation_refuses_what_its_dtype_cannot_hold(tmp_path: Path, base_file: Path):
    file = linear_file(tmp_path / "x.safetensors", torch.ones(1, 24), torch.full((24, 1), 7e4), 1.0)
    section = AdapterFile(path=str(file), strength=1.0)
    shape = (24, 24)
    with pytest.raises(Exception, match=f"CKPT-120: {Q}.weight reaches 7.*float16 ends at 65504"):
        open_generation_weights(str(base_file), [section], MODEL, torch.float16).value_of(f"{Q}.weight", shape)
    open_generation_weights(str(base_file), [section], MODEL, torch.bfloat16).value_of(f"{Q}.weight", shape)


def test_folders_are_read_where_one_file_is_meant(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING)
    with pytest.raises(DataError, match="DATA-020"):
        read_adapter(tmp_path)
    linear_file(tmp_path / "mine.safetensors", torch.ones(1, 24), torch.ones(24, 1))
    assert read_adapter(tmp_path).updates.keys() == {Q}
    linear_file(tmp_path / "other.safetensors", torch.ones(1, 24), torch.ones(24, 1))
    with pytest.raises(DataError, match=r"DATA-131.*mine.safetensors, other.safetensors"):
        read_adapter(tmp_path)
    (tmp_path / "mine.safetensors").rename(tmp_path / "adapter_model.safetensors")
    assert read_adapter(tmp_path).updates.keys() == {Q}


def test_a_missing_shard_of_an_adapter_is_called_that(tmp_path: Path):
    key = f"diffusion_model.{Q}.lora_%s.weight"
    first, second = (tmp_path / f"lora-0000{n}-of-00002.safetensors" for n in (1, 2))
    save_file({key % "down": torch.ones(1, 24)}, first)
    with pytest.raises(DataError, match=r"DATA-024.*lacks 1 of 2 shards: lora-00002-of-00002.safetensors"):
        read_adapter(tmp_path)
    save_file({key % "up": torch.ones(24, 1)}, second)
    assert read_adapter(tmp_path).updates.keys() == {Q}


def test_diffusers_own_loader_reads_the_file_of_the_transformer(tmp_path: Path):
    """What the case of `save_lora_adapter` rests on: that diffusers takes such a file back."""
    model = example.base()
    model.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"], init_lora_weights=False))
    model.save_lora_adapter(tmp_path)
    other: WanTransformer3DModel = example.base()
    other.load_lora_adapter(tmp_path, weight_name="pytorch_lora_weights.safetensors", prefix=None, use_safetensors=True)
    with torch.no_grad():
        assert difference(other(*inputs()).sample, model(*inputs()).sample) <= 1e-6
    assert set(read_adapter(tmp_path).adapted().values()) == {Adapted(2, 6.0)}
