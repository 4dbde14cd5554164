"""Image-conditioned models (I2V, FLF2V) against diffusers: velocity, gradients, weight folders; and what is refused."""

import json

import pytest
import torch
from diffusers import WanTransformer3DModel
from published_names import diffusers_to_native
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from mm.activation.recompute import block_runner
from mm.checkpoint.formats import hf, native
from mm.checkpoint.formats.folder import FolderWeights
from mm.checkpoint.safetensor_file import Entry
from mm.config.model import WAN_1_3B, WAN_FLF2V_14B, WAN_I2V_1_3B, WAN_I2V_14B, WanConfig
from mm.config.recompute import Recompute
from mm.errors import ConfigError, DataError
from mm.wan.config_json import infer_config, read_config, wan_config_to_diffusers, wan_config_to_original
from mm.wan.folder import WeightFolder
from mm.wan.initial import initial_value
from mm.wan.layers import ModuleFactories
from mm.wan.model import WanModel
from mm.wan.names import native_to_mindspeed

TINY = {
    "in_dim": 36, "text_dim": 24, "hidden_size": 64, "ffn_dim": 96, "num_heads": 4, "num_layers": 2, "freq_dim": 32,
    "img_dim": 40, "clip_token_len": 257,
}  # fmt: skip
I2V, FLF2V = (WanConfig.model_validate({"model_type": kind, **TINY}) for kind in ("i2v", "flf2v"))
T2V = WanConfig(text_dim=24, hidden_size=64, ffn_dim=96, num_heads=4, num_layers=2, freq_dim=32)
SINGLE = "diffusion_pytorch_model.safetensors"
both = pytest.mark.parametrize("config", [I2V, FLF2V], ids=["i2v", "flf2v"])


def reference_for(config: WanConfig) -> WanTransformer3DModel:
    torch.manual_seed(0)
    reference = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=16, num_layers=2, ffn_dim=96, text_dim=24, freq_dim=32,
        in_channels=36, image_dim=40, added_kv_proj_dim=64, pos_embed_seq_len=514 if config is FLF2V else None,
    )  # fmt: skip
    with torch.no_grad():  # fresh norms are ones, a fresh modulation is small, fresh positions are zero
        for name, parameter in reference.named_parameters():
            if any(word in name for word in ("norm", "scale_shift_table", "pos_embed")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return reference


def ours_for(reference: WanTransformer3DModel, config: WanConfig) -> WanModel:
    model = WanModel(config)
    model.load_state_dict({diffusers_to_native(n): v.clone() for n, v in reference.state_dict().items()}, strict=True)
    return model


def inputs_for(config: WanConfig, batch: int = 2) -> tuple[torch.Tensor, ...]:
    """Latents, timesteps, text (diffusers knows text of 512 tokens only), image features, condition."""
    return (
        torch.randn(batch, 16, 3, 4, 6),
        torch.tensor([999.0, 37.5])[:batch],
        torch.randn(batch, 512, config.text_dim),
        torch.randn(batch, 514 if config is FLF2V else 257, 40),
        torch.randn(batch, 20, 3, 4, 6),
    )


def named(inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """The features among the inputs, by name."""
    return dict(zip(("image_features", "condition"), inputs[3:], strict=True))


def of_diffusers(reference, latents, timestep, text, image_features, condition):
    """diffusers takes the two images of a sample as two rows."""
    rows = image_features.reshape(-1, 257, 40)
    return reference(torch.cat((latents, condition), 1), timestep, text, rows).sample


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value - expected).abs().max() / expected.abs().max().clamp_min(1e-8)).item()


@both
def test_velocity_and_every_gradient_equal_diffusers(config):
    reference = reference_for(config)
    model, inputs = ours_for(reference, config), inputs_for(config)
    weight = torch.randn(2, 16, 3, 4, 6)
    expected, velocity = of_diffusers(reference, *inputs), model.velocity(*inputs[:3], **named(inputs))
    assert relative_error(velocity, expected) <= 1e-5

    (expected * weight).sum().backward()
    (velocity * weight).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert {"img_emb.proj.0.weight", "blocks.1.cross_attn.norm_k_img.weight"} <= gradients.keys()
    errors = {n: relative_error(gradients.pop(diffusers_to_native(n)), p.grad) for n, p in reference.named_parameters()}
    assert not gradients, "parameters that diffusers does not have"
    assert max(errors.values()) <= 1e-4, max(errors.items(), key=lambda item: item[1])


