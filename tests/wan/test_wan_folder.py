"""Weight folders: what diffusers and others write is read whole; what is damaged or foreign is refused with its id."""

import json
import shutil

import pytest
import torch
from diffusers import WanTransformer3DModel
from published_names import diffusers_to_native
from safetensors.torch import load_file, save_file

from mm.config.model import WAN_1_3B, WanConfig
from mm.errors import DataError
from mm.wan.config_json import read_config, wan_config_to_diffusers
from mm.wan.folder import WeightFolder
from mm.wan.model import WanModel
from mm.wan.names import native_to_mindspeed

CONFIG = WanConfig(text_dim=32, hidden_size=64, ffn_dim=96, num_heads=2, num_layers=2, freq_dim=32)
INDEX = "diffusion_pytorch_model.safetensors.index.json"
SINGLE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, text_dim=32, freq_dim=32, ffn_dim=96, num_layers=2
    )


@pytest.fixture(scope="module")
def written(reference, tmp_path_factory):
    """What diffusers' save_pretrained writes, in shards with an index and in one file."""
    root = tmp_path_factory.mktemp("weights")
    reference.save_pretrained(root / "sharded", max_shard_size="100KB")
    reference.save_pretrained(root / "single")
    return root


@pytest.fixture
def sharded(written, tmp_path):
    shutil.copytree(written / "sharded", tmp_path / "transformer")
    return tmp_path / "transformer"


@pytest.fixture
def single(written, tmp_path):
    shutil.copytree(written / "single", tmp_path / "transformer")
    return tmp_path / "transformer"


@pytest.fixture
def native(reference):
    return {diffusers_to_native(name): value.clone() for name, value in reference.state_dict().items()}


