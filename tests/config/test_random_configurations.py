"""Two hundred configurations of `mm train` with several mistakes each: all are told at once, before torch is imported.

What is expected of a mistake is written beside it, and of a mixture it is the sum; nothing is taken from what the
program says. Mistakes that change what another one means are not mixed: they share a topic, of which a configuration
has one mistake at most. Where a value that rules look at cannot be read, only what cannot be read is compared.
"""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
from annotated_types import Ge, Gt, Lt

from mm.dialects.mindspeed.retired_flags import RETIRED_TRAIN_FLAGS
from mm.dialects.mindspeed.train_flags import TrainFlags

ROOT = Path(__file__).parents[2]
CONFIGURATIONS, SEED = 200, 20
GOOD = {"train-iters": "10", "lr": "1e-4", "load": "weights"}
PREDICTOR = {"hidden_size": 48, "ffn_dim": 64, "num_heads": 4, "num_layers": 4}


@dataclass(frozen=True)
class Mistake:
    """Something wrong.

    Attributes:
        ids: what must be told of it. topics: what it is about; mistakes that share one are not mixed.
        words: added to the command line. without: flags left out of it.
        model: keys of pretrain_model.json, dotted, with their values; None takes the key out.
        world_size: processes; None where any number does.
    """

    ids: tuple[str, ...]
    topics: frozenset[str]
    words: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    model: dict[str, Any] = field(default_factory=dict)
    world_size: int | None = None


def rule(ids: str, topics: str, words: str = "", world_size: int | None = None, **more: Any) -> Mistake:
    """A mistake that rules find; `ids` without their prefix."""
    told = tuple(f"CFG-{number}" for number in ids.split())
    return Mistake(told, frozenset(topics.split()), tuple(words.split()), world_size=world_size, **more)


LORA = "--lora-r 4 --lora-alpha 4 --lora-target-modules q --load-base-model base"
HYBRID = "--context-parallel-size 4 --context-parallel-algo hybrid_cp_algo"
FULL = "--recompute-granularity full"
RULES = [
    rule("070", "task", model={"task": "i2v"}),
    rule("022", "precision", model={"predictor.dtype": "bf16"}),
    rule("022", "precision", "--bf16", model={"predictor.dtype": "fp32"}),
    rule("023", "weights lora", without=("load",)),
    rule("023", "weights lora", "--init-from-scratch"),
    rule("023", "weights lora", "--init-from-scratch --finetune", without=("load",)),
    rule("023 023", "weights lora", "--finetune", without=("load",)),
    rule("104", "lora", "--lora-r 4"),
    rule("104", "lora", "--lora-target-modules q k --lora-alpha 2"),
    rule("105", "lora", "--load-base-model base"),
    rule("102", "lora", LORA + " --lora-r 0"),
    rule("102", "lora", LORA + " --lora-alpha=-1"),
    rule("103", "lora", LORA + " --lora-dropout 0.1"),
    rule("102 102 103", "lora", LORA + " --lora-r 0 --lora-alpha 0 --lora-dropout 0.5"),
    rule("110", "samples", "--on-bad-sample skip"),
    rule("110", "samples", "--on-bad-sample skip:max=100%"),
    rule("024", "save interval", "--save-interval 5"),
    rule("024", "save background", "--async-save"),
    rule("024", "save signal", "--save-on-signal"),
    rule("024", "save count", "--keep-latest 2"),
    rule("024", "save optimizer", "--no-save-optim"),
    rule("124", "evaluation", "--eval-interval 5"),
    rule("124", "evaluation", "--eval-data held_out.json"),
    rule("124", "validation", "--validation-images images.txt"),
    rule("124 124", "validation", "--validation-interval 5"),
    rule("124", "validation", "--validation-prompts prompts.txt"),
    rule("025", "warmup", "--lr-warmup-iters 10"),
    rule("025", "warmup", "--lr-decay-iters 4 --lr-warmup-iters 7"),
    rule("025", "least", "--min-lr 1"),
    rule("025", "first", "--lr-warmup-init 1"),
    rule("026", "overlap", "--overlap-param-gather"),
    rule("026", "overlap", "--overlap-param-gather --use-distributed-optimizer"),
    rule("069", "overlap", "--overlap-param-gather --use-distributed-optimizer --overlap-grad-reduce --compile-blocks"),
    rule("026 069", "overlap", "--overlap-param-gather --compile-blocks"),
    rule("126", "ranks", "--check-replica-hash-interval 1", 1),
    rule("128", "ranks", "--straggler-interval 1", 1),
    rule("126", "ranks", "--check-replica-hash-interval 1 --tensor-model-parallel-size 2", 2),
    rule("032", "ranks batch", "--tensor-model-parallel-size 2", 3),
    rule("032", "ranks batch", "--context-parallel-size 4", 2),
    rule("033", "ranks", "--tensor-model-parallel-size 3", 3),
    rule("034", "ranks", "--context-parallel-size 3", 3),
    rule("035", "ranks", "--context-parallel-size 2 --context-parallel-algo hybrid_cp_algo", 2),
    rule("035", "ranks", "--context-parallel-size 2 --ulysses-degree-in-cp 2", 2),
    rule("035", "ranks", f"{HYBRID} --ulysses-degree-in-cp 3", 4),
    rule("036", "ranks", "--context-parallel-algo megatron_cp_algo", 1),
    rule("036", "ranks", "--context-parallel-size 4 --context-parallel-algo megatron_cp_algo --cp-window-size 3", 4),
    rule("036", "ranks", "--context-parallel-size 2 --use-cp-send-recv-overlap", 2),
    rule("045", "ranks overlap", "--layerzero-config zero.yaml", 1),
    rule("045", "ranks overlap", "--layerzero", 1),
    rule("021", "batch", "--global-batch-size 3 --micro-batch-size 2"),
    rule("044", "pipeline sizes", "--variable-seq-lengths"),
    rule("044", "pipeline tensors", "--use-multiparameter-pipeline-model-parallel"),
    rule("039", "pipeline chunks", "--virtual-pipeline-model-parallel-size 2"),
    rule("027", "pipeline stages", model={"predictor.pipeline_num_layers": [1, 2]}),
    rule("038", "ranks pipeline recompute", "--pipeline-model-parallel-size 8", 8),
    rule("038", "ranks pipeline recompute", "--pipeline-model-parallel-size 3", 3),
    rule("027", "ranks pipeline recompute", "--pipeline-model-parallel-size 2", 2,
         model={"predictor.pipeline_num_layers": [1, 2]}),
    rule("048", "recompute", FULL),
    rule("048", "recompute", FULL + " --recompute-method uniform --recompute-num-layers 0"),
    rule("048", "recompute", FULL + " --recompute-method block --recompute-num-layers 9"),
    rule("048", "recompute", FULL + " --recompute-method block --recompute-skip-core-attention"),
    rule("048", "recompute", "--recompute-method uniform"),
    rule("048 048", "recompute", "--recompute-granularity selective --recompute-method block --recompute-num-layers 1"),
    rule("048", "recompute", "--recompute-keep O"),
    rule("048 048", "recompute", "--recompute-keep O", model={"predictor.attention_async_offload": True}),
]  # fmt: skip
LESS_SPECIAL = {"save", "pipeline"}
"""Topics of several flags that are told one by one; the second word says which."""