@both
def test_bf16_keeps_the_fp32_pieces_of_diffusers_and_is_nearer_to_fp32(config):
    reference = reference_for(config)
    model, inputs = ours_for(reference, config), inputs_for(config)
    names = [name for name, _ in reference.named_parameters()]
    in_fp32 = {n for n in names if set(n.split(".")) & set(reference._keep_in_fp32_modules)}
    with torch.no_grad():
        exact = model.velocity(*inputs[:3], **named(inputs))
        ours = model.to_precision(torch.bfloat16).velocity(*inputs[:3], **named(inputs))
        for name, parameter in reference.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if name in in_fp32 else torch.bfloat16)
        low = [value if index == 1 else value.bfloat16() for index, value in enumerate(inputs)]
        theirs = of_diffusers(reference, *low).float()
    kept = {name for name, value in model.named_parameters() if value.dtype == torch.float32}
    of_images = {name for name in kept if name.startswith("img_emb") or "_img" in name}
    assert of_images == {diffusers_to_native(n) for n in in_fp32 if "image_embedder" in n or "added" in n}
    assert len(of_images) == 4
    assert relative_error(ours, exact) <= 2e-2
    assert (ours - exact).norm() < (theirs - exact).norm()


@pytest.mark.parametrize("plan", [Recompute(), Recompute(full_layers=0, keep_layers=None, kept="q,k,v,O")])
def test_recomputation_keeps_every_bit(plan):
    reference, inputs = reference_for(I2V), inputs_for(I2V)
    found = []
    for parts in (ModuleFactories(), ModuleFactories(run_blocks=block_runner(plan))):
        model = WanModel(I2V, parts)
        model.load_state_dict(ours_for(reference, I2V).state_dict())
        velocity = model.velocity(*inputs[:3], **named(inputs))
        velocity.square().sum().backward()
        found.append([velocity, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@both
def test_initial_weights_follow_the_rules_of_wan(config):
    values = {name: initial_value(name, tuple(p.shape), 7) for name, p in WanModel(config).named_parameters()}
    for name, bound in (
        ("img_emb.proj.1.weight", (6 / 80) ** 0.5),
        ("blocks.0.cross_attn.k_img.weight", (6 / 128) ** 0.5),
    ):
        assert values[name].abs().max() <= bound
        assert values[name].std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert (values["img_emb.proj.0.weight"] == 1).all() and (values["blocks.1.cross_attn.norm_k_img.weight"] == 1).all()
    assert not any(v.any() for n, v in values.items() if n.endswith(("img_emb.emb_pos", "_img.bias", "proj.1.bias")))


def assert_loads(folder, reference):
    loaded = WanModel.from_pretrained(folder).state_dict()
    expected = {diffusers_to_native(name): value for name, value in reference.state_dict().items()}
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.items())


@both
def test_folders_of_diffusers_are_read_and_written(config, tmp_path):
    reference = reference_for(config)
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    source = WeightFolder.open(tmp_path / "theirs")
    assert (source.convention, source.config()) == ("diffusers", config)
    assert_loads(tmp_path / "theirs", reference)

    theirs = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert wan_config_to_diffusers(config) == {k: v for k, v in theirs.items() if k != "_diffusers_version"}
    (tmp_path / "ours").mkdir()
    hf.write_new_folder(tmp_path / "ours", entries(source), config, max_bytes=10**5)
    read = WanTransformer3DModel.from_pretrained(tmp_path / "ours").state_dict()
    assert read.keys() == reference.state_dict().keys()
    assert all(torch.equal(value, reference.state_dict()[name]) for name, value in read.items())


def entries(source: WeightFolder) -> list[Entry]:
    return [
        Entry(name, torch.float32, shape, lambda name=name: source.tensor(name))
        for name, shape in source.shapes().items()
    ]


@both
def test_folders_of_the_original_wan_are_read_and_written(config, tmp_path):
    reference = reference_for(config)
    reference.save_pretrained(tmp_path / "theirs")
    native.write_native(tmp_path, entries(WeightFolder.open(tmp_path / "theirs")), config)
    source = WeightFolder.open(tmp_path)
    assert (source.convention, source.config()) == ("native", config)
    assert_loads(tmp_path, reference)


def test_folders_in_mindspeed_mm_names_are_read(tmp_path):
    reference = reference_for(FLF2V)
    renamed = {native_to_mindspeed(diffusers_to_native(name)): value for name, value in reference.state_dict().items()}
    save_file(renamed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(FLF2V.model_dump_json())
    source = WeightFolder.open(tmp_path)
    assert (source.convention, source.config()) == ("mm", FLF2V)
    assert_loads(tmp_path, reference)


def test_tensors_that_diffusers_ignores_are_not_read_and_are_copied(tmp_path):
    """Published I2V folders hold norm_added_q, which no model has (`_keys_to_ignore_on_load_unexpected`)."""
    reference = reference_for(I2V)
    reference.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / SINGLE
    extra = {f"blocks.{index}.attn2.norm_added_q.weight": torch.full((64,), float(index)) for index in range(2)}
    save_file(load_file(file) | extra, file)
    assert_loads(tmp_path / "theirs", reference)
    assert (
        WanTransformer3DModel.from_pretrained(tmp_path / "theirs").state_dict().keys() == reference.state_dict().keys()
    )

    source = WeightFolder.open(tmp_path / "theirs")
    assert FolderWeights(source).kinds().keys() == FolderWeights(source).shapes().keys() == source.shapes().keys()
    (tmp_path / "ours").mkdir()
    hf.write_like(tmp_path / "ours", FolderWeights(source), source, source.shapes())
    written = load_file(tmp_path / "ours" / SINGLE)
    assert written.keys() == reference.state_dict().keys() | extra.keys()
    assert all(torch.equal(written[name], value) for name, value in extra.items())


@pytest.mark.parametrize("config", [WAN_1_3B, WAN_I2V_1_3B, WAN_I2V_14B, WAN_FLF2V_14B])
def test_the_configuration_follows_from_published_shapes(config, tmp_path):
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in WanModel(config).named_parameters()}
    assert infer_config(shapes, tmp_path) == config
    width, _, *patch = shapes["patch_embedding.weight"]
    if config.image_tokens:
        with pytest.raises(DataError, match="47 input channels") as caught:
            infer_config(shapes | {"patch_embedding.weight": (width, 47, *patch)}, tmp_path)
        assert caught.value.id == "DATA-026"


OFFICIAL = {
    "_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": 5120, "eps": 1e-06, "ffn_dim": 13824,
    "freq_dim": 256, "in_dim": 36, "num_heads": 40, "num_layers": 40, "out_dim": 16, "text_len": 512,
}  # fmt: skip


@pytest.mark.parametrize(("task", "config"), [("i2v", WAN_I2V_14B), ("flf2v", WAN_FLF2V_14B)])
def test_official_config_files(task, config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OFFICIAL | {"model_type": task}))
    assert read_config(tmp_path / "config.json") == config
    written = {key: value for key, value in wan_config_to_original(config).items() if key in OFFICIAL}
    assert written == {key: value for key, value in OFFICIAL.items() if not key.startswith("_d")}


