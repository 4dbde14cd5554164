"""`mm translate -- COMMAND...`: what a command line means, as run.yaml."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mm.cli.entry import run
from mm.config.place import process_place
from mm.config.rules.training import check_training
from mm.config.run.file import short_file
from mm.dialects.mindspeed.training import read_training
from mm.dialects.signatures import dialects_in
from mm.errors import ConfigError, Problem, raise_all

PROGRAMS = ("mm train", "pretrain_sora.py", "mm.cli.train")
"""What a command starts, and whose words follow it."""
_HELP = """usage: mm translate -- COMMAND...

Print the run.yaml that a command line of training means, each value with the word that says it. The command is
`mm train FLAGS`, or what a script of MindSpeed-MM starts: `torchrun ... pretrain_sora.py FLAGS`. Rules are asked with
the processes that the launcher has started, or one."""


def main(argv: Sequence[str]) -> None:
    """Print run.yaml.

    Raises:
        ConfigError: CFG-191 for no command or one that is not known; CFG-190 for words of two systems; what
            `mm train` raises before it starts; all at once.
    """
    if argv and argv[0] in ("-h", "--help"):
        print(_HELP)
        return
    words = words_of_training(argv[1:] if argv[:1] == ["--"] else argv)
    mixed, foreign = _mixed(words)
    try:
        sections = read_training(_without(words, foreign), process_place().world_size)
    except ConfigError as error:
        raise_all(ConfigError, [*mixed, *error.problems])
        raise
    raise_all(ConfigError, mixed)
    check_training(sections)
    print(short_file(sections), end="")


def words_of_training(command: Sequence[str]) -> list[str]:
    """The flags of a command, behind the name of what it starts.

    Raises:
        ConfigError: CFG-191 when it starts nothing that is known.
    """
    for position, word in enumerate(command):
        two = " ".join(command[position : position + 2])
        if two == "mm train":
            return list(command[position + 2 :])
        if Path(word).name in PROGRAMS:
            return list(command[position + 1 :])
        if word.startswith("--mm-"):
            return list(command)
    found = f"No command of training is in {' '.join(command)!r}." if command else "No command is given."
    known = " or ".join(PROGRAMS[:2])
    remedy = f"Give the command itself behind --, with {known}; of a script, the one that it starts (bash -x shows it)."
    raise ConfigError("CFG-191", found, remedy)


def _mixed(words: Sequence[str]) -> tuple[list[Problem], set[str]]:
    """CFG-190 where a command has words of two systems, and the words that are not MindSpeed-MM's."""
    found = dialects_in(words)
    others = {system: own for system, own in found.items() if system != "MindSpeed-MM"}
    if len(found) < 2:
        return [], set()
    told = " and ".join(f"{system} ({', '.join(own)})" for system, own in found.items())
    problem = Problem("CFG-190", f"The command mixes words of {told}.", "Write it in the words of one of them.")
    return [problem], {name for own in others.values() for name in own}


def _without(words: Sequence[str], flags: set[str]) -> list[str]:
    """A command line without some flags and their values."""
    kept, dropping = [], False
    for word in words:
        if word.startswith("--"):
            dropping = word.partition("=")[0] in flags
        if not dropping:
            kept.append(word)
    return kept


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