def exclusive(mistake: Mistake) -> frozenset[str]:
    """The topics that no other mistake of the configuration may have."""
    alone = mistake.topics if "ranks" in mistake.topics else mistake.topics - LESS_SPECIAL
    return alone | ({"sizes", "tensors", "chunks", "stages"} if {"ranks", "pipeline"} <= mistake.topics else set())


def types() -> Iterator[Mistake]:
    """Values that a flag's own type refuses, for every flag that takes one word; and words that are no flag."""
    for name, info in TrainFlags.model_fields.items():
        for text in refused(info.annotation, info.metadata):
            flag = name.replace("_", "-")
            yield Mistake(("CFG-005",), frozenset({name}), (f"--{flag}={text}",))
        if info.is_required():
            yield Mistake(("CFG-004",), frozenset({name}), without=(name.replace("_", "-"),))
    for flag in RETIRED_TRAIN_FLAGS:
        yield Mistake(("CFG-008",), frozenset({flag}), (flag,))
    for flag in ("--micro-batch-sise", "--learning-rate", "--savee"):
        yield Mistake(("CFG-007",), frozenset({flag}), (f"{flag}=3",))


def refused(annotation: Any, metadata: list[Any]) -> list[str]:
    """Texts that are no value of a type with these bounds."""
    for limit in metadata:
        if isinstance(limit, Ge):
            return [*refused(annotation, []), str(limit.ge - 1)]
        if isinstance(limit, Gt):
            return [*refused(annotation, []), str(limit.gt), "nan"]
        if isinstance(limit, Lt):
            return [*refused(annotation, []), str(limit.lt)]
    options = get_args(annotation) if type(None) in get_args(annotation) else (annotation,)
    if any(get_origin(option) is Literal for option in options):
        return ["none-of-these"]
    if get_origin(annotation) is Annotated:
        return refused(*get_args(annotation)[:1], [])
    return ["several", "1.5"] if int in options else ["fast", "inf"] if float in options else []


