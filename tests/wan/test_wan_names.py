"""Name tables, key/shape fingerprints and parameter counts against published figures and diffusers' own names."""

import pytest
import torch
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from published_names import diffusers_to_native, key_shape_md5, mindspeed_to_native

from mm.config.model import WAN_1_3B, WAN_14B, WAN_FLF2V_14B, WAN_I2V_1_3B, WAN_I2V_14B, WAN_TI2V_5B, of_task
from mm.config.tasks.registry import TASKS
from mm.errors import DataError
from mm.wan import names
from mm.wan.config_json import infer_config
from mm.wan.model import WanModel
from mm.wan.prefixes import common_prefix, unwrapped


def meta_shapes(config):
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in WanModel(config).state_dict().items()}


@pytest.fixture(scope="module")
def shapes_14b():
    return meta_shapes(WAN_14B)


def elements(shapes):
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def test_1_3b_has_the_published_layout():
    shapes = meta_shapes(WAN_1_3B)
    assert (len(shapes), elements(shapes)) == (825, 1_418_996_800)
    assert key_shape_md5(shapes) == "9269f8db9040a9d860eaca435be61814"


def test_14b_has_the_published_layout_in_native_and_diffusers_names(shapes_14b):
    assert (len(shapes_14b), elements(shapes_14b)) == (1095, 14_288_491_584)
    assert key_shape_md5(shapes_14b) == "aafcfd9672c3a2456dc46e1cb6e52c70"
    in_diffusers = {names.native_to_diffusers(name): shape for name, shape in shapes_14b.items()}
    assert key_shape_md5(in_diffusers) == "cb104773c6c2cb6df4f9529ad5c60d0b"


@pytest.mark.parametrize(
    ("config", "tensors", "parameters", "md5"),
    [
        (WAN_I2V_1_3B, 983, 1_564_428_608, "6d6ccde6845b95ad9114ab993d917893"),  # published as Fun-1.3B-InP
        (WAN_I2V_14B, 1303, 16_394_878_784, "6bfcfb3b342cb286ce886889d519a77e"),
        (WAN_FLF2V_14B, 1304, 16_395_536_704, "3ef3b1f8e1dab83d5b71fd7b617f859f"),
    ],
)
def test_models_of_images_have_the_published_layouts(config, tensors, parameters, md5):
    shapes = meta_shapes(config)
    assert (len(shapes), elements(shapes)) == (tensors, parameters)
    assert key_shape_md5(shapes) == md5


def family(size, task, **sizes):
    return of_task(size, TASKS[task], **sizes)


@pytest.mark.parametrize(
    ("config", "tensors", "parameters", "md5"),
    [
        (family(WAN_1_3B, "fun_control"), 983, 1_564_502_336, "349723183fc063b2bfc10bb2835cf677"),
        (family(WAN_14B, "fun_control"), 1303, 16_395_124_544, "efa44cddf936c70abd0ea28b6cbe946c"),
        (family(WAN_1_3B, "fun_control_ref"), 985, 1_564_602_176, "70ddad9d3a133785da5ea371aae09504"),
        (family(WAN_14B, "fun_control_ref"), 1305, 16_395_457_344, "26bde73488a92e64cc20b0a7485b9e5b"),
        (family(WAN_1_3B, "fun_camera"), 989, 1_616_313_152, "ac6a5aa74f4a0aab6f64eb9a72f19901"),
        (family(WAN_14B, "fun_camera"), 1309, 16_898_128_704, "b61c605c2adbd23124d152ed28e049ae"),
        (family(WAN_1_3B, "vace"), 1264, 1_418_996_800 + 734_975_232, "a61453409b67cd3246cf0c3bebad47ba"),
        (
            family(WAN_14B, "vace", vace_layers=tuple(range(0, 40, 5))),
            1331,
            14_288_491_584 + 3_049_101_312,
            "7a513e1f257a861512b1afd387a8ecd9",
        ),
        (WAN_TI2V_5B, 825, 4_999_787_712, "1f5ab7703c6fc803fdded85ff040c316"),
    ],
    ids=lambda value: value.model_type if hasattr(value, "model_type") else None,
)
def test_models_of_the_family_have_the_published_layouts_and_are_known_by_them(
    config, tensors, parameters, md5, tmp_path
):
    shapes = meta_shapes(config)
    assert (len(shapes), elements(shapes)) == (tensors, parameters)
    assert key_shape_md5(shapes) == md5
    assert infer_config(shapes, tmp_path) == config


