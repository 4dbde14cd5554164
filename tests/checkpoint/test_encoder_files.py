"""The encoders' original files: every name and shape of the published ones; tiny ones there and back."""

import json
import re
import shutil

import pytest
import torch
from diffusers import AutoencoderKLWan
from published_names import key_shape_md5
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection, UMT5Config, UMT5EncoderModel

from mm.checkpoint.encoder_kinds import CLIP, T5, VAE, VAE_22
from mm.cli.convert import main
from mm.cli.entry import run
from mm.errors import CheckpointError
from mm.wan.names_clip import clip_pairs
from mm.wan.names_t5 import t5_pairs
from mm.wan.names_vae import vae_22_pairs, vae_pairs

TINY_VAE = {"base_dim": 8, "z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
VAE_22_KIND = {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
TINY_VAE_22 = {**VAE_22_KIND, "base_dim": 8, "decoder_base_dim": 12, "z_dim": 6, "latents_mean": [0.0] * 6,
               "latents_std": [1.0] * 6}  # fmt: skip
TINY_T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4,
           "feed_forward_proj": "gated-gelu"}  # fmt: skip
TINY_CLIP = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
             "patch_size": 14, "image_size": 28, "projection_dim": 6, "hidden_act": "gelu"}  # fmt: skip
ORIGINAL = {  # tensors, and the md5 of names and shapes that is published for each file
    "vae": (194, "ccc42284ea13e1ad04693284c7a09be6"),
    "vae_22": (196, "e1de6c02cdac79f8b739f4d3698cd216"),
    "t5": (242, "9c8818c2cbea55eca56c7b447df170da"),
    "clip": (784, "5941c53e207d62f20f9025686193c40b"),
}


def published(kind):
    """The library's model of the published size, and the pairs of our table."""
    with torch.device("meta"):
        if kind == "vae":
            return AutoencoderKLWan().state_dict(), vae_pairs()
        if kind == "vae_22":
            wide = {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48}
            return AutoencoderKLWan(**wide, **VAE_22_KIND).state_dict(), vae_22_pairs()
        if kind == "t5":
            config = UMT5Config(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
            state = UMT5EncoderModel(config).state_dict()
            state.pop("encoder.embed_tokens.weight")  # tied to shared.weight
            return state, t5_pairs(24)
        config = CLIPVisionConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
                                  num_attention_heads=16, patch_size=14, projection_dim=1024)  # fmt: skip
        return CLIPVisionModelWithProjection(config).state_dict(), clip_pairs(32)


def text_tower():
    """Shapes of the half of CLIP's file that Wan does not use: XLM-RoBERTa large, a head, the temperature."""
    width = 1024
    top = {"token_embedding.weight": (250002, width), "type_embedding.weight": (1, width), "norm.bias": (width,),
           "pos_embedding.weight": (514, width), "norm.weight": (width,), "head.0.weight": (width, width),
           "head.2.weight": (width, width)}  # fmt: skip
    shapes = {"log_scale": (), **{f"textual.{name}": shape for name, shape in top.items()}}
    linears = {"attn.q": width, "attn.k": width, "attn.v": width, "attn.o": width, "ffn.0": 4 * width, "ffn.2": width}
    for block in range(24):
        for name, rows in linears.items():
            columns = 4 * width if name == "ffn.2" else width
            shapes[f"textual.blocks.{block}.{name}.weight"] = (rows, columns)
            shapes[f"textual.blocks.{block}.{name}.bias"] = (rows,)
        for name in ("norm1", "norm2"):
            shapes |= {f"textual.blocks.{block}.{name}.{half}": (width,) for half in ("weight", "bias")}
    return shapes


@pytest.mark.parametrize("kind", ORIGINAL)
def test_every_published_name_and_shape_has_one_place(kind):
    state, pairs = published(kind)
    assert sorted(name for pair in pairs for name in pair.hf) == sorted(state)
    shapes = {pair.native: tuple(pair.to_native(tuple(state[name] for name in pair.hf)).shape) for pair in pairs}
    if kind == "clip":
        shapes |= text_tower()
    assert (len(shapes), key_shape_md5(shapes)) == ORIGINAL[kind]
    for pair in pairs:
        back = pair.to_hf(torch.empty(shapes[pair.native], device="meta"))
        assert [value.shape for value in back] == [state[name].shape for name in pair.hf]


