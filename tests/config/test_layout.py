"""The degrees of a run, the blocks of its stages, and the file of layer-zero."""

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from translated import translated

from mm.config.base import parse
from mm.config.flags import parse_flags
from mm.config.layerzero import ZeroConfig
from mm.config.layout import Layout, balanced_stages, even_stages, layout_of
from mm.dialects.mindspeed.pretrain_json import PretrainModel
from mm.dialects.mindspeed.retired_flags import RETIRED_TRAIN_FLAGS
from mm.dialects.mindspeed.train_flags import TrainFlags
from mm.dialects.mindspeed.zero_file import load_zero
from mm.errors import ConfigError

REQUIRED = "--mm-data d.json --mm-model m.json --train-iters 10 --lr 1e-4 --load weights"

# The keys that MindSpeed-MM's own zero_config.yaml has, with its values.
GUIDE_YAML = """
zero3_size: 8
transformer_layers:
  - mindspeed_mm.models.predictor.dits.wan_dit.WanDiTBlock
backward_prefetch: 'BACKWARD_PRE'
param_dtype: "bf16"
reduce_dtype: "fp32"
forward_prefetch: True
limit_all_gathers: True
ignored_modules:
  - ae
  - text_encoder
"""


def flags(words: str) -> TrainFlags:
    return parse_flags(TrainFlags, f"{REQUIRED} {words}".split(), program="mm train", retired=RETIRED_TRAIN_FLAGS)


def model(**predictor: Any) -> PretrainModel:
    shape = {"hidden_size": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30, **predictor}
    return parse(PretrainModel, {"predictor": shape, "diffusion": {}}, "m.json")


def layout(words: str, world_size: int, zero: ZeroConfig | None = None, **predictor: Any) -> Layout:
    return layout_of(translated(flags(words), model(**predictor), zero, world_size))


TP, PP, CP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size"
VP, ALGO, DEGREE = "--virtual-pipeline-model-parallel-size", "--context-parallel-algo", "--ulysses-degree-in-cp"


@pytest.mark.parametrize(
    ("words", "world_size", "predictor", "name"),
    [
        ("", 1, {}, "single"),
        (f"{VP} 1", 1, {"pipeline_num_layers": [7, 8, 8, 7]}, "single"),
        ("", 8, {}, "dp8"),
        (f"{TP} 4", 4, {}, "tp4"),
        (f"{TP} 2 --sequence-parallel", 4, {}, "dp2-tp2sp"),
        (f"{CP} 4", 4, {}, "cp4(u4)"),
        (f"{CP} 4 {ALGO} megatron_cp_algo", 4, {}, "cp4(r4)"),
        (f"{CP} 8 {ALGO} megatron_cp_algo --cp-window-size 2", 8, {}, "cp8(r8w2)"),
        (f"{CP} 4 {ALGO} megatron_cp_algo --cp-window-size 4", 4, {}, "cp4(r4)"),
        (f"{CP} 8 {ALGO} hybrid_cp_algo {DEGREE} 4 --use-cp-send-recv-overlap", 8, {}, "cp8(u4xr2,overlap)"),
        (f"{CP} 4 {ALGO} hybrid_cp_algo {DEGREE} 4", 4, {}, "cp4(u4)"),
        (f"{CP} 4 {ALGO} hybrid_cp_algo {DEGREE} 1", 4, {}, "cp4(r4)"),
        (f"{PP} 2", 4, {}, "dp2-pp2"),
        (f"{PP} 4", 4, {"pipeline_num_layers": [7, 8, 8, 7]}, "pp4(7+8+8+7)"),
        (f"{PP} 4", 4, {"pipeline_num_layers": [[7, 8, 8, 7]]}, "pp4(7+8+8+7)"),
        (
            f"{PP} 4 {VP} 2", 4, {"pipeline_num_layers": [[3, 4, 4, 4], [3, 4, 4, 4]]},
            "pp4vp2(3+4+4+4,3+4+4+4)",
        ),
    ],
)  # fmt: skip
def test_names_tell_layouts_apart(words: str, world_size: int, predictor: dict[str, Any], name: str) -> None:
    assert layout(words, world_size, **predictor).name() == name


