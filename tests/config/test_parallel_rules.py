"""The rules of the parallel axes: what is refused, under which id, and that what a remedy names is accepted."""

import json
import random
import re
from itertools import chain
from typing import Any

import pytest
from translated import translated

from mm.config.base import parse
from mm.config.flags import parse_flags
from mm.config.layerzero import ZeroConfig
from mm.config.layout import layout_of
from mm.config.rules.training import check_training
from mm.dialects.mindspeed.pretrain_json import PretrainModel
from mm.dialects.mindspeed.retired_flags import RETIRED_TRAIN_FLAGS
from mm.dialects.mindspeed.train_flags import TrainFlags
from mm.errors import ConfigError, Problem

REQUIRED = "--mm-data d.json --mm-model m.json --train-iters 10 --lr 1e-4 --load weights"
TP, PP, CP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size"
VP, GBS, MBS = "--virtual-pipeline-model-parallel-size", "--global-batch-size", "--micro-batch-size"
ULYSSES, RING, HYBRID = (f"--context-parallel-algo {name}_cp_algo" for name in ("ulysses", "megatron", "hybrid"))
DEGREE, WINDOW, OVERLAP = "--ulysses-degree-in-cp", "--cp-window-size", "--use-cp-send-recv-overlap"
ZERO = "--layerzero --layerzero-config z.yaml"


def flags(words: str) -> TrainFlags:
    return parse_flags(TrainFlags, f"{REQUIRED} {words}".split(), program="mm train", retired=RETIRED_TRAIN_FLAGS)


def model(predictor: dict[str, Any]) -> PretrainModel:
    """Wan2.1 T2V 1.3B: 12 heads, 30 blocks."""
    shape = {"hidden_size": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30, **predictor}
    return parse(PretrainModel, {"predictor": shape, "diffusion": {}}, "m.json")


def problems(words: str, world_size: int, predictor: dict[str, Any], zero: ZeroConfig | None) -> list[Problem]:
    try:
        check_training(translated(flags(words), model(predictor), zero, world_size))
    except ConfigError as error:
        return list(error.problems)
    return []


GOOD: list[tuple[str, int, dict[str, Any]]] = [
    ("", 1, {}),
    ("", 3, {}),
    (f"{TP} 1 {PP} 1 {VP} 1 {CP} 1 {ULYSSES} --optimization-level 2", 8, {}),
    (f"{TP} 4 --sequence-parallel", 8, {}),
    (f"{TP} 8", 8, {"hidden_size": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}),
    *[(f"{CP} {size}", size, {}) for size in (2, 3, 4, 6, 12)],
    *[(f"{CP} {size} {RING}", size, {}) for size in (2, 5, 7, 8)],
    (f"{CP} 8 {HYBRID} {DEGREE} 4", 8, {}),
    (f"{CP} 8 {HYBRID} {DEGREE} 1", 8, {}),
    (f"{CP} 4 {HYBRID} {DEGREE} 4", 4, {}),
    (f"{TP} 2 {CP} 6", 12, {}),
    (f"{CP} 8 {RING} {WINDOW} 2 {OVERLAP}", 8, {}),
    (f"{CP} 8 {RING} {WINDOW} 8", 8, {}),
    (f"{CP} 8 {HYBRID} {DEGREE} 2 {WINDOW} 2 {OVERLAP}", 8, {}),
    (f"{CP} 2 {WINDOW} 1", 2, {}),
    (
        f"{PP} 4 --optimization-level 2 --use-multiparameter-pipeline-model-parallel --variable-seq-lengths",
        4,
        {"pipeline_num_layers": [7, 8, 8, 7]},
    ),
    (f"{PP} 4 {VP} 2 {GBS} 8", 4, {"pipeline_num_layers": [[3, 4, 4, 4], [3, 4, 4, 4]]}),
    (f"{PP} 4 {VP} 2 {GBS} 16", 8, {"pipeline_num_layers": [[3, 4, 4, 4], [3, 4, 4, 4]]}),
    (f"{PP} 4 {VP} 1", 4, {"pipeline_num_layers": [[7, 8, 8, 7]]}),
    (f"{PP} 2 {VP} 3 {GBS} 2", 2, {}),
    (f"{PP} 5 {GBS} 1", 5, {}),
    ("", 1, {"pipeline_num_layers": [7, 8, 8, 7]}),
    (f"{TP} 2 --sequence-parallel {CP} 2 {PP} 2 {VP} 3 {GBS} 4", 16, {}),
]


