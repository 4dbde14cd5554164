"""The commands that the pages show, and the flags that they name: all of them exist."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from mm.cli.convert import ConvertFlags
from mm.cli.doctor import DoctorFlags
from mm.cli.flags_page import PROGRAMS as COMMANDS_WITH_FLAGS
from mm.cli.zero_to_bf16 import ZeroFlags
from mm.config.flags import Flags, flag_name
from mm.dialects.diffsynth.train_flags import DiffSynthFlags
from mm.dialects.mindspeed.accepted_flags import ACCEPTED_TRAIN_FLAGS
from mm.dialects.mindspeed.extract_files import RETIRED_EXTRACT_FLAGS, ExtractFlags
from mm.dialects.mindspeed.generate_flags import GenerateFlags
from mm.dialects.mindspeed.inference_retired import RETIRED_GENERATE_FLAGS
from mm.dialects.mindspeed.retired_flags import RETIRED_TRAIN_FLAGS
from mm.dialects.mindspeed.train_flags import TrainFlags
from mm.dialects.videox_fun.accelerate_flags import AccelerateFlags
from mm.dialects.videox_fun.scripts import SCRIPTS as OF_VIDEOX_FUN

ROOT = Path(__file__).parents[2]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
SCRIPTS: dict[str, type[Flags]] = {
    "convert_ckpt.py": ConvertFlags,
    "train.py": DiffSynthFlags,
    "zero_to_bf16.py": ZeroFlags,
    "pretrain.sh": DoctorFlags,  # with DRY_RUN and DOCTOR it takes these; they hold those of training
    "finetune_lora.sh": DoctorFlags,
    "slurm_pretrain.sbatch": TrainFlags,
    "inference.sh": GenerateFlags,
    "feature_extraction.sh": ExtractFlags,
}
PROGRAMS = {**COMMANDS_WITH_FLAGS, **SCRIPTS}
OF_OTHER_PROGRAMS = re.compile(
    r"--(help|version|nproc[-_]per[-_]node|nnodes|node[-_]rank|max[-_]restarts|master[-_](addr|port)|rdzv-\w+|shm-size|requeue"
    r"|signal|time|nodes|exact|ckpt-[a-z]+|cpus-per-task|gpus-per-node|gres|export|open-mode|output|kill-on-bad-exit|net"
    r"|use_peft_lora|logit_mean|gpus|ulimit|ipc|volume|env|user|network|init)"
)
"""Flags of torchrun, Slurm and Docker; of VideoX-Fun, where a page compares with it."""

Command = tuple[str, str]
"""A page and a command line in it."""


def commands(page: Path) -> Iterator[str]:
    """The command lines of a page's code blocks, whole and without comments."""
    for block in re.findall(r"^```(?:bash|sh|console|shell)?\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.removeprefix("$ ")
            if re.match(r"(\w+=\S* )*(mm|bash|python|torchrun|sbatch|sh) ", line):
                yield re.split(r"\s+#\s", line)[0]


def flags_in(text: str) -> list[str]:
    """Without families of flags such as `--recompute-*`."""
    return re.findall(r"(?<![\w-])--[a-z][\w-]*[a-z0-9](?!-?[\w*-])", text)


def known_flags(kind: type[Flags]) -> set[str]:
    names = {flag_name(name) for name in kind.model_fields} | {"--help"}
    return names | {"--" + name for name in kind.model_fields}  # the converter takes underscores


def program_of(words: list[str]) -> tuple[str, type[Flags]] | None:
    """Which of `PROGRAMS` a command starts: a script by its name, `mm` by its longest name."""
    for position, word in enumerate(words):
        if word == "mm":
            for count in (3, 2):
                name = " ".join(words[position : position + count])
                if name in PROGRAMS:
                    return name, PROGRAMS[name]
        if word.startswith("mm.cli."):
            name = word.replace("mm.cli.", "mm ").replace("_", " ")
            return name, PROGRAMS[name]
        if Path(word).name in PROGRAMS:
            return word, PROGRAMS[Path(word).name]
    return None


ALL = [(page.name, command) for page in PAGES for command in commands(page)]


def test_there_are_commands() -> None:
    assert len(ALL) > 30 and len({page for page, _ in ALL}) > 8


@pytest.mark.parametrize("shown", ALL, ids=[f"{page}-{number}" for number, (page, _) in enumerate(ALL)])
def test_a_command_that_a_page_shows_can_be_given(shown: Command) -> None:
    page, command = shown
    words = shlex.split(command.replace("[", " ").replace("]", " "))
    for word in words:
        if word.startswith(("examples/", "tools/", "scripts/", "tests/", "benchmarks/")) and "{" not in word:
            assert (ROOT / word).exists(), f"{page} runs {word}"
    found = program_of(words)
    if found is None:
        return
    name, kind = found
    for flag in flags_in(command):
        assert flag in known_flags(kind) or OF_OTHER_PROGRAMS.fullmatch(flag), f"{page}: {name} has no {flag}"
    if name.startswith("examples/") and name.endswith(".sh"):
        script = (ROOT / name).read_text() + (ROOT / "examples" / "wan2.1" / "common.sh").read_text()
        for variable in re.findall(r"(?:^| )([A-Z][A-Z_]+)=", command):
            assert re.search(rf"\$\{{?{variable}\b", script), f"{page}: {name} does not read {variable}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_that_a_page_names_exists(page: Path) -> None:
    """Ours, or one of another system that is told to have another name or no effect."""
    of_videox_fun = [AccelerateFlags, *(script.flags for script in OF_VIDEOX_FUN.values())]
    known = set().union(*map(known_flags, [*PROGRAMS.values(), *of_videox_fun]))
    known |= (
        set(ACCEPTED_TRAIN_FLAGS) | set(RETIRED_TRAIN_FLAGS) | set(RETIRED_GENERATE_FLAGS) | set(RETIRED_EXTRACT_FLAGS)
    )
    for code in re.findall(r"`([^`\n]+)`", page.read_text()):
        for flag in flags_in(code) if "benchmarks/" not in code else []:
            assert flag in known or OF_OTHER_PROGRAMS.fullmatch(flag), f"{page.name} names {flag} in `{code}`"
