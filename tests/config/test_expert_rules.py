"""Flags of two experts: what belongs together, and what each refusal tells to do instead."""

from pathlib import Path
from typing import Any

import pytest
from translated import SHAPE, translated

from mm.config.base import parse
from mm.config.expert_runs import expert_runs
from mm.config.rules.training import check_training
from mm.config.run.file import load_training, whole_file
from mm.dialects.mindspeed.pretrain_json import PretrainModel
from mm.errors import ConfigError

BASE = "--lr 1e-4 --train-iters 1 --save out"
BOTH = f"{BASE} --expert-boundary 0.875 --load high --load-low-noise low"
LORA = (
    f"{BASE} --expert-boundary 0.9 --lora-r 4 --lora-alpha 8 --lora-target-modules q --load-base-model high "
    "--load-base-model-low-noise low"
)
CLIPS = "--validation-interval 1 --validation-prompts p.txt --validation-config i.json"


def model(**diffusion: Any) -> PretrainModel:
    return parse(PretrainModel, {"predictor": SHAPE, "diffusion": diffusion}, "m.json")


@pytest.mark.parametrize(
    "words",
    [
        BOTH, LORA, f"{BASE} --expert-boundary 0.875 --init-from-scratch", f"{LORA} --load a --load-low-noise b",
        f"{BOTH} --expert-steps 10 --offload-expert --pack 5000",
    ],
)  # fmt: skip
def test_whole_requests(words: str) -> None:
    check_training(translated(words, model()))


@pytest.mark.parametrize(
    ("words", "diffusion", "said"),
    [
        (BOTH, {"band_from": 0.875}, "CFG-310: .*band_from.*0.875 and --expert-boundary.*Remove one"),
        (BOTH.replace("--load-low-noise low", ""), {}, "CFG-311: --load is given without --load-low-noise"),
        (BOTH.replace("--load high", "--finetune"), {}, "CFG-311: --load-low-noise is given without --load"),
        (LORA.replace("--load-base-model-low-noise low", ""), {}, "CFG-311: --load-base-model-low-noise is missing"),
        (f"{BOTH} --load-base-model-low-noise low", {}, "CFG-311: .*no effect without LoRA"),
        (BOTH.replace("0.875", "0.001"), {}, "CFG-312: --expert-boundary 0.001 leaves.*0.875 for Wan2.2's T2V-A14B"),
        (f"{BOTH} --async-save", {}, "CFG-313: --async-save is not done with --expert-boundary"),
        (f"{BOTH} --ckpt-format torch --no-save-optim", {}, "CFG-313: --ckpt-format torch"),
        (f"{BASE} --load high --offload-expert", {}, "CFG-315: --offload-expert has no effect"),
        (f"{BASE} --load high --load-low-noise low", {}, "CFG-315: --load-low-noise has no effect"),
        (f"{BOTH} {CLIPS} --validation-other-expert w", {}, "CFG-314: .*clips ask both experts"),
        (f"{BASE} --load high {CLIPS} --validation-other-expert w", {}, "CFG-314: .*needs a run of one expert"),
        (f"{BASE} --load high --validation-other-expert w", {}, "CFG-124: --validation-other-expert"),
    ],
)
def test_each_refusal(words: str, diffusion: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_training(translated(words, model(**diffusion)))


def test_experts_are_runs_of_their_own_with_the_user_s_words() -> None:
    high, low = expert_runs(translated(LORA, model()))
    assert (high.objective.band, low.objective.band) == ((0.9, float("inf")), (0.0, 0.9))
    assert [one.adapters and one.adapters.base for one in (high, low)] == ["high", "low"]
    assert [one.checkpoint.save for one in (high, low)] == ["out/transformer", "out/transformer_2"]
    assert [one.origins["adapters.base"].name for one in (high, low)] == [
        "--load-base-model", "--load-base-model-low-noise",
    ]  # fmt: skip
    assert low.origins["objective.band_below"].name == "--expert-boundary"
    assert low.origins["checkpoint.load"].name == "--load-low-noise"


def test_run_yaml_has_the_section(tmp_path: Path) -> None:
    run = translated(f"{BOTH} --expert-steps 3 --offload-expert", model())
    (tmp_path / "run.yaml").write_text(whole_file(run))
    again = load_training(tmp_path / "run.yaml")
    assert again.experts == run.experts
    assert again.experts is not None and again.experts.steps_in_a_row == 3