@pytest.mark.parametrize(
    ("change", "id", "word"),
    [
        ({"model_type": "s2v"}, "DATA-026", "'s2v'"),
        ({"model_type": "t2v"}, "DATA-027", "in_dim 36"),
        ({"in_dim": 47}, "DATA-027", "36 (16 noisy, 4 mask and 16 condition channels), not 47"),
        ({"add_ref_conv": True}, "DATA-026", "ref_conv"),
    ],
)
def test_official_config_files_that_do_not_fit(change, id, word, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OFFICIAL | {"model_type": "i2v"} | change))
    with pytest.raises(DataError) as caught:
        read_config(tmp_path / "config.json")
    assert caught.value.id == id
    assert word in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"added_kv_proj_dim": None},
        {"added_kv_proj_dim": 128},
        {"image_dim": None},
        {"pos_embed_seq_len": 513},
        {"pos_embed_seq_len": "514"},
    ],
)
def test_image_keys_of_diffusers_that_do_not_belong_together(change, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(wan_config_to_diffusers(FLF2V) | change))
    with pytest.raises(DataError, match="do not belong together") as caught:
        read_config(tmp_path / "config.json")
    assert caught.value.id == "DATA-026"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"in_dim": 16}, "in_dim of i2v models with out_dim 16 is 36"),
        ({"clip_token_len": None}, "need clip_token_len"),
        ({"img_dim": None, "clip_token_len": None}, "need img_dim and clip_token_len"),
        ({"model_type": "t2v", "in_dim": 16}, "img_dim 40 has no effect in t2v models"),
        (
            {"model_type": "t2v", "img_dim": None, "clip_token_len": None},
            "that of i2v, flf2v and wan22_i2v models",
        ),
    ],
)
def test_configurations_that_contradict_themselves(values, words):
    with pytest.raises(ValidationError) as caught:
        WanConfig.model_validate(I2V.model_dump() | values)
    assert words in str(caught.value)


SHAPES = [(2, 16, 3, 4, 6), (2,), (2, 5, 24), (2, 257, 40), (2, 20, 3, 4, 6)]


@pytest.mark.parametrize(
    ("config", "change", "id"),
    [
        (I2V, {0: (2, 36, 3, 4, 6)}, "CFG-041"),
        (I2V, {3: None}, "CFG-056"),
        (I2V, {4: None}, "CFG-056"),
        (I2V, {3: None, 4: None}, "CFG-056"),
        (T2V, {}, "CFG-057"),
        (T2V, {3: None}, "CFG-057"),
        (I2V, {3: (2, 514, 40)}, "CFG-058"),
        (I2V, {3: (1, 257, 40)}, "CFG-058"),
        (I2V, {3: (2, 257, 41)}, "CFG-058"),
        (FLF2V, {}, "CFG-058"),
        (I2V, {4: (2, 16, 3, 4, 6)}, "CFG-059"),
        (I2V, {4: (2, 20, 3, 4, 4)}, "CFG-059"),
        (I2V, {4: (1, 20, 3, 4, 6)}, "CFG-059"),
    ],
)
def test_images_that_do_not_fit_are_refused(config, change, id):
    shapes = [change.get(index, shape) for index, shape in enumerate(SHAPES)]
    with pytest.raises(ConfigError) as caught:
        given = [None if shape is None else torch.zeros(shape) for shape in shapes]
        features = {name: value for name, value in named(tuple(given)).items() if value is not None}
        WanModel(config).velocity(*given[:3], **features)
    assert caught.value.id == id
