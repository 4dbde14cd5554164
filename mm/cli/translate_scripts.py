"""Commands of VideoX-Fun and DiffSynth-Studio as the runs that they mean: features, training, clips meanwhile."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mm.cli import diffsynth_train, videox_fun
from mm.config.place import process_place
from mm.config.run.base import Run
from mm.config.run.file import short_file
from mm.dialects.videox_fun.accelerate import Launched, read_launch_words
from mm.dialects.videox_fun.command import read_command, script_of
from mm.dialects.videox_fun.scripts import Script

_DIFFSYNTH = "model_training/train.py"
_MOST_LISTED = 100  # lines of a list that are shown


def documents_of(command: Sequence[str], environment: Mapping[str, str]) -> list[str] | None:
    """The run.yaml of each run that a command means, in the order in which they run; None for another command.

    Args:
        command: `accelerate launch WORDS SCRIPT WORDS`, or with torchrun, python or nothing in front of the script.
        environment: of the process, whose variables count unless the launcher is accelerate.

    Raises:
        MMError: what is wrong in the words, the files and the launcher's words, and every rule of each run; what the
            script raises of them before it begins.
    """
    for position, word in enumerate(command):
        script, plain = script_of(word), word.replace("\\", "/")
        if script is None and plain != _DIFFSYNTH and not plain.endswith(f"/{_DIFFSYNTH}"):
            continue
        variables, words = _launched(command[:position], environment), list(command[position + 1 :])
        return _of_diffsynth(words, variables) if script is None else _of_videox(script, words, variables)
    return None


def _launched(before: Sequence[str], environment: Mapping[str, str]) -> Mapping[str, str]:
    """Variables of the first process that the words before the script start."""
    for position, word in enumerate(before):
        if Path(word).name == "accelerate" and list(before[position + 1 : position + 2]) == ["launch"]:
            launched = read_launch_words([*before[position + 2 :], "script"], devices=0)
            number = str(_processes(launched))
            return {**launched.variables, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": number}
    return environment


def _processes(launched: Launched) -> int:
    words = " ".join(launched.torchrun)
    return math.prod(int(number) for number in re.findall(r"--(?:nnodes|nproc-per-node)=(\d+)", words))


def _of_videox(script: Script, words: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    command = read_command(script, words, environment, videox_fun.shape_of)
    videox_fun.check(command)
    training = command.training.model_copy(update={"live": command.live})
    documents = [
        _document(_features(command.place.world_size), command.extraction, ()),
        _document(_training(command.place.world_size), training, command.training.notes),
    ]
    if command.clips is not None:
        lists = [f"{file}: {line}" for file, lines in command.clips.lists.items() for line in lines[:_MOST_LISTED]]
        title = f"the clips between its steps, which it reads from {command.clips.file}"
        documents.append(_document(title, command.clips.run, lists))
    return documents


def _of_diffsynth(words: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    world_size = process_place(environment).world_size
    _, described, joins = diffsynth_train.read_run(words, world_size, environment, may_download=False)
    diffsynth_train.check_run(described)
    joined = [f"parts of the transformer are joined into {described.places.model} first"] if joins else []
    return [
        _document(_features(world_size), described.extraction, joined),
        _document(_training(world_size), described.training, described.extraction.notes),
    ]


def _features(world_size: int) -> str:
    return f"the features, which are made first, by {_count(world_size)}"


def _training(world_size: int) -> str:
    return f"the training on them, on {_count(world_size)}"


def _count(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"


def _document(title: str, run: Run, notes: Sequence[str]) -> str:
    return "".join(f"# {line}\n" for line in (title, *notes)) + short_file(run)