@pytest.mark.parametrize(("words", "world_size", "predictor"), GOOD)
def test_accepted(words: str, world_size: int, predictor: dict[str, Any]) -> None:
    assert problems(words, world_size, predictor, None) == []


@pytest.mark.parametrize(
    ("words", "world_size", "zero"),
    [
        (ZERO, 8, ZeroConfig()),
        (f"{ZERO} --bf16", 8, ZeroConfig(param_dtype="bf16", zero3_size=2)),
        (f"{ZERO} {CP} 4", 8, ZeroConfig(param_dtype="fp32")),
        (f"{ZERO} {CP} 3", 3, ZeroConfig(zero3_size=3)),
        (f"{ZERO} --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather", 8, ZeroConfig()),
        (f"{ZERO} --overlap-param-gather", 8, ZeroConfig()),
        (f"{ZERO} {TP} 2 {PP} 2 {VP} 3 {GBS} 4", 8, ZeroConfig(zero3_size=2)),
    ],
)
def test_layerzero_is_accepted(words: str, world_size: int, zero: ZeroConfig) -> None:
    assert problems(words, world_size, {}, zero) == []


# (flags, processes, predictor, zero_config.yaml, id, a part of the message, a part of the remedy)
BAD: list[tuple[str, int, dict[str, Any], ZeroConfig | None, str, str, str]] = [
    (f"{TP} 4", 6, {}, None, "CFG-032", "6 processes do not divide by TP 4 x PP 1 x CP 1", "multiple of 4"),
    (f"{TP} 2 {CP} 2", 2, {}, None, "CFG-032", "TP 2 x PP 1 x CP 2", "product is 1 or 2."),
    (f"{TP} 3", 3, {}, None, "CFG-033", "ffn_dim 8960 in m.json does not", f"{TP} 1."),
    (f"{TP} 8", 8, {}, None, "CFG-033", "num_heads 12 in m.json does not", f"{TP} 1, 2 or 4."),
    (f"{TP} 9", 36, {}, None, "CFG-033", "num_heads 12 and ffn_dim 8960", f"{TP} 1, 2 or 4."),
    (f"{TP} 5 {CP} 6", 60, {}, None, "CFG-033", "num_heads 12", f"{TP} 1 or 2."),
    (f"{CP} 8", 8, {}, None, "CFG-034", "1, 2, 3, 4, 6 or 12, not 8", f"{CP} 1, 2 or 4, or add {HYBRID} {DEGREE} 4."),
    (f"{CP} 5", 5, {}, None, "CFG-034", "not 5", f"{CP} 1, or add {RING}."),
    (f"{TP} 2 {CP} 4", 8, {}, None, "CFG-034", "leaves 6 heads", f"{CP} 1 or 2, or add {HYBRID} {DEGREE} 2."),
    (f"{CP} 8 {HYBRID} {DEGREE} 8", 8, {}, None, "CFG-034", "not 8", f"{DEGREE} 1, 2 or 4."),
    (f"{CP} 4 {DEGREE} 2", 4, {}, None, "CFG-035", "ulysses_cp_algo", "hybrid_cp_algo"),
    (f"{CP} 4 {RING} {DEGREE} 1", 4, {}, None, "CFG-035", "megatron_cp_algo", "hybrid_cp_algo"),
    (f"{CP} 4 {HYBRID}", 4, {}, None, "CFG-035", f"needs {DEGREE}", f"{DEGREE} 1, 2 or 4."),
    (f"{CP} 4 {HYBRID} {DEGREE} 3", 4, {}, None, "CFG-035", "3 does not divide", f"{DEGREE} 1, 2 or 4."),
    (f"{RING}", 2, {}, None, "CFG-036", f"no effect with {CP} 1", CP),
    (f"{HYBRID} {DEGREE} 1", 2, {}, None, "CFG-036", "hybrid_cp_algo has no effect", CP),
    (f"{CP} 4 {OVERLAP}", 4, {}, None, "CFG-036", "a ring of 1", "megatron_cp_algo"),
    (f"{CP} 4 {HYBRID} {DEGREE} 4 {OVERLAP}", 4, {}, None, "CFG-036", "a ring of 1", "below CP"),
    (f"{CP} 4 {WINDOW} 2", 4, {}, None, "CFG-036", f"{WINDOW} 2", f"{WINDOW} 1."),
    (f"{CP} 8 {RING} {WINDOW} 3", 8, {}, None, "CFG-036", "a ring of 8", f"{WINDOW} 1, 2, 4 or 8."),
    (f"{CP} 8 {HYBRID} {DEGREE} 2 {WINDOW} 8", 8, {}, None, "CFG-036", "a ring of 4", f"{WINDOW} 1, 2 or 4."),
    (f"{WINDOW} 2", 1, {}, None, "CFG-036", "a ring of 1", f"{WINDOW} 1."),
    ("--sequence-parallel", 2, {}, None, "CFG-037", "--sequence-parallel", TP),
    (f"{PP} 4", 4, {}, None, "CFG-038", "30 in m.json does not divide by PP 4", "[7, 8, 8, 7]"),
    (f"{PP} 4 {VP} 2 {GBS} 4", 4, {}, None, "CFG-038", "PP 4 x VP 2", "[[3, 4, 4, 4], [4, 4, 4, 3]]"),
    (f"{PP} 4", 4, {"pipeline_num_layers": [15, 15]}, None, "CFG-038", "needs 4 numbers", "[7, 8, 8, 7]"),
    (f"{PP} 2", 2, {"pipeline_num_layers": [[8, 7], [8, 7]]}, None, "CFG-038", "needs 2 numbers", "[15, 15]"),
    (f"{PP} 2 {VP} 2 {GBS} 2", 2, {"pipeline_num_layers": [8, 7, 8, 7]}, None, "CFG-038", "2 lists of 2", "[[7, 8]"),
    (f"{PP} 2 {VP} 2 {GBS} 2", 2, {"pipeline_num_layers": [[8, 7], [15]]}, None, "CFG-038", "2 lists of 2", "[[7, 8]"),
    (f"{PP} 2", 2, {"pipeline_num_layers": [30, 0]}, None, "CFG-038", "a stage without a block", "[15, 15]"),
    (f"{PP} 2", 2, {"pipeline_num_layers": [31, -1]}, None, "CFG-038", "a stage without a block", "[15, 15]"),
    (f"{PP} 4", 4, {"num_layers": 3}, None, "CFG-038", "makes 4 stages", "PP to at most 3"),
    (f"{PP} 4", 4, {"pipeline_num_layers": [8, 8, 8, 8]}, None, "CFG-027", "adds up to 32", "[7, 8, 8, 7]"),
    ("", 1, {"pipeline_num_layers": [8, 8, 8, 8]}, None, "CFG-027", "adds up to 32", "agree"),
    (f"{VP} 2", 2, {}, None, "CFG-039", "no effect", PP),
    (f"{PP} 2 {VP} 3", 2, {}, None, "CFG-039", "makes 1 micro-batches", f"{GBS} 2."),
    (f"{PP} 2 {VP} 3 {MBS} 2 {GBS} 20", 4, {}, None, "CFG-039", "makes 5 micro-batches", f"{GBS} 16 or 24."),
    (f"{PP} 2 {VP} 3 --pack 99999 {GBS} 10", 4, {}, None, "CFG-039", "makes 5 samples on each", f"{GBS} 8 or 12."),
    (f"{PP} 2 {VP} 3 {MBS} 2 {GBS} 18", 4, {}, None, "CFG-021", "2 x 2 replicas", f"{GBS} 16 or 24."),
    (f"{CP} 2 {GBS} 3", 4, {}, None, "CFG-021", "1 x 2 replicas", f"{GBS} 2 or 4."),
    (f"{TP} 2 {MBS} 4 {GBS} 3", 2, {}, None, "CFG-021", "4 x 1 replicas", f"{GBS} 4."),
    ("--variable-seq-lengths", 1, {}, None, "CFG-044", "--variable-seq-lengths has no effect", PP),
    ("--use-multiparameter-pipeline-model-parallel", 1, {}, None, "CFG-044", "--use-multiparameter", PP),
    ("--layerzero", 8, {}, None, "CFG-045", "--layerzero needs --layerzero-config", "zero_config.yaml"),
    ("--layerzero-config z.yaml", 8, {}, None, "CFG-045", "without --layerzero", "Add it"),
    (ZERO, 4, {}, ZeroConfig(), "CFG-045", "zero3_size 8 in z.yaml does not divide the 4 ranks", "1, 2 or 4."),
    (f"{ZERO} {TP} 2 {CP} 2", 12, {}, ZeroConfig(zero3_size=4), "CFG-045", "DP 3 x CP 2", "1, 2, 3 or 6."),
    (ZERO, 8, {}, ZeroConfig(param_dtype="bf16"), "CFG-045", "--bf16 is absent", "param_dtype"),
    (f"{ZERO} --bf16", 8, {}, ZeroConfig(param_dtype="fp32"), "CFG-045", "--bf16 is given", "param_dtype"),
]