def test_a_layout_of_everything() -> None:
    words = f"{TP} 2 --sequence-parallel {CP} 4 {ALGO} hybrid_cp_algo {DEGREE} 2 {PP} 2 {VP} 3 --layerzero"
    got = layout(words, 64, ZeroConfig(zero3_size=8))
    assert got == Layout(
        world_size=64, tp_size=2, sequence_parallel=True, cp_size=4, ulysses_size=2, window_size=2,
        pp_size=2, vp_size=3, stages=((5, 5), (5, 5), (5, 5)), zero3_size=8,
    )  # fmt: skip
    assert (got.ring_size, got.dp_size, got.dp_cp_size, got.token_parts) == (2, 4, 16, 8)
    assert got.name() == "dp4-tp2sp-cp4(u2xr2)-pp2vp3-zero8"


def test_tokens_are_cut_over_tensor_ranks_only_by_sequence_parallelism() -> None:
    assert Layout(world_size=8, tp_size=2, cp_size=4).token_parts == 4
    assert Layout(world_size=8, tp_size=2, cp_size=4, sequence_parallel=True).token_parts == 8


def test_a_sample_passes_chunk_0_of_every_rank_before_chunk_1() -> None:
    got = Layout(world_size=2, pp_size=2, vp_size=2, stages=((1, 2), (3, 4)))
    assert [list(got.blocks(0, 0)), list(got.blocks(1, 0)), list(got.blocks(0, 1)), list(got.blocks(1, 1))] == [
        [0],
        [1, 2],
        [3, 4, 5],
        [6, 7, 8, 9],
    ]


def test_a_list_of_stages_is_unused_without_a_pipeline() -> None:
    got = layout("", 1, pipeline_num_layers=[7, 8, 8, 7])
    assert got.stages == ((30,),)
    assert got.blocks(0, 0) == range(30)


@pytest.mark.parametrize(
    "wrong",
    [
        {"world_size": 6, "tp_size": 4},
        {"world_size": 4, "cp_size": 4, "ulysses_size": 3},
        {"world_size": 4, "cp_size": 4, "window_size": 3},
        {"world_size": 4, "zero3_size": 3},
        {"world_size": 2, "pp_size": 2, "stages": ((1, 1), (1, 1))},
        {"world_size": 2, "pp_size": 2, "stages": ((1,),)},
    ],
)
def test_a_layout_cannot_contradict_itself(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"divide|rows"):
        Layout(**wrong)


def test_even_stages() -> None:
    assert even_stages(12, 2, 3) == ((2, 2), (2, 2), (2, 2))
    with pytest.raises(ValueError, match="do not divide"):
        even_stages(30, 4)


def test_balanced_stages_are_the_guides_and_never_differ_by_more_than_one() -> None:
    assert balanced_stages(30, 4) == ((7, 8, 8, 7),)
    for num_layers in range(1, 41):
        for pp_size in range(1, 9):
            for vp_size in range(1, 4):
                stages = balanced_stages(num_layers, pp_size, vp_size)
                sizes = list(chain(*stages))
                assert [len(row) for row in stages] == [pp_size] * vp_size
                assert sum(sizes) == num_layers and max(sizes) - min(sizes) <= 1


def zero(tmp_path: Path, text: str) -> ZeroConfig:
    path = tmp_path / "zero_config.yaml"
    path.write_text(text, encoding="utf-8")
    loaded = load_zero(flags(f"--layerzero --layerzero-config {path}"))
    assert loaded is not None
    return loaded


def test_mindspeeds_own_file_is_read(tmp_path: Path) -> None:
    got = zero(tmp_path, GUIDE_YAML)
    assert (got.zero3_size, got.param_dtype, got.reduce_dtype, got.backward_prefetch) == (
        8,
        "bf16",
        "fp32",
        "BACKWARD_PRE",
    )
    assert got.ignored_modules == ["ae", "text_encoder"]


def test_keys_that_are_left_out_have_mindspeeds_defaults_or_the_runs_precision(tmp_path: Path) -> None:
    for text in ("", "# nothing\n", "zero3_size: 8\n"):
        got = zero(tmp_path, text)
        assert (got.zero3_size, got.param_dtype, got.reduce_dtype) == (8, None, "fp32")
        assert got.forward_prefetch and got.backward_prefetch == got.backward_reduce_scatter == "BACKWARD_PRE"