def edit(path, change):
    """Rewrite a safetensors or JSON file through `change`, which alters its content in place."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    else:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)


def assert_loads(folder, native, dtype=torch.float32):
    loaded = WanModel.from_pretrained(folder, dtype=dtype).state_dict()
    assert loaded.keys() == native.keys()
    for name, value in loaded.items():
        assert torch.equal(value, native[name].to(value.dtype)), name
    return loaded


def refused(folder, id, *words):
    with pytest.raises(DataError) as caught:
        WanModel.from_pretrained(folder)
    assert caught.value.id == id, caught.value
    for word in words:
        assert word in str(caught.value)


def test_diffusers_shards_with_index(sharded, native):
    source = WeightFolder.open(sharded)
    assert len(source.shards) > 3
    assert source.convention == "diffusers"
    assert source.config() == CONFIG
    assert source.shapes() == {name: tuple(value.shape) for name, value in native.items()}
    assert torch.equal(source.tensor("head.modulation"), native["head.modulation"])
    assert_loads(sharded, native)


def test_hidden_files_beside_the_weights_are_no_weights(native, tmp_path):
    """Of each file macOS makes a second one, which unpacked elsewhere is no safetensors file at all."""
    tensors = list(native.items())
    for number, part in enumerate((tensors[:9], tensors[9:])):
        save_file({name: value.contiguous() for name, value in part}, tmp_path / f"part-{number}.safetensors")
        (tmp_path / f"._part-{number}.safetensors").write_bytes(b"\0\5\x16\7 Mac OS X")
        (tmp_path / f"._part-{number}.safetensors.index.json").write_bytes(b"\0\5\x16\7 Mac OS X")
    assert [shard.name for shard in WeightFolder.open(tmp_path).shards] == ["part-0.safetensors", "part-1.safetensors"]


def test_diffusers_single_file_in_bf16_keeps_the_fp32_pieces(single, native):
    loaded = assert_loads(single, native, torch.bfloat16)
    fp32 = {name for name, value in loaded.items() if value.dtype == torch.float32}
    assert {value.dtype for value in loaded.values()} == {torch.float32, torch.bfloat16}
    assert fp32 == {
        *(f"{module}.{kind}" for module in ("time_embedding.0", "time_embedding.2") for kind in ("weight", "bias")),
        *("time_projection.1.weight", "time_projection.1.bias"),
        *("head.head.weight", "head.head.bias", "head.modulation"),
        *(f"blocks.{index}.{rest}" for index in "01" for rest in ("modulation", "norm3.weight", "norm3.bias")),
    }


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "pipe.dit."])
def test_native_single_file_without_config(prefix, tmp_path):
    """Heads of 128 are assumed when nothing says otherwise, so this model has the published head width."""
    config = WanConfig(text_dim=32, hidden_size=256, ffn_dim=96, num_heads=2, num_layers=1, freq_dim=32)
    model = WanModel(config)
    model.init_weights(seed=1)
    save_file({prefix + name: value for name, value in model.state_dict().items()}, tmp_path / "wan.safetensors")
    source = WeightFolder.open(tmp_path / "wan.safetensors")
    assert (source.convention, source.prefix, source.config()) == ("native", prefix, config)
    assert_loads(tmp_path / "wan.safetensors", model.state_dict())
    assert_loads(tmp_path, model.state_dict())


def test_native_shards_without_index_and_with_original_config(native, tmp_path):
    names = sorted(native)
    save_file({name: native[name] for name in names[:20]}, tmp_path / "a.safetensors")
    save_file({name: native[name] for name in names[20:]}, tmp_path / "b.safetensors")
    original = {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "model_type": "t2v", "text_len": 512}
    original |= {"dim": 64, "ffn_dim": 96, "num_heads": 2, "num_layers": 2, "eps": 1e-6}
    original |= {"in_dim": 16, "out_dim": 16, "freq_dim": 32, "text_dim": 32}
    (tmp_path / "config.json").write_text(json.dumps(original))
    assert WeightFolder.open(tmp_path).config() == CONFIG
    assert_loads(tmp_path, native)


def test_mindspeed_mm_names_with_predictor_config(native, tmp_path):
    save_file({native_to_mindspeed(name): value for name, value in native.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(CONFIG.model_dump_json())
    source = WeightFolder.open(tmp_path)
    assert (source.convention, source.config()) == ("mm", CONFIG)
    assert_loads(tmp_path, native)


def test_config_for_diffusers_makes_the_same_model(reference, written):
    theirs = json.loads((written / "single" / "config.json").read_text())
    ours = wan_config_to_diffusers(CONFIG)
    assert ours == {key: value for key, value in theirs.items() if key != "_diffusers_version"}
    with torch.device("meta"):
        rebuilt = WanTransformer3DModel.from_config(wan_config_to_diffusers(WAN_1_3B))
    assert sum(p.numel() for p in rebuilt.parameters()) == 1_418_996_800


def test_missing_extra_and_misshaped_tensors_are_all_named(single):
    def change(tensors):
        del tensors["blocks.1.attn1.to_q.bias"]
        tensors["blocks.0.attn1.to_x.bias"] = torch.zeros(2)
        tensors["proj_out.bias"] = torch.zeros(3)

    edit(single / SINGLE, change)
    refused(single, "DATA-021", "1 missing (blocks.1.self_attn.q.bias)", "1 unexpected (blocks.0.attn1.to_x.bias)")
    refused(single, "DATA-021", "1 of another shape (head.head.bias [3] instead of [64])")


def test_a_long_list_of_missing_tensors_is_counted_and_cut(single):
    edit(single / SINGLE, lambda tensors: [tensors.pop(n) for n in list(tensors) if n.startswith("blocks.1.")])
    refused(single, "DATA-021", "27 missing (", ", ...)", "0 unexpected; 0 of another shape")


def test_config_of_another_size_is_a_mismatch(single):
    edit(single / "config.json", lambda config: config.update(num_layers=3, ffn_dim=97))
    refused(single, "DATA-021", "27 missing", "6 of another shape")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_file(single, keep):
    data = (single / SINGLE).read_bytes()
    (single / SINGLE).write_bytes(data[:keep])
    refused(single, "DATA-022", SINGLE)


def header_of(entry_changes):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | entry_changes
    return json.dumps({"patch_embedding.bias": entry}).encode()


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b"\xff\xfe",
        b'{"a": 1}',
        header_of({"dtype": "X32"}),
        header_of({"shape": [3]}),
        header_of({"shape": [-1, -2]}),
        header_of({"shape": None}),
        header_of({"data_offsets": [4, 12]}),
        header_of({"data_offsets": [0]}),
        b"[" * 100_000,
    ],
)
def test_damaged_header(single, header):
    (single / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    refused(single, "DATA-022", SINGLE)


def test_trailing_bytes_and_a_huge_header_size(single):
    data = (single / SINGLE).read_bytes()
    (single / SINGLE).write_bytes(data + b"\0")
    refused(single, "DATA-022", f"it has {len(data) + 1} bytes", f"describes {len(data)}")
    (single / SINGLE).write_bytes((1 << 62).to_bytes(8, "little") + data[8:])
    refused(single, "DATA-022", str(1 << 62))


def test_missing_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    refused(sharded, "DATA-024", shard.name)


def test_shard_and_index_that_disagree(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[0]
    edit(shard, lambda tensors: tensors.update(stray=torch.zeros(1)))
    refused(sharded, "DATA-025", shard.name, "1 not in the index ['stray']")
    edit(shard, lambda tensors: (tensors.pop("stray"), tensors.pop("scale_shift_table")))
    refused(sharded, "DATA-025", "1 tensors absent ['scale_shift_table']")


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": 1}}'],
)
def test_unusable_index(sharded, content):
    (sharded / INDEX).write_text(content)
    refused(sharded, "DATA-023", INDEX)


def test_two_indexes_are_ambiguous(sharded):
    shutil.copy(sharded / INDEX, sharded / "model.safetensors.index.json")
    refused(sharded, "DATA-023", "2 index files")


def test_files_beside_the_weights_are_reported(sharded, native, caplog):
    save_file({"other": torch.zeros(1)}, sharded / "other.safetensors")
    assert_loads(sharded, native)
    assert "other.safetensors is not part of the weights" in caplog.text


def test_paths_without_weights(tmp_path):
    refused(tmp_path / "absent", "DATA-020", "does not exist")
    refused(tmp_path, "DATA-020", "holds no safetensors file")
    (tmp_path / "weights.bin").write_bytes(b"x")
    refused(tmp_path / "weights.bin", "DATA-020", "not a .safetensors file")
    (tmp_path / "transformer").mkdir()
    refused(tmp_path, "DATA-020", f"Give {tmp_path / 'transformer'}")


def test_tensors_of_something_else(tmp_path):
    save_file({"down_blocks.0.weight": torch.zeros(1)}, tmp_path / "unet.safetensors")
    refused(tmp_path, "DATA-029", "down_blocks.0.weight")


def test_one_tensor_twice(native, tmp_path):
    save_file(native, tmp_path / "a.safetensors")
    save_file({"head.modulation": native["head.modulation"]}, tmp_path / "b.safetensors")
    refused(tmp_path, "DATA-030", "head.modulation", "a.safetensors", "b.safetensors")


def test_quantised_tensors(single):
    edit(single / SINGLE, lambda tensors: tensors.update({"proj_out.bias": torch.zeros(64, dtype=torch.int8)}))
    refused(single, "DATA-031", "proj_out.bias (I8)")


@pytest.mark.parametrize(
    ("change", "id", "word"),
    [
        ({"_class_name": "WanAnimateTransformer3DModel"}, "DATA-026", "WanAnimateTransformer3DModel"),
        ({"added_kv_proj_dim": 64}, "DATA-026", "added_kv_proj_dim"),
        ({"image_dim": 1280}, "DATA-026", "image_dim"),
        ({"pos_embed_seq_len": 514}, "DATA-026", "pos_embed_seq_len"),
        ({"qk_norm": "rms_norm"}, "DATA-027", "qk_norm"),
        ({"cross_attn_norm": False}, "DATA-027", "cross_attn_norm"),
        ({"num_layer": 2}, "DATA-027", "num_layer"),
        ({"num_layers": "2"}, "DATA-027", "num_layers"),
        ({"num_layers": 10**9}, "DATA-027", "num_layers"),
        ({"num_attention_heads": 10**9}, "DATA-027", "num_heads"),
        ({"attention_head_dim": "32"}, "DATA-027", "hidden_size"),
        ({"attention_head_dim": 33}, "DATA-027", "even whole head width"),
    ],
)
def test_config_that_does_not_fit(single, change, id, word):
    edit(single / "config.json", lambda config: config.update(change))
    refused(single, id, word)


def test_a_pointer_of_git_lfs_is_called_that(single):
    """As a clone without Git LFS has it; its first bytes would be a header of 2e18 bytes."""
    (file,) = single.glob("*.safetensors")
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 2838303\n")
    refused(single, "DATA-022", "git lfs pull")


def test_all_problems_of_a_config_are_reported_at_once(single):
    edit(single / "config.json", lambda c: (c.update(image_dim=1280, strange=1), c.pop("ffn_dim"), c.pop("eps")))
    with pytest.raises(DataError) as caught:
        read_config(single / "config.json")
    assert [p.id for p in caught.value.problems] == ["DATA-026", "DATA-027", "DATA-027"]
    assert "image_dim" in str(caught.value)
    assert 'unknown key "strange"' in str(caught.value)
    assert 'lacks the key "ffn_dim"' in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", '{"dim": 64, "dim": 64}', '{"eps": NaN}'])
def test_config_that_is_not_an_object(single, content):
    (single / "config.json").write_text(content)
    refused(single, "DATA-027", "config.json")


def test_weights_without_config_that_do_not_tell_the_shape(native, tmp_path):
    path = tmp_path / "wan.safetensors"
    save_file(native, path)  # 64 wide: not heads of 128
    refused(path, "DATA-028", "width 64 in heads of 128")
    save_file({name: value for name, value in native.items() if name != "patch_embedding.weight"}, path)
    refused(path, "DATA-028", "patch_embedding.weight")
    save_file(native | {"blocks.0.cross_attn.k_img.weight": torch.zeros(64, 64)}, path)
    refused(path, "DATA-026", "blocks.0.cross_attn.k_img.weight")