@pytest.mark.parametrize(("words", "world_size", "predictor", "zero", "id", "message", "remedy"), BAD)
def test_refused(
    words: str, world_size: int, predictor: dict[str, Any], zero: ZeroConfig | None, id: str, message: str, remedy: str
) -> None:
    found = problems(words, world_size, predictor, zero)
    assert [problem.id for problem in found] == [id]
    assert message in found[0].message
    assert remedy in found[0].remedy


def numbers(text: str) -> list[str]:
    return re.findall(r"\d+", text)


def repaired(remedy: str) -> list[dict[str, Any]]:
    """Every repair that a remedy names: more flags (the last one counts), processes, stages or sharding groups."""
    repairs: list[dict[str, Any]] = []
    for flag, values in re.findall(r"(?:Use|Give) (--[\w-]+) (\d[\d, or]*)", remedy):
        repairs += [{"words": f"{flag} {value}"} for value in numbers(values)]
    for added in re.findall(r"or add (--context-parallel-algo [^.]*)", remedy):
        repairs.append({"words": added})
    for stages in re.findall(r'"pipeline_num_layers": (\[.*\])', remedy):
        repairs.append({"predictor": {"pipeline_num_layers": json.loads(stages)}})
    for values in re.findall(r"zero3_size (\d[\d, or]*)", remedy):
        repairs += [{"zero": ZeroConfig(zero3_size=int(value))} for value in numbers(values)]
    for size in re.findall(r"multiple of (\d+) processes", remedy):
        repairs += [{"world_size": int(size)}, {"world_size": 3 * int(size)}]
    for product in re.findall(r"product is (.*)\.", remedy):
        repairs += [{"words": f"{TP} 1 {PP} 1 {CP} {value} {RING}"} for value in numbers(product) if value != "1"]
    for size in re.findall(r"PP to at most (\d+)", remedy):
        repairs.append({"words": f"{PP} {size}", "world_size": int(size)})
    return repairs


