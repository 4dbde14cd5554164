"""MM checkpoints of pipelines: the files by the published rules, every way back, and files that do not belong together.

The rules are written down again here, in a few lines, from MindSpeed-MM's documentation: stages in order, [VP][PP]
flattened chunk after chunk, blocks counted from 0 in each, everything before the blocks first, the head last.
"""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conversions import REPO, as_native, assert_same_bits, bits, names, tensors_of
from diffusers import WanTransformer3DModel
from loaded import load_into
from safetensors.torch import load_file, save_file

from mm.checkpoint import convert
from mm.checkpoint.weights import open_weights
from mm.cli.convert import main
from mm.cli.entry import run
from mm.errors import CheckpointError
from mm.wan.model import WanModel

NUM_LAYERS = 22
SPLITS = {
    "pipeline": ((7, 5, 6, 4),),
    "virtual": ((7, 5), (6, 4)),
    "eleven chunks": ((1, 1),) * 11,
    "eleven ranks": ((2,) * 11,),
    "one file": ((22,),),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder of an image-to-video model by diffusers, with learned positions and mixed dtypes."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=NUM_LAYERS, ffn_dim=24, text_dim=12, freq_dim=8,
        in_channels=36, image_dim=10, added_kv_proj_dim=16, pos_embed_seq_len=6,
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn_like(parameter)
        if "norm" not in name and "table" not in name:
            parameter.data = parameter.data.bfloat16()
    folder = tmp_path_factory.mktemp("hf") / "transformer"
    model.save_pretrained(folder, max_shard_size="150KB")
    return folder


@pytest.fixture(scope="module")
def whole(original, tmp_path_factory):
    """The state dict of the one file that training without a pipeline reads; `test_convert` compares its names."""
    folder = tmp_path_factory.mktemp("mm") / "whole"
    convert.convert_to_mm(original, folder)
    return torch.load(folder / "release" / "mp_rank_00" / "model_optim_rng.pt", weights_only=True)["model"]


@pytest.fixture(scope="module")
def pipeline(original, tmp_path_factory):
    """A checkpoint of four pipeline ranks; tests that damage it take a copy."""
    folder = tmp_path_factory.mktemp("mm") / "pipeline"
    convert.convert_to_mm(original, folder, SPLITS["pipeline"])
    return folder


def expected_stages(whole, sizes):
    stages, start = [], 0
    for place, size in enumerate(sizes):
        stage = {}
        for name, value in whole.items():
            parts = name.split(".")
            if parts[0] == "blocks":
                if start <= int(parts[1]) < start + size:
                    stage[".".join(["blocks", str(int(parts[1]) - start), *parts[2:]])] = value
            elif place == (len(sizes) - 1 if parts[0] == "head" else 0):
                stage[name] = value
        stages.append(stage)
        start += size
    return stages


@pytest.mark.parametrize("split", SPLITS)
def test_files_hold_what_each_rank_of_a_pipeline_loads(original, whole, tmp_path, split):
    rows = SPLITS[split]
    convert.convert_to_mm(original, tmp_path / "mm", rows)
    assert (tmp_path / "mm" / "latest_checkpointed_iteration.txt").read_bytes() == b"release"
    num_ranks, num_chunks = len(rows[0]), len(rows)
    expected = expected_stages(whole, [size for row in rows for size in row])
    folders = ["mp_rank_00"] if num_ranks == 1 else [f"mp_rank_00_{rank:03d}" for rank in range(num_ranks)]
    assert names(tmp_path / "mm" / "release") == folders
    assert names(tmp_path / "mm") == ["latest_checkpointed_iteration.txt", "mm_config.json", "release"]
    for rank, folder in enumerate(folders):
        content = torch.load(tmp_path / "mm" / "release" / folder / "model_optim_rng.pt", weights_only=True)
        keys = ["model"] if num_chunks == 1 else [f"model{index}" for index in range(num_chunks)]
        assert list(content) == [*keys, "checkpoint_version"]
        assert content["checkpoint_version"] == 3.0
        for index, key in enumerate(keys):
            assert_same_bits(content[key], expected[index * num_ranks + rank])


def test_the_image_embedding_with_its_norms_is_on_the_first_stage(original, tmp_path):
    convert.convert_to_mm(original, tmp_path / "mm", ((11, 11),))
    files = [tmp_path / "mm" / "release" / f"mp_rank_00_00{rank}" / "model_optim_rng.pt" for rank in (0, 1)]
    first, last = (torch.load(file, weights_only=True)["model"] for file in files)
    for place in (0, 1, 3, 4):
        assert {f"img_emb.proj.{place}.weight", f"img_emb.proj.{place}.bias"} <= first.keys()
    assert "img_emb.emb_pos" in first
    assert {name for name in last if not name.startswith("blocks.")} == {
        "head.head.weight", "head.head.bias", "head.modulation",
    }  # fmt: skip


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_leads_back_to_the_same_bits(original, tmp_path, split):
    convert.convert_to_mm(original, tmp_path / "mm", SPLITS[split])
    convert.convert_to_hf(tmp_path / "mm", tmp_path / "hf", original)
    assert names(tmp_path / "hf") == names(original)
    assert_same_bits(tensors_of(tmp_path / "hf"), tensors_of(original))
    source = open_weights(tmp_path / "mm")
    assert (source.num_ranks, source.num_chunks) == (len(SPLITS[split][0]), len(SPLITS[split]))
    model = WanModel(source.config())
    load_into(model, source)
    expected = {name: tensor.float() for name, tensor in as_native(original).items()}
    assert_same_bits({name: value.detach() for name, value in model.named_parameters()}, expected)


def test_another_split_of_a_split_is_the_split_of_the_whole(original, tmp_path):
    order = ["pipeline", "virtual", "eleven ranks", "eleven chunks", "one file", "pipeline"]
    convert.convert_to_mm(original, tmp_path / "0", SPLITS[order[0]])
    (tmp_path / "0" / "mm_config.json").unlink()  # MindSpeed-MM writes none
    for step, split in enumerate(order[1:], start=1):
        convert.resplit(tmp_path / str(step - 1), tmp_path / str(step), SPLITS[split])
    first, last = tmp_path / "0" / "release", tmp_path / "5" / "release"
    assert names(first) == names(last)
    for folder in first.iterdir():
        ours, theirs = (torch.load(f / folder.name / "model_optim_rng.pt", weights_only=True) for f in (last, first))
        assert_same_bits(ours["model"], theirs["model"])


def test_hf_to_native_to_mm_to_hf_of_a_published_layout_of_images(original, tmp_path):
    """Published folders hold norm_added_q of every block, which no model has; the way back keeps their bytes."""
    tensors = tensors_of(original)
    tensors |= {f"blocks.{i}.attn2.norm_added_q.weight": torch.randn(16) for i in range(NUM_LAYERS)}
    (tmp_path / "hf").mkdir()
    half = sorted(tensors)[: len(tensors) // 2]
    files = {"a.safetensors": half, "b.safetensors": sorted(tensors.keys() - set(half))}
    for file, keys in files.items():
        save_file({key: tensors[key] for key in keys}, tmp_path / "hf" / file, {"format": "pt"})
    weight_map = {key: file for file, keys in files.items() for key in keys}
    index = tmp_path / "hf" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    shutil.copy(original / "config.json", tmp_path / "hf")
    convert.convert_to_native(tmp_path / "hf", tmp_path / "native")
    convert.convert_to_mm(tmp_path / "native", tmp_path / "mm", SPLITS["virtual"])
    convert.convert_to_hf(tmp_path / "mm", tmp_path / "back", tmp_path / "hf")
    assert names(tmp_path / "back") == names(tmp_path / "hf")
    assert (tmp_path / "back" / index.name).read_bytes() == index.read_bytes()
    for file, keys in files.items():
        assert_same_bits(load_file(tmp_path / "back" / file), {key: tensors[key] for key in keys})


def test_conversion_needs_no_megatron(original, tmp_path):
    code = "import sys; from mm.cli.convert import main; main(sys.argv[1:]); print(*sys.modules)"
    words = ["--mode", "convert_to_mm", "--source_path", original, "--target_path", tmp_path / "mm"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "torch" in loaded
    assert not loaded & {"megatron", "mindspeed", "torch_npu", "diffusers", "transformers"}


def test_only_mm_checkpoints_are_split_again(original, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        convert.resplit(original, tmp_path / "out", SPLITS["pipeline"])
    assert caught.value.id == "CKPT-044"
    assert names(tmp_path) == []


@pytest.mark.parametrize("rows", [((7, 5, 6, 3),), ((7, 5, 6, 5),), ((11, 11), (1, 1))])
def test_blocks_that_do_not_add_up_are_refused(original, tmp_path, rows):
    with pytest.raises(CheckpointError) as caught:
        convert.convert_to_mm(original, tmp_path / "out", rows)
    assert caught.value.id == "CKPT-040"
    assert "22" in str(caught.value)
    assert names(tmp_path) == []


def content(folder, rank):
    return torch.load(folder / f"mp_rank_00_{rank:03d}" / "model_optim_rng.pt", weights_only=True)


def put(folder, rank, value):
    torch.save(value, folder / f"mp_rank_00_{rank:03d}" / "model_optim_rng.pt")


def with_state(change):
    """A damage that changes the state dict of rank 1."""

    def damage(folder):
        found = content(folder, 1)
        change(found["model"])
        put(folder, 1, found)

    return damage


def one_more_chunk(folder):
    put(folder, 1, {"model0": content(folder, 1)["model"], "model1": {}})


def a_hole_in_the_chunks(folder):
    put(folder, 1, {"model0": content(folder, 1)["model"], "model2": {}})


DAMAGES = {
    "the first file is missing": (lambda f: shutil.rmtree(f / "mp_rank_00_000"), "CKPT-041", "mp_rank_00_000"),
    "a file between is missing": (lambda f: shutil.rmtree(f / "mp_rank_00_001"), "CKPT-041", "mp_rank_00_001"),
    "an empty folder": (lambda f: (f / "mp_rank_00_002" / "model_optim_rng.pt").unlink(), "CKPT-041", "mp_rank_00_002"),
    "the last file is missing": (lambda f: shutil.rmtree(f / "mp_rank_00_003"), "CKPT-041", "no head"),
    "a whole model beside": (lambda f: (f / "mp_rank_00").mkdir(), "CKPT-042", "mp_rank_00,"),
    "a foreign folder beside": (lambda f: (f / "mp_rank_00_0").mkdir(), "CKPT-042", "mp_rank_00_0,"),
    "layer-zero beside": (lambda f: (f / "model_0.pt").touch(), "CKPT-042", "model_*.pt"),
    "tensor parallel": (lambda f: (f / "mp_rank_01_000").mkdir(), "CKPT-018", "mp_rank_01_000"),
    "a rank with virtual stages": (one_more_chunk, "CKPT-042", "mp_rank_00_001 2"),
    "a hole in the chunks": (a_hole_in_the_chunks, "CKPT-042", "model0, model2"),
    "blocks not counted from 0": (
        with_state(lambda s: s.update({f"blocks.9{k[8:]}": s.pop(k) for k in list(s) if k.startswith("blocks.0.")})),
        "CKPT-043",
        "stage 1 of 4",
    ),
    "a head in the middle": (with_state(lambda s: s.update({"head.modulation": torch.ones(1)})), "CKPT-043", "head"),
    "embedders in the middle": (
        with_state(lambda s: s.update({"patch_embedding.bias": torch.ones(1)})), "CKPT-043", "patch_embedding.bias",
    ),
    "unknown names": (with_state(lambda s: s.update({"surprise": torch.ones(1)})), "CKPT-043", "surprise"),
    "no tensor": (with_state(lambda s: s.update({"blocks.0.modulation": 1})), "CKPT-021", "blocks.0.modulation"),
    "cut short": (lambda f: (f / "mp_rank_00_001" / "model_optim_rng.pt").write_bytes(b"PK"), "CKPT-021", "00_001"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_do_not_make_one_checkpoint_are_refused(pipeline, tmp_path, damage):
    change, identifier, text = DAMAGES[damage]
    shutil.copytree(pipeline, tmp_path / "mm")
    assert open_weights(tmp_path / "mm").num_ranks == 4
    change(tmp_path / "mm" / "release")
    with pytest.raises(CheckpointError) as caught:
        open_weights(tmp_path / "mm")
    assert caught.value.id == identifier, str(caught.value)
    assert text in str(caught.value)


def test_a_missing_tensor_of_a_stage_is_named_as_in_the_model(original, pipeline, tmp_path):
    shutil.copytree(pipeline, tmp_path / "mm")
    with_state(lambda state: state.pop("blocks.2.self_attn.proj_q.weight"))(tmp_path / "mm" / "release")
    with pytest.raises(CheckpointError) as caught:
        convert.convert_to_hf(tmp_path / "mm", tmp_path / "hf", original)
    assert caught.value.id == "CKPT-011"
    assert "missing: blocks.9.self_attn.q.weight" in str(caught.value)  # the third block after the first seven


def test_extra_states_of_megatron_are_no_weights(original, pipeline, tmp_path):
    shutil.copytree(pipeline, tmp_path / "mm")
    with_state(lambda s: s.update({"blocks.0.self_attn.proj_q._extra_state": None}))(tmp_path / "mm" / "release")
    assert_same_bits(as_native(tmp_path / "mm"), as_native(original))


# The command line


def flags(*words):
    return run(main, [str(word) for word in words])


def test_the_flag_in_both_forms(original, tmp_path):
    for name, text in (("flat", "[7,5,6,4]"), ("nested", "[[7,5],[6,4]]")):
        words = ("--source_path", original, "--target_path", tmp_path / name, "--mode", "convert_to_mm")
        assert flags(*words, "--pp_vpp_layers", text) == 0
    assert bits(open_weights(tmp_path / "flat").read("blocks.21.modulation")) == bits(
        open_weights(tmp_path / "nested").read("blocks.21.modulation")
    )
    words = ("--source_path", tmp_path / "flat", "--target_path", tmp_path / "again", "--mode", "resplit")
    assert flags(*words, "--pp-vpp-layers", "[22]") == 0
    assert names(tmp_path / "again" / "release") == ["mp_rank_00"]


@pytest.mark.parametrize(
    "text", ["7", "[]", "[[]]", "[7,0]", "[7,-1]", "[7.0,8]", "[true]", "[[7],[8]]", "[[7,8],[9]]", "[7,[8]]", "{"]
)
def test_what_is_no_split_is_refused(tmp_path, capsys, text):
    words = ("--source_path", tmp_path, "--target_path", tmp_path / "out", "--mode", "convert_to_mm")
    assert flags(*words, "--pp_vpp_layers", text) == 64
    assert "CFG-108" in capsys.readouterr().err


def test_an_empty_split_is_no_value(tmp_path, capsys):
    words = ("--source_path", tmp_path, "--target_path", tmp_path / "out", "--mode", "convert_to_mm")
    assert flags(*words, "--pp_vpp_layers", "") == 64
    assert "CFG-005: --pp-vpp-layers is empty" in capsys.readouterr().err


def test_the_flag_where_it_is_needed_or_has_no_effect(tmp_path, capsys):
    words = ("--source_path", tmp_path, "--target_path", tmp_path / "out", "--mode")
    assert flags(*words, "convert_to_hf", "--pp_vpp_layers", "[2]") == 64
    assert "CFG-073" in capsys.readouterr().err
    assert flags(*words, "resplit") == 64
    assert "CFG-107" in capsys.readouterr().err