def keys() -> Iterator[Mistake]:
    """Keys and values of pretrain_model.json."""
    wrong: dict[str, list[tuple[str, Any]]] = {
        "CFG-003": [("extra", 1), ("predictor.num_layer", 3), ("diffusion.shifft", 3.0)],
        "CFG-004": [(f"predictor.{name}", None) for name in PREDICTOR],
        "CFG-005": [
            ("task", "t2i"), ("load_video_features", False), ("predictor.model_id", "dit"), ("predictor.dtype", "fp8"),
            ("predictor.num_layers", 0), ("predictor.num_heads", "4"), ("predictor.hidden_size", 1.5),
            ("predictor.text_len", True), ("predictor.eps", 0), ("predictor.qk_norm", False),
            ("diffusion.shift", -1.0), ("diffusion.loss_weighting", "all"), ("diffusion.sigma_min", 1.0),
        ],
    }  # fmt: skip
    for told, pairs in wrong.items():
        for key, value in pairs:
            yield Mistake((told,), frozenset({key}), model={key: value})


def elsewhere() -> list[Mistake]:
    """Words that cannot be read and that no rule looks at."""
    flags = {"log_interval", "seed", "num_workers", "read_timeout", "weight_decay", "hang_timeout", "clip_grad"}
    return [mistake for mistake in types() if mistake.topics & flags or "CFG-008" in mistake.ids]


@dataclass(frozen=True)
class Configuration:
    """Words, pretrain_model.json, processes, and the ids that must be told."""

    words: list[str]
    model: dict[str, Any]
    world_size: int
    expected: list[str]


def mixture(draw: random.Random, mistakes: list[Mistake], files: Path) -> Configuration:
    """One to six mistakes that may be mixed."""
    chosen: list[Mistake] = []
    taken: set[str] = set()
    for mistake in draw.sample(mistakes, draw.randint(1, 12)):
        if len(chosen) < 6 and not exclusive(mistake) & taken:
            chosen.append(mistake)
            taken |= exclusive(mistake)
    left_out = {name for mistake in chosen for name in mistake.without}
    good = {**GOOD, "mm-data": str(files / "data.json"), "mm-model": "MODEL"}
    words = [word for name, value in good.items() if name not in left_out for word in (f"--{name}", value)]
    model: dict[str, Any] = {"predictor": dict(PREDICTOR), "diffusion": {}}
    for mistake in chosen:
        words += mistake.words
        for dotted, value in mistake.model.items():
            *parents, key = dotted.split(".")
            place = model
            for parent in parents:
                place = place[parent]
            place[key] = value
            if value is None:
                del place[key]
    world_size = next((m.world_size for m in chosen if m.world_size is not None), 1)
    return Configuration(words, model, world_size, sorted(told for mistake in chosen for told in mistake.ids))


ALL_OF_THEM = """
import json, os, pathlib, sys
from mm.cli.train import main
from mm.errors import ConfigError
told = []
for number, case in enumerate(json.loads(pathlib.Path(sys.argv[1]).read_text())):
    model = pathlib.Path(sys.argv[1]).with_name(f"model-{number}.json")
    model.write_text(json.dumps(case["model"]))
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(case["world_size"]))
    try:
        main([str(model) if word == "MODEL" else word for word in case["words"]])
        told.append(["nothing"])
    except ConfigError as error:
        told.append(sorted(problem.id for problem in error.problems))
    assert "torch" not in sys.modules, case
print(json.dumps(told))
"""


def test_all_mistakes_are_told_before_torch_is_imported(tmp_path: Path) -> None:
    data = {
        "dataset_type": "t2v", "basic_parameters": {"data_path": "features.txt"},
        "preprocess_parameters": {"num_frames": 9, "frame_interval": 1, "max_height": 64, "max_width": 64},
    }  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps({"dataset_param": data}))
    draw = random.Random(SEED)
    kinds = [RULES, RULES + elsewhere(), list(types()), list(keys())]
    cases = [mixture(draw, kinds[number % len(kinds)], tmp_path) for number in range(CONFIGURATIONS)]
    (tmp_path / "cases.json").write_text(json.dumps([asdict(case) for case in cases]))
    done = subprocess.run(
        [sys.executable, "-c", ALL_OF_THEM, str(tmp_path / "cases.json")], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    wrong = [
        f"{case.words} {case.model} {case.world_size}: expected {case.expected}, told {told}"
        for number, (case, told) in enumerate(zip(cases, json.loads(done.stdout), strict=True))
        if [name for name in told if number % 4 < 2 or name < "CFG-010"] != case.expected
    ]
    assert not wrong, "\n".join(wrong[:5])


def test_the_draw_is_wide() -> None:
    """Every rule's id is drawn, and most configurations have more than one mistake."""
    draw = random.Random(SEED)
    drawn = [mixture(draw, RULES, Path()) for _ in range(CONFIGURATIONS // 2)]
    told = Counter(name for case in drawn for name in case.expected)
    assert set(told) == {name for mistake in RULES for name in mistake.ids}
    assert sum(len(case.expected) > 1 for case in drawn) > len(drawn) / 2


@pytest.mark.parametrize("kind", [list(types()), list(keys())], ids=["flags", "keys"])
def test_lists_are_not_empty(kind: list[Mistake]) -> None:
    assert len(kind) > 15