def test_what_a_remedy_names_is_accepted() -> None:
    tried: dict[str, int] = {}
    for words, world_size, predictor, zero, id, _, _ in BAD:
        for repair in repaired(problems(words, world_size, predictor, zero)[0].remedy):
            after = problems(
                f"{words} {repair.get('words', '')}",
                repair.get("world_size", world_size),
                {**predictor, **repair.get("predictor", {})},
                repair.get("zero", zero),
            )
            assert after == [], (words, repair)
            tried[id] = tried.get(id, 0) + 1
    assert set(tried) == {
        "CFG-021", "CFG-027", "CFG-032", "CFG-033", "CFG-034", "CFG-035", "CFG-036", "CFG-038", "CFG-039", "CFG-045",
    }  # fmt: skip
    assert sum(tried.values()) > 60


def test_every_mistake_is_told_at_once() -> None:
    words = f"{TP} 1 --sequence-parallel {CP} 8 {DEGREE} 2 {WINDOW} 2 {PP} 2 {VP} 2 {GBS} 3 {ZERO}"
    found = problems(words, 16, {"pipeline_num_layers": [15, 16]}, ZeroConfig(zero3_size=3, param_dtype="bf16"))
    assert [problem.id for problem in found] == [
        "CFG-034", "CFG-035", "CFG-036", "CFG-037", "CFG-045", "CFG-045", "CFG-038", "CFG-027", "CFG-039",
    ]  # fmt: skip