def i2v_native_shapes(shapes_14b, emb_pos: bool):
    """The published I2V-14B layout: the T2V layout with 36 input channels and the image tensors."""
    width = 5120
    shapes = dict(shapes_14b) | {"patch_embedding.weight": (width, 36, 1, 2, 2)}
    for index in range(40):
        for name in ("k_img", "v_img"):
            shapes[f"blocks.{index}.cross_attn.{name}.weight"] = (width, width)
            shapes[f"blocks.{index}.cross_attn.{name}.bias"] = (width,)
        shapes[f"blocks.{index}.cross_attn.norm_k_img.weight"] = (width,)
    for layer, shape in {"0": (1280,), "1": (1280, 1280), "3": (width, 1280), "4": (width,)}.items():
        shapes |= {f"img_emb.proj.{layer}.weight": shape, f"img_emb.proj.{layer}.bias": shape[:1]}
    if emb_pos:
        shapes["img_emb.emb_pos"] = (1, 514, 1280)
    return shapes


def test_image_rows_are_those_of_the_published_i2v_and_flf2v_layouts(shapes_14b):
    i2v, flf2v = (i2v_native_shapes(shapes_14b, emb_pos) for emb_pos in (False, True))
    assert key_shape_md5(i2v) == "6bfcfb3b342cb286ce886889d519a77e"
    assert key_shape_md5(flf2v) == "3ef3b1f8e1dab83d5b71fd7b617f859f"
    with torch.device("meta"):
        theirs = WanTransformer3DModel(
            in_channels=36, image_dim=1280, added_kv_proj_dim=5120, pos_embed_seq_len=514
        ).state_dict()
    assert {names.native_to_diffusers(n): s for n, s in flf2v.items()} == {n: tuple(v.shape) for n, v in theirs.items()}


VACE = {  # the layers with a hint, tensors and md5 of the published layout
    "1.3B": (WAN_1_3B, range(0, 30, 2), 1264, "a61453409b67cd3246cf0c3bebad47ba"),
    "14B": (WAN_14B, range(0, 40, 5), 1331, "7a513e1f257a861512b1afd387a8ecd9"),
}


def vace_native_shapes(config, layers):
    """The published VACE layout: the T2V layout, and a branch of as many blocks as layers have a hint."""
    width, shapes = config.hidden_size, meta_shapes(config)
    block = {name.removeprefix("blocks.0."): shape for name, shape in shapes.items() if name.startswith("blocks.0.")}
    for index in range(len(layers)):
        shapes |= {f"vace_blocks.{index}.{name}": shape for name, shape in block.items()}
        for name in ("before_proj", "after_proj") if index == 0 else ("after_proj",):
            shapes |= {
                f"vace_blocks.{index}.{name}.weight": (width, width),
                f"vace_blocks.{index}.{name}.bias": (width,),
            }
    shapes["vace_patch_embedding.weight"], shapes["vace_patch_embedding.bias"] = (width, 96, 1, 2, 2), (width,)
    return shapes


@pytest.mark.parametrize("size", VACE)
def test_vace_rows_are_those_of_the_published_layouts_and_of_diffusers(size):
    config, layers, tensors, md5 = VACE[size]
    shapes = vace_native_shapes(config, layers)
    assert len(shapes) == tensors
    assert key_shape_md5(shapes) == md5
    with torch.device("meta"):
        theirs = WanVACETransformer3DModel(
            num_attention_heads=config.num_heads, ffn_dim=config.ffn_dim, num_layers=config.num_layers,
            vace_layers=list(layers), vace_in_channels=96,
        ).state_dict()  # fmt: skip
    assert {names.native_to_diffusers(n): s for n, s in shapes.items()} == {
        n: tuple(v.shape) for n, v in theirs.items()
    }
    assert all(mindspeed_to_native(names.native_to_mindspeed(name)) == name for name in shapes)
    assert len({names.native_to_mindspeed(name) for name in shapes}) == len(shapes)


@pytest.mark.parametrize(
    ("base", "tensors", "parameters", "md5"),
    [
        (WAN_I2V_1_3B, 983, 1_564_502_336, "349723183fc063b2bfc10bb2835cf677"),
        (WAN_I2V_14B, 1303, 16_395_124_544, "efa44cddf936c70abd0ea28b6cbe946c"),
    ],
)
def test_control_models_have_the_names_of_models_of_images(base, tensors, parameters, md5):
    """Fun-Control: 48 input channels instead of 36, and no tensor of another name."""
    shapes = meta_shapes(base) | {"patch_embedding.weight": (base.hidden_size, 48, 1, 2, 2)}
    assert (len(shapes), elements(shapes)) == (tensors, parameters)
    assert key_shape_md5(shapes) == md5
    assert {diffusers_to_native(names.native_to_diffusers(name)) for name in shapes} == shapes.keys()


