"""Words of other systems: each is told by what it is called here, and a guess is made only of a slip of the pen."""

import os
import re
from pathlib import Path

import pytest

from mm.config.flags import Flags, flag_name, parse_flags
from mm.dialects.mindspeed.extract_files import RETIRED_EXTRACT_FLAGS, ExtractFlags
from mm.dialects.mindspeed.generate_flags import GenerateFlags
from mm.dialects.mindspeed.inference_retired import RETIRED_GENERATE_FLAGS
from mm.dialects.mindspeed.retired_flags import RETIRED_TRAIN_FLAGS
from mm.dialects.mindspeed.train_flags import TrainFlags
from mm.errors import ConfigError

TRAIN = ["--mm-data", "d", "--mm-model", "m", "--train-iters", "1", "--lr", "1"]


def told(words: list[str], flags: type[Flags] = TrainFlags) -> str:
    retired = {TrainFlags: RETIRED_TRAIN_FLAGS, GenerateFlags: RETIRED_GENERATE_FLAGS}.get(flags, RETIRED_EXTRACT_FLAGS)
    needed = TRAIN if flags is TrainFlags else ["--mm-model", "m"]
    with pytest.raises(ConfigError) as caught:
        parse_flags(flags, [*needed, *words], program="mm", retired=retired)
    return str(caught.value)


@pytest.mark.parametrize(
    ("word", "here"),
    [
        ("--use-deter-comp", "--deterministic-mode"),
        ("--npu-deterministic", "--deterministic-mode"),
        ("--exit-signal-handler", "--save-on-signal"),
        ("--recompute-full-layers", "--recompute-num-layers"),
        ("--tensor-parallel-size", "--tensor-model-parallel-size"),
        ("--learning_rate", "--lr"),
        ("--max_grad_norm", "--clip-grad"),
        ("--checkpointing_steps", "--save-interval"),
        ("--lora_rank", "--lora-r"),
        ("--output_dir", "--save"),
        ("--micro_batch_size", "--micro-batch-size"),
    ],
)
def test_words_of_training_elsewhere(word: str, here: str) -> None:
    text = told([word, "3"])
    assert text.startswith(f"CFG-007: {word} is not a flag") and f"is {here}." in text and "Did you mean" not in text


@pytest.mark.parametrize(
    ("word", "here"),
    [("--save", "--save-path"), ("--output_dir", "--save-path"), ("--sample_steps", "--num-inference-steps"),
     ("--guidance", None), ("--num-frames", "--input-size")],
)  # fmt: skip
def test_words_of_generation_elsewhere(word: str, here: str | None) -> None:
    assert (f"is {here}." in told([word, "3"], GenerateFlags)) == (here is not None)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--micro-batchsize", "--micro-batch-size"),
        ("--save-intervall", "--save-interval"),
        ("--use-flash-attn", None),
        ("--use-distillation", None),
        ("--log-timers-to-tensorboard", None),
        ("--num-experts", None),
        ("--split", None),
    ],
)
def test_a_guess_by_letters_is_a_slip_of_the_pen(word: str, meant: str | None) -> None:
    text = told([word, "3"])
    assert (f'Did you mean "{meant}"?' in text) if meant else "Did you mean" not in text


GUIDE = re.compile(r"(?<![\w-])--[a-z][a-z0-9]+(?:-[a-z0-9]+)+")


def test_every_flag_of_the_guide_means_something_here() -> None:
    """A flag, one with another name, or one that is told to be needless; never a guess."""
    guides = os.environ.get("MM_GUIDES")
    if not guides:
        pytest.skip("MM_GUIDES is not set; it names the folder of the guides")
    words = set(GUIDE.findall((Path(guides) / "mindspeed-mm-wan2.1.md").read_text()))
    assert len(words) > 8
    known = {flag_name(name) for kind in (TrainFlags, GenerateFlags, ExtractFlags) for name in kind.model_fields}
    of_converters = {"--input-folder", "--output-folder"}
    for word in sorted(words - known - of_converters):
        assert "Did you mean" not in told([word, "3"]), word
        assert word in RETIRED_TRAIN_FLAGS or "is not a flag; the one for that here" in told([word, "3"]), word
