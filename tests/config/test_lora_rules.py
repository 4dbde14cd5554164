"""LoRA's flags: what belongs together, which values there are, and what each refusal tells to do instead."""

import pytest
from translated import translated

from mm.config.base import parse
from mm.config.flags import parse_flags
from mm.config.layerzero import ZeroConfig
from mm.config.rules.training import check_training
from mm.dialects.mindspeed.pretrain_json import PretrainModel
from mm.dialects.mindspeed.retired_flags import RETIRED_TRAIN_FLAGS
from mm.dialects.mindspeed.train_flags import TrainFlags
from mm.errors import ConfigError

SHAPE = {"hidden_size": 48, "ffn_dim": 64, "num_heads": 4, "num_layers": 4}
MODEL = parse(PretrainModel, {"predictor": SHAPE, "diffusion": {}}, "m.json")
WHOLE = "--lora-r 4 --lora-alpha 8 --lora-target-modules q k --load-base-model base"
ZERO = "--layerzero --layerzero-config zero.yaml"


def problems(words: str) -> list[tuple[str, str, str]]:
    required = "--mm-data d.json --mm-model m.json --lr 1e-4 --train-iters 1"
    try:
        flags = parse_flags(TrainFlags, f"{required} {words}".split(), program="mm train", retired=RETIRED_TRAIN_FLAGS)
        check_training(translated(flags, MODEL, ZeroConfig(zero3_size=1) if flags.layerzero else None))
    except ConfigError as error:
        return [(problem.id, problem.message, problem.remedy) for problem in error.problems]
    return []


@pytest.mark.parametrize(
    "words", [WHOLE, f"{WHOLE} --lora-dropout 0", f"{WHOLE} --load adapter.safetensors", f"{WHOLE} {ZERO}",
              f"{WHOLE} --lora-base-dtype int8", f"{WHOLE} --load run --finetune"],
)  # fmt: skip
def test_whole_requests(words: str) -> None:
    assert problems(words) == []


@pytest.mark.parametrize(
    ("words", "expected", "found", "remedy"),
    [
        ("--lora-r 4", "CFG-104", "--lora-alpha and --lora-target-modules and --load-base-model", "--lora-r 16"),
        (WHOLE.replace("--lora-alpha 8", ""), "CFG-104", "needs --lora-alpha as well", "--lora-alpha 16"),
        ("--lora-dropout 0", "CFG-104", "--lora-r", "none of LoRA's flags"),
        (WHOLE.replace("--load-base-model base", ""), "CFG-104", "needs --load-base-model", "--load-base-model"),
        ("--load-base-model base --load base", "CFG-105", "no effect", "--load"),
        (WHOLE.replace("--lora-r 4", "--lora-r 0"), "CFG-102", "--lora-r is 0", "16"),
        (WHOLE.replace("--lora-alpha 8", "--lora-alpha -1"), "CFG-102", "--lora-alpha is -1", "--lora-r"),
        (f"{WHOLE} --lora-dropout 0.1", "CFG-103", "0.1", "give 0"),
        (f"{WHOLE} --lora-base-dtype fp8 {ZERO}", "CFG-106", "fp8", "--tensor-model-parallel-size"),
        (f"{WHOLE} --init-from-scratch", "CFG-023", "LoRA", "Remove it"),
        (f"{WHOLE} --lora-base-dtype int4", "CFG-005", "int4", "that kind"),
    ],
)
def test_each_refusal(words: str, expected: str, found: str, remedy: str) -> None:
    ((id_, message, fix),) = problems(words)
    assert id_ == expected
    assert found in message
    assert remedy in fix
