"""`mm run FILE`: a training run that run.yaml describes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mm.cli.entry import run
from mm.cli.training import train
from mm.config.run.file import load_training
from mm.dialects.mindspeed.words import path_of
from mm.errors import ConfigError, Problem, raise_all

_HELP = """usage: mm run FILE

Train as run.yaml says. `mm translate -- mm train FLAGS` writes one; a run keeps its own beside its checkpoints, and
`mm run SAVE/run.yaml` goes on with it. examples/run.yaml shows the keys."""


def main(argv: Sequence[str]) -> None:
    """Train; raises what `mm.cli.training.train` raises.

    Raises:
        ConfigError: CFG-006 without a file or with several, CFG-190 for flags beside it.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(_HELP)
        return
    file = run_file_of(argv)
    word = f"checkpoint.save_on_signal in {file}"
    train(lambda where: load_training(file, where.world_size), saves=saves_on_signal(file), word=word)


def run_file_of(argv: Sequence[str]) -> Path:
    """The file that a command line names; raises what `main` raises for it."""
    problems = [_flag_beside_a_file(word.partition("=")[0]) for word in argv if word.startswith("--")]
    if not problems and len(argv) != 1:
        found = f"mm run takes one file, and {len(argv)} are given."
        problems.append(Problem("CFG-006", found, "Name one run.yaml: mm run run.yaml."))
    raise_all(ConfigError, problems)
    return Path(argv[0])


def saves_on_signal(file: Path) -> bool:
    """Whether a run saves when a signal asks it to stop; a file that cannot be read is told of later."""
    try:
        return load_training(file).checkpoint.save_on_signal
    except ConfigError:
        return False


def _flag_beside_a_file(flag: str) -> Problem:
    path = path_of(flag)
    instead = f"Write {path} into the file" if path is not None else "Write what it means into the file"
    found = f"{flag} is a word of another command line, and mm run takes a file alone."
    return Problem("CFG-190", found, f"{instead}; mm translate -- mm train FLAGS shows where each flag goes.")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