def test_tables_are_one_to_one_both_ways(shapes_14b):
    native = set(i2v_native_shapes(shapes_14b, emb_pos=True))
    for there, back in (
        (names.native_to_diffusers, diffusers_to_native),
        (names.native_to_mindspeed, mindspeed_to_native),
    ):
        other = [there(name) for name in native]
        assert len(set(other)) == len(native)
        assert {back(name) for name in other} == native


@pytest.mark.parametrize(
    ("native", "mm"),
    [
        ("text_embedding.0.weight", "text_embedding.linear_1.weight"),
        ("text_embedding.2.bias", "text_embedding.linear_2.bias"),
        ("time_projection.1.weight", "time_projection.1.weight"),
        ("blocks.7.self_attn.o.bias", "blocks.7.self_attn.proj_out.bias"),
        ("blocks.39.cross_attn.norm_q.weight", "blocks.39.cross_attn.q_norm.weight"),
        ("blocks.0.cross_attn.norm_k_img.weight", "blocks.0.cross_attn.k_norm_img.weight"),
        ("blocks.0.norm3.weight", "blocks.0.norm3.weight"),
        ("head.modulation", "head.modulation"),
    ],
)
def test_mindspeed_mm_names(native, mm):
    assert names.native_to_mindspeed(native) == mm
    assert mindspeed_to_native(mm) == native


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.self_attn.norm_q.bias",  # norms of queries have no bias
        "blocks.0.modulation.weight",
        "blocks.00.norm3.weight",
        "blocks..norm3.weight",
        "blocks.0.norm1.weight",
        "blocks.0.after_proj.weight",  # of VACE's branch alone
        "vace_blocks.0.ref_conv.weight",
        "condition_embedder.time_proj.weight",
        "patch_embedding.weight\n",
    ],
)
def test_unknown_names_are_refused_by_name(name):
    with pytest.raises(DataError) as caught:
        names.native_to_diffusers(name)
    assert caught.value.id == "DATA-029"
    assert repr(name)[1:-1] in str(caught.value)  # a line end as it is written, since messages are one line


def test_convention_is_told_by_content(shapes_14b):
    native = list(shapes_14b)
    assert names.convention(native) == "native"
    assert names.convention(map(names.native_to_diffusers, native)) == "diffusers"
    assert names.convention(map(names.native_to_mindspeed, native)) == "mm"
    assert names.convention([*map(names.native_to_mindspeed, native), "ema.decay"]) == "mm"
    with pytest.raises(DataError, match=r"down_blocks\.0\.weight") as caught:
        names.convention(["down_blocks.0.weight"])
    assert caught.value.id == "DATA-029"


@pytest.mark.parametrize(
    "prefix",
    [
        *("", "model.", "model.diffusion_model.", "diffusion_model.", "pipe.dit.", "module.", "_orig_mod.", "ema."),
        *("module._orig_mod.", "_orig_mod.module.", "_fsdp_wrapped_module._orig_mod.model.", "ema.module."),
    ],
)
def test_prefixes_of_other_tools_are_found(prefix):
    assert common_prefix([prefix + "head.modulation", prefix + "patch_embedding.bias"]) == prefix
    assert common_prefix([prefix + "head.modulation", "other"]) == ""


@pytest.mark.parametrize("config", [WAN_14B, WAN_FLF2V_14B], ids=["t2v", "flf2v"])
def test_no_name_of_a_model_is_taken_for_a_prefix_or_a_wrapper(config):
    for name in meta_shapes(config):
        for convention in names.CONVENTIONS:
            spelled = names.translate(name, "native", convention)
            assert unwrapped(spelled) == spelled
            assert common_prefix([spelled]) == ""


def test_what_stands_before_known_names_is_said():
    with pytest.raises(DataError, match=r"DATA-029.*without the student\.net\. that stands before") as caught:
        names.convention(["student.net.blocks.0.self_attn.q.weight", "student.net.head.modulation"])
    assert "blocks.0.self_attn.q.weight" in str(caught.value)
    with pytest.raises(DataError, match=r"names of Wan after a\., b\.; keep one set"):
        names.convention(["a.head.modulation", "b.head.modulation"])
    with pytest.raises(DataError, match="They are of a LoRA"):
        names.convention(["diffusion_model.blocks.0.self_attn.q.lora_down.weight"])