def tiny(kind):
    torch.manual_seed(0)
    if kind == "vae":
        model = AutoencoderKLWan(**TINY_VAE)
    elif kind == "vae_22":
        model = AutoencoderKLWan(**TINY_VAE_22)
    elif kind == "t5":
        model = UMT5EncoderModel(UMT5Config(**TINY_T5))
    else:
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**TINY_CLIP))
    for value in model.parameters():
        value.data = torch.randn_like(value)
    return model.eval()


PAIRS = {"vae": vae_pairs, "vae_22": vae_22_pairs, "t5": lambda: t5_pairs(2), "clip": lambda: clip_pairs(3)}
FILES = {"vae": VAE, "vae_22": VAE_22, "t5": T5, "clip": CLIP}


@pytest.fixture(params=ORIGINAL)
def kind(request):
    return request.param


@pytest.fixture
def folder(kind, tmp_path):
    """A component's folder, saved by its library."""
    tiny(kind).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


RULES_OF_VAE_22 = {
    r"^quant_conv": "conv1", r"^post_quant_conv": "conv2", r"\.conv_in\.": ".conv1.", r"\.conv_out\.": ".head.2.",
    r"\.norm_out\.": ".head.0.", r"\.mid_block\.attentions\.0": ".middle.1", r"\.mid_block\.resnets\.0": ".middle.0",
    r"\.mid_block\.resnets\.1": ".middle.2", r"\.norm1\.": ".residual.0.", r"\.norm2\.": ".residual.3.",
    r"(middle\.\d|resnets\.\d)\.conv1\.": r"\1.residual.2.",
    r"\.conv2\.": ".residual.6.", r"\.conv_shortcut\.": ".shortcut.",
    r"\.(down|up)_blocks\.(\d)\.resnets\.": r".\1samples.\2.\1samples.",
    r"\.down_blocks\.(\d)\.downsampler\.": r".downsamples.\1.downsamples.2.",
    r"\.up_blocks\.(\d)\.upsampler\.": r".upsamples.\1.upsamples.3.",
}  # fmt: skip


def native_of_vae_22(name):
    for pattern, replacement in RULES_OF_VAE_22.items():
        name = re.sub(pattern, replacement, name)
    return name


def as_original(kind):
    """What the original file holds of the tiny model, by rules that are written down again here."""
    state = tiny(kind).state_dict()
    if kind == "vae":
        return {pair.native: state[pair.hf[0]] for pair in vae_pairs()}
    if kind == "vae_22":
        return {native_of_vae_22(name): value for name, value in state.items()}
    if kind == "t5":
        return {pair.native: state[pair.hf[0]] for pair in t5_pairs(2)}
    layers, native = "vision_model.encoder.layers", {}
    native["visual.cls_embedding"] = state["vision_model.embeddings.class_embedding"].reshape(1, 1, 16)
    native["visual.pos_embedding"] = state["vision_model.embeddings.position_embedding.weight"].reshape(1, 5, 16)
    native["visual.patch_embedding.weight"] = state["vision_model.embeddings.patch_embedding.weight"]
    native["visual.head"] = state["visual_projection.weight"].t().contiguous()
    for half in ("weight", "bias"):
        native[f"visual.pre_norm.{half}"] = state[f"vision_model.pre_layrnorm.{half}"]
        native[f"visual.post_norm.{half}"] = state[f"vision_model.post_layernorm.{half}"]
        for i in range(3):
            ours = f"visual.transformer.{i}"
            qkv = [state[f"{layers}.{i}.self_attn.{name}_proj.{half}"] for name in "qkv"]
            native[f"{ours}.attn.to_qkv.{half}"] = torch.cat(qkv)
            native[f"{ours}.attn.proj.{half}"] = state[f"{layers}.{i}.self_attn.out_proj.{half}"]
            native[f"{ours}.norm1.{half}"] = state[f"{layers}.{i}.layer_norm1.{half}"]
            native[f"{ours}.norm2.{half}"] = state[f"{layers}.{i}.layer_norm2.{half}"]
            native[f"{ours}.mlp.0.{half}"] = state[f"{layers}.{i}.mlp.fc1.{half}"]
            native[f"{ours}.mlp.2.{half}"] = state[f"{layers}.{i}.mlp.fc2.{half}"]
    unused = {"textual.norm.weight": torch.ones(3), "log_scale": torch.tensor(2.0)}
    return native | unused


def convert(mode, source, target, *more):
    return run(main, ["--mode", mode, "--source_path", str(source), "--target_path", str(target), *map(str, more)])


def same_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) and value.dtype == theirs[name].dtype for name, value in ours.items())