def test_modules_of_the_model_and_its_own_block_can_be_named(tmp_path: Path) -> None:
    got = zero(tmp_path, "ignored_modules: [head, ae, patch_embedding]\ntransformer_layers: [mm.wan.block.WanBlock]\n")
    assert (got.ignored_modules, got.transformer_layers) == (
        ["head", "ae", "patch_embedding"],
        ["mm.wan.block.WanBlock"],
    )


def test_without_both_flags_no_file_is_read() -> None:
    assert load_zero(flags("")) is None
    assert load_zero(flags("--layerzero")) is None
    assert load_zero(flags("--layerzero-config none.yaml")) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("zero3_size: [", ["CFG-002"]),
        ("zero3_size: 2\nzero3_size: 4\n", ["CFG-002"]),
        ("zero3_size: !!python/object/apply:os.getcwd []\n", ["CFG-002"]),
        ("zero3_size: 2026-01-01\n", ["CFG-002"]),
        ("zero3_size: .nan\n", ["CFG-002"]),
        ("zero3_size: &a [*a]\n", ["CFG-002"]),
        ("zero3_size: \0", ["CFG-002"]),
        ("[" * 20_000, ["CFG-002"]),
        ("? [1, 2]\n: 3\n", ["CFG-002"]),
        ("- zero3_size\n", ["CFG-005"]),
        ("8\n", ["CFG-005"]),
        ("zero_size: 8\n", ["CFG-003"]),
        ("zero3_size: 0\n", ["CFG-005"]),
        ("zero3_size: '8'\n", ["CFG-005"]),
        ("zero3_size: 8.5\n", ["CFG-005"]),
        ("zero3_size:\n", ["CFG-005"]),
        ("param_dtype: fp16\n", ["CFG-005"]),
        ("reduce_dtype: fp64\n", ["CFG-005"]),
        ("backward_prefetch: BACKWARD_POST\n", ["CFG-008"]),
        ("backward_reduce_scatter: BACKWARD_POST\n", ["CFG-008"]),
        ("forward_prefetch: 1\n", ["CFG-005"]),
        ("transformer_layers: []\n", ["CFG-005"]),
        ("transformer_layers: [a.OtherBlock]\n", ["CFG-005"]),
        ("ignored_modules: [blocks]\n", ["CFG-005"]),
        ("buffer_dtype: bf16\n", ["CFG-008"]),
        ("limit_all_gathers: false\n", ["CFG-008"]),
        ("offload_grads: true\n", ["CFG-008"]),
        ("ckpt_load_path: /ckpt\n", ["CFG-008"]),
        ("autocast_input: false\nautocast_output: false\n", ["CFG-008", "CFG-008"]),
        (
            "zero3size: 2\noffload_grads: 1\nparam_dtype: half\nignored_modules: blocks\n",
            ["CFG-003", "CFG-005", "CFG-005", "CFG-008"],
        ),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        zero(tmp_path, text)
    assert sorted(problem.id for problem in caught.value.problems) == expected
    assert all("zero_config.yaml" in problem.message for problem in caught.value.problems)


def test_values_without_a_choice_may_be_spelled_out(tmp_path: Path) -> None:
    text = (
        "limit_all_gathers: true\noffload_grads: false\nckpt_load_path: null\nbuffer_dtype: null\n"
        "autocast_input: true\nautocast_output: true\n"
        "backward_prefetch: BACKWARD_PRE\nbackward_reduce_scatter: BACKWARD_PRE\n"
    )
    assert zero(tmp_path, text) == ZeroConfig()


def test_a_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    for name in ("none.yaml", "binary.yaml"):
        with pytest.raises(ConfigError, match=f"CFG-001.*{name}"):
            load_zero(flags(f"--layerzero --layerzero-config {tmp_path / name}"))


def test_an_unknown_key_hints_at_the_known_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='Did you mean "zero3_size"'):
        zero(tmp_path, "zero3size: 2\n")