def test_nothing_that_depends_on_the_replicas_is_told_while_they_are_unknown() -> None:
    found = problems(f"{TP} 2 {PP} 2 {VP} 3 {GBS} 7 {ZERO}", 6, {}, ZeroConfig())
    assert [problem.id for problem in found] == ["CFG-032"]


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ("--context-parallel-kv-cache-policy half", "choice"),
        ("--use-torch-fsdp2", "--layerzero"),
        ("--fsdp2-config-path f.yaml", "--layerzero"),
        ("--num-layers-per-virtual-pipeline-stage 2", VP),
    ],
)
def test_flags_of_mindspeed_without_effect_say_what_to_do_instead(flag: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        flags(flag)
    assert [problem.id for problem in caught.value.problems] == ["CFG-008"]
    assert hint in caught.value.problems[0].remedy


@pytest.mark.parametrize(
    "words", ["--context-parallel-algo ring", "--optimization-level 1", f"{WINDOW} 0", f"{DEGREE} 0", f"{TP} 0"]
)
def test_values_out_of_range(words: str) -> None:
    with pytest.raises(ConfigError, match="CFG-005"):
        flags(words)


def random_request(draw: random.Random) -> tuple[str, int, dict[str, Any], ZeroConfig | None]:
    """Flags of which each alone is plausible; the processes are often enough a multiple of what they ask for."""
    tp, pp, cp = draw.choice([1, 1, 2, 3, 4]), draw.choice([1, 1, 2, 3, 4]), draw.choice([1, 1, 2, 3, 4, 6, 8])
    vp, num_layers = draw.choice([1, 1, 1, 2, 3]), draw.choice([4, 7, 12, 30])
    words = [f"{TP} {tp} {PP} {pp} {CP} {cp} {VP} {vp}"]
    words += [f"{MBS} {draw.choice([1, 2])}"] if draw.random() < 0.5 else []
    words += [f"{GBS} {draw.choice([4, 12, 24, 48])}"] if draw.random() < 0.7 else []
    words += ["--sequence-parallel"] if (tp > 1 and draw.random() < 0.5) or draw.random() < 0.1 else []
    if cp > 1 and draw.random() < 0.7:
        words.append(draw.choice([ULYSSES, RING, f"{HYBRID} {DEGREE} {draw.choice([1, 2, 3, 4])}"]))
        words += [f"{WINDOW} 2"] if draw.random() < 0.2 else []
        words += [OVERLAP] if draw.random() < 0.3 else []
    listed = draw.choice([None, None, [num_layers // pp] * pp, [[draw.randint(0, 4) for _ in range(pp)]] * vp])
    zero = ZeroConfig(zero3_size=draw.choice([1, 2, 4])) if draw.random() < 0.3 else None
    words += [ZERO] if zero else []
    world_size = tp * pp * cp * draw.choice([1, 2, 3, 4]) if draw.random() < 0.8 else draw.randint(1, 64)
    return " ".join(words), world_size, {"num_layers": num_layers, "pipeline_num_layers": listed}, zero


def test_random_requests_are_refused_by_an_id_or_make_a_whole_layout() -> None:
    draw = random.Random(20250)
    accepted = []
    while len(accepted) < 150:
        words, world_size, predictor, zero = random_request(draw)
        if problems(words, world_size, predictor, zero):  # anything but a ConfigError fails the test here
            continue
        got = layout_of(translated(flags(words), model(predictor), zero, world_size))
        accepted.append(got.name())
        assert got.dp_size * got.tp_size * got.pp_size * got.ulysses_size * got.ring_size == world_size
        order = [(pp_rank, vp_rank) for vp_rank in range(got.vp_size) for pp_rank in range(got.pp_size)]
        assert [*chain(*(got.blocks(*place) for place in order))] == list(range(predictor["num_layers"]))
        assert all(len(got.blocks(*place)) > 0 for place in order)
        assert 12 % (got.tp_size * got.ulysses_size) == 0 == 8960 % got.tp_size
        assert got.ring_size % got.window_size == 0 == got.dp_cp_size % (got.zero3_size or 1)
        given = flags(words)
        batch = given.global_batch_size or given.micro_batch_size * got.dp_size
        micro_batches, rest = divmod(batch, given.micro_batch_size * got.dp_size)
        assert rest == 0 and (got.vp_size == 1 or micro_batches % got.pp_size == 0)
    assert len(set(accepted)) > 60


def test_of_200_random_requests_each_refusal_names_flags_or_keys() -> None:
    draw = random.Random(7)
    refused = [found for found in (problems(*random_request(draw)) for _ in range(200)) if found]
    assert 50 < len(refused) < 180
    seen = {problem.id for found in refused for problem in found}
    assert len(seen) >= 10, sorted(seen)
    assert all(problem.message and problem.remedy for found in refused for problem in found)