@pytest.mark.parametrize("container", [None, "state_dict", "safetensors"])
def test_an_original_file_becomes_the_folder(kind, folder, tmp_path, container):
    state = as_original(kind)
    source = tmp_path / ("x.safetensors" if container == "safetensors" else "x.pth")
    if container == "safetensors":
        prefix = "model." if kind in ("vae", "vae_22") else ""  # as other tools republish it
        save_file({prefix + name: value.contiguous() for name, value in state.items()}, source)
    else:
        torch.save(state if container is None else {container: state}, source)
    assert convert("convert_to_hf", source, tmp_path / "out", "--ckpt_path", folder) == 0
    [file] = (tmp_path / "out").glob("*.safetensors")
    [theirs] = folder.glob("*.safetensors")
    assert file.name == theirs.name
    wanted = {}
    for name, value in load_file(theirs).items():  # newer transformers leaves the prefix out where it saves no head
        bare = kind == "clip" and not name.startswith(("vision_model.", "visual_projection."))
        wanted[f"vision_model.{name}" if bare else name] = value
    same_tensors(load_file(file), wanted)
    assert (tmp_path / "out" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    model = type(tiny(kind)).from_pretrained(tmp_path / "out")
    same_tensors(model.state_dict(), tiny(kind).state_dict())


def test_a_folder_becomes_the_original_file(kind, folder, tmp_path):
    assert convert("convert_to_native", folder, tmp_path / "out") == 0
    [file] = (tmp_path / "out").iterdir()
    assert file.name == FILES[kind].file + ".safetensors"
    wanted = {name: value for name, value in as_original(kind).items() if not name.startswith(("textual", "log_scale"))}
    same_tensors(load_file(file), wanted)
    assert convert("convert_to_hf", file, tmp_path / "back", "--ckpt_path", folder) == 0
    assert convert("convert_to_native", tmp_path / "back", tmp_path / "again") == 0
    assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_our_own_loaders_read_the_folder_of_clip(tmp_path):
    from pathlib import Path

    from mm.wan.image_encoder import ImageEncoder

    tiny("clip").save_pretrained(tmp_path / "hf")
    torch.save(as_original("clip"), tmp_path / "x.pth")
    assert convert("convert_to_hf", tmp_path / "x.pth", tmp_path / "out", "--ckpt_path", tmp_path / "hf") == 0
    frames = torch.rand(1, 3, 28, 28) * 2 - 1
    found = [
        ImageEncoder.from_pretrained(Path(tmp_path / name), "fp32", torch.device("cpu")).encode(frames)
        for name in ("out", "hf")
    ]
    assert torch.equal(*found)
    assert CLIPVisionModel.from_pretrained(tmp_path / "out").config.num_hidden_layers == 3


def test_our_own_loaders_read_the_folder_of_wan22_s_vae(tmp_path):
    """Latents of the original's weights are those of diffusers' model."""
    from pathlib import Path

    from mm.wan.encoders import VideoEncoder

    tiny("vae_22").save_pretrained(tmp_path / "hf")
    torch.save(as_original("vae_22"), tmp_path / "Wan2.2_VAE.pth")
    words = (tmp_path / "Wan2.2_VAE.pth", tmp_path / "out", "--ckpt_path", tmp_path / "hf")
    assert convert("convert_to_hf", *words) == 0
    pixels = torch.rand(1, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = tiny("vae_22").encode(pixels).latent_dist.mode()
    found = VideoEncoder.from_pretrained(Path(tmp_path / "out"), "fp32", torch.device("cpu")).encode(pixels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # means are 0, deviations 1


def test_tensors_that_are_missing_or_left_over(kind, folder, tmp_path, capsys):
    state = as_original(kind)
    state["surprise.weight"] = state.pop(next(iter(PAIRS[kind]())).native)
    torch.save(state, tmp_path / "x.pth")
    assert convert("convert_to_hf", tmp_path / "x.pth", tmp_path / "out", "--ckpt_path", folder) == 74
    told = capsys.readouterr().err
    assert "CKPT-011" in told and "1 missing, 1 unexpected" in told and "surprise.weight" in told
    assert not (tmp_path / "out").exists()


def test_other_sizes_need_a_configuration(kind, folder, tmp_path, capsys):
    torch.save(as_original(kind), tmp_path / "x.pth")
    assert convert("convert_to_hf", tmp_path / "x.pth", tmp_path / "out") == 74
    assert "CKPT-023" in capsys.readouterr().err
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    content = json.loads((folder / "config.json").read_text())
    wide = {"z_dim": 8, "latents_mean": [0.0] * 8, "latents_std": [1.0] * 8}
    wider = {"vae": wide, "vae_22": wide, "t5": {"d_ff": 32},
             "clip": {"intermediate_size": 32}}[kind]  # fmt: skip
    (other / "config.json").write_text(json.dumps(content | wider))
    assert convert("convert_to_hf", tmp_path / "x.pth", tmp_path / "out", "--ckpt_path", other) == 74
    assert "CKPT-011" in capsys.readouterr().err
    (other / "config.json").write_text('{"hidden_size": "wide", "base_dim": "wide", "d_model": "wide"}')
    assert convert("convert_to_hf", tmp_path / "x.pth", tmp_path / "out", "--ckpt_path", other) == 74
    assert "CKPT-022" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class Runs:
    """A pickle that would run code."""

    def __reduce__(self):
        return (print, ("code was run",))


def test_a_file_that_needs_code_is_refused(tmp_path, capsys):
    torch.save({**as_original("vae"), "x": Runs()}, tmp_path / "x.pth")
    assert convert("convert_to_hf", tmp_path / "x.pth", tmp_path / "out") == 74
    told = capsys.readouterr()
    assert "CKPT-021" in told.err and "code was run" not in told.out


def test_an_encoder_has_no_average(kind, tmp_path):
    torch.save(as_original(kind), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="CKPT-049"):
        main(["--mode", "convert_to_hf", "--source_path", str(tmp_path / "x.pth"), "--target_path",
              str(tmp_path / "out"), "--weights", "ema"])  # fmt: skip


def test_published_sizes_bring_their_configuration():
    """Without another folder; what encodes must be that of the published models."""
    for encoder, kind in ((VAE, "vae"), (VAE_22, "vae_22"), (T5, "t5"), (CLIP, "clip")):
        with torch.device("meta"):
            model, text = encoder.build(None)
        state, _ = published(kind)
        ours = {name: value.shape for name, value in model.state_dict().items() if "embed_tokens" not in name}
        assert ours == {name: value.shape for name, value in state.items()}
        config = json.loads(text)
        if kind == "vae":
            assert (config["_class_name"], config["z_dim"]) == ("AutoencoderKLWan", 16)
            assert config["latents_mean"][:2] == [-0.7571, -0.7089] and config["latents_std"][-1] == 1.916
        elif kind == "vae_22":
            assert {name: config[name] for name in VAE_22_KIND} == VAE_22_KIND and config["z_dim"] == 48
            means, stds = config["latents_mean"], config["latents_std"]
            assert (len(means), len(stds)) == (48, 48)
            assert (means[:2], means[-1], stds[:2], stds[-1]) == ([-0.2289, -0.0052], -0.0667, [0.4765, 1.0364], 0.7744)
            # sums of the release's lists (wan/modules/vae2_2.py), by which no other number of them is left unseen
            assert (round(sum(means), 4), round(sum(stds), 4)) == (-0.5589, 32.536)
        elif kind == "t5":
            assert (config["feed_forward_proj"], config["relative_attention_num_buckets"]) == ("gated-gelu", 32)
            assert (config["relative_attention_max_distance"], config["num_heads"]) == (128, 64)
        else:
            assert (config["num_attention_heads"], config["hidden_act"]) == (16, "gelu")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model."])
def test_wrappers_before_an_originals_names_are_read(kind, folder, prefix, tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({prefix + name: value.contiguous() for name, value in as_original(kind).items()}, file)
    words = ["--source_path", str(file), "--mode", "convert_to_hf", "--ckpt_path", str(folder)]
    assert run(main, [*words, "--target_path", str(tmp_path / "out")]) == 0
    ours, theirs = (load_file(next(place.glob("*.safetensors"))) for place in (tmp_path / "out", folder))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("mode", ["convert_to_hf", "convert_to_native"])
def test_nothing_that_is_not_finite_is_written(kind, folder, mode, tmp_path, capsys):
    file = next(folder.glob("*.safetensors"))
    state = load_file(file)
    name = max(state, key=lambda key: state[key].numel())
    state[name].view(-1)[3] = float("nan")
    save_file(state, file, {"format": "pt"})
    like = ["--ckpt_path", str(folder)] if mode == "convert_to_hf" else []
    words = ["--source_path", str(folder), "--mode", mode, *like, "--target_path", str(tmp_path / "out")]
    assert run(main, words) == 74
    assert "CKPT-016" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
