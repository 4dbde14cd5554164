"""`mm translate -- COMMAND...`: what a command line means, as run.yaml."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mm.cli.entry import run
from mm.cli.translate_scripts import documents_of
from mm.config.flags import without_flags
from mm.config.place import process_place
from mm.config.rules.every import check
from mm.config.run.base import Run
from mm.config.run.file import short_file
from mm.dialects.mindspeed.extraction import read_extraction
from mm.dialects.mindspeed.generate import read_generation
from mm.dialects.mindspeed.training import read_training
from mm.dialects.signatures import dialects_in
from mm.errors import ConfigError, Problem

Reader = Callable[[Sequence[str], int], Run]
"""(words, processes) -> the run."""

PROGRAMS: dict[str, Reader] = {
    "mm train": read_training,
    "pretrain_sora.py": read_training,
    "mm.cli.train": read_training,
    "mm extract": read_extraction,
    "get_sora_feature.py": read_extraction,
    "get_wan_feature.py": read_extraction,
    "mm.cli.extract": read_extraction,
    "mm generate": read_generation,
    "inference_sora.py": read_generation,
    "mm.cli.generate": read_generation,
}
"""What a command starts, and what reads the words that follow it."""
_HELP = """usage: mm translate -- COMMAND...

Print the run.yaml that a command line means, each value with the word that says it. The command is `mm train FLAGS`,
`mm extract FLAGS` or `mm generate FLAGS`, or what a script of MindSpeed-MM starts: `torchrun ... pretrain_sora.py
FLAGS`. Rules are asked with the processes that the launcher has started, or one.

Of a training of VideoX-Fun or DiffSynth-Studio (`accelerate launch WORDS scripts/wan2.1_fun/train_control.py FLAGS`) it
prints a file for each run that it means, with --- between them: the features, the training, clips between its steps."""


def main(argv: Sequence[str]) -> None:
    """Print run.yaml.

    Raises:
        ConfigError: CFG-191 for no command or one that is not known; CFG-190 for words of two systems; what the command
            raises before it starts; all at once.
    """
    if argv and argv[0] in ("-h", "--help"):
        print(_HELP)
        return
    command = argv[1:] if argv[:1] == ["--"] else argv
    documents = documents_of(command, os.environ)
    if documents is not None:
        print("---\n".join(documents), end="")
        return
    read, words = words_of_command(command)
    mixed, foreign = _mixed(words)
    described = read(without_flags(words, foreign), process_place().world_size)
    check(described.model_copy(update={"problems": (*mixed, *described.problems)}))
    print(short_file(described), end="")


def words_of_command(command: Sequence[str]) -> tuple[Reader, list[str]]:
    """Reader of a command's flags, and these flags, behind the name of what it starts.

    Raises:
        ConfigError: CFG-191 when it starts nothing that is known.
    """
    for position, word in enumerate(command):
        two = " ".join(command[position : position + 2])
        if two in PROGRAMS:
            return PROGRAMS[two], list(command[position + 2 :])
        if Path(word).name in PROGRAMS:
            return PROGRAMS[Path(word).name], list(command[position + 1 :])
        if word.startswith("--mm-"):
            return read_training, list(command)
    found = f"No command that is known is in {' '.join(command)!r}." if command else "No command is given."
    known = ", ".join(name for name in PROGRAMS if not name.startswith("mm."))
    remedy = f"Give the command itself behind --, with one of {known}; of a script, the one that it starts (bash -x "
    raise ConfigError("CFG-191", found, remedy + "shows it).")


def _mixed(words: Sequence[str]) -> tuple[list[Problem], set[str]]:
    """CFG-190 where a command has words of two systems, and the words that are not MindSpeed-MM's."""
    found = dialects_in(words)
    others = {system: own for system, own in found.items() if system != "MindSpeed-MM"}
    if len(found) < 2:
        return [], set()
    told = " and ".join(f"{system} ({', '.join(own)})" for system, own in found.items())
    problem = Problem("CFG-190", f"The command mixes words of {told}.", "Write it in the words of one of them.")
    return [problem], {name for own in others.values() for name in own}


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
