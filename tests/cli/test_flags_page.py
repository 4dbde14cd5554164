"""docs/flags.md and --help say what the classes of the flags say: groups, values, defaults."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest

from mm.cli.flags_page import PROGRAMS, flags_page
from mm.config.flag_help import flag_groups
from mm.config.flags import Flags, flag_name
from mm.dialects.mindspeed.generate_flags import GenerateFlags
from mm.dialects.mindspeed.train_flags import TrainFlags

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "flags.md"


def test_the_page_is_what_the_flags_say() -> None:
    assert PAGE.read_text() == flags_page(), "run python tools/write_flags.py and commit docs/flags.md"


def test_every_command_that_reads_flags_is_on_the_page() -> None:
    """Those of VideoX-Fun's scripts are its own, each with its meaning here (mm/dialects/meaning.py)."""
    rooms = ("cli", "config", "dialects/mindspeed")
    sources = [file for room in rooms for file in (ROOT / "mm" / room).rglob("*.py")]
    classes = {name for file in sources for name in re.findall(r"^class (\w*Flags)\(", file.read_text(), re.MULTILINE)}
    bases = {"Flags", "MeshFlags", "ExpertFlags", "StorageFlags"}
    assert classes - bases == {flags.__name__ for flags in PROGRAMS.values()}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_heading_begins_at_a_field(program: str) -> None:
    for base in PROGRAMS[program].__mro__:
        for field in base.__dict__.get("groups", {}):
            assert field in base.model_fields, f"{base.__name__} has no {field}"


def test_groups_of_training() -> None:
    """Each of the headings that users look for, with a flag that they look for there."""
    groups = {heading: {flag.field for flag in group} for heading, group in flag_groups(TrainFlags).items()}
    looked_for = {
        "parallelism": {"tensor_model_parallel_size", "use_distributed_optimizer", "layerzero_config"},
        "memory": {"recompute_granularity", "recompute_keep"},
        "optimizer": {"lr", "adam_beta1", "clip_grad", "ema_decay"},
        "LoRA": {"lora_r", "load_base_model"},
        "checkpoints": {"load", "save", "resume_changed", "ckpt_format"},
        "evaluation": {"eval_interval", "validation_config"},
        "logging": {"log_interval", "tensorboard_dir"},
        "supervision": {"hang_timeout", "on_nonfinite", "distributed_timeout_minutes"},
    }
    assert {heading: fields & groups[heading] for heading, fields in looked_for.items()} == looked_for
    assert sorted(field for group in groups.values() for field in group) == sorted(TrainFlags.model_fields)
    assert "flags" not in groups and "flags" not in flag_groups(GenerateFlags)


def shown_help(program: str) -> str:
    words = ["-m", "mm.cli.zero_to_bf16"] if "/" in program else ["-m", "mm.cli.main", *program.split()[1:]]
    done = subprocess.run([sys.executable, *words, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    return re.sub(r"\s+", " ", done.stdout)


def literals(flags: type[Flags]) -> dict[str, tuple[Any, ...]]:
    """Flags with choices, and these."""
    found = {}
    for name, field in flags.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if "Literal" in str(get_origin(kind)) and get_origin(field.annotation) not in (list, tuple):
                found[name] = get_args(kind)
    return found


@pytest.mark.parametrize("program", ["mm train", "mm generate", "mm convert", "scripts/zero_to_bf16.py"])
def test_help_shows_choices_and_defaults(program: str) -> None:
    shown, flags = shown_help(program), PROGRAMS[program]
    for name, choices in literals(flags).items():
        assert f"{flag_name(name)} {'|'.join(map(str, choices))} " in shown
    for name, field in flags.model_fields.items():
        assert flag_name(name) in shown
        if field.is_required():
            assert re.search(rf"{flag_name(name)} \S+ .*?required\)", shown)
    if flags is TrainFlags:
        for default in ("(above 0; default: 600)", "(at least 0; default: 0.01)", "(default: size)", "default: 1234)"):
            assert default in shown
        assert "None" not in shown
        positions = [shown.index(f" {heading}: --") for heading in flag_groups(TrainFlags)]
        assert positions == sorted(positions)
