"""A training script of VideoX-Fun: `scripts/wan2.1_fun/train_control.py WORDS`, by `mm.cli.videox_fun SCRIPT WORDS`.

Features are made first, into a store in --output_dir, and taken as they are where they are there already. Then the
training begins. Beside each of the run's own checkpoints stands one as VideoX-Fun writes it
(`mm.cli.videox_fun_export`).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mm.cli.entry import run
from mm.cli.extraction import extract_features
from mm.cli.training import train
from mm.config.model import WanConfig
from mm.config.output import require_writable_folder
from mm.config.rules.extraction import EXTRACTION_RULES
from mm.config.rules.training import TRAINING_RULES
from mm.config.unread import broken
from mm.dialects.videox_fun.command import Command, read_command, script_of
from mm.dialects.videox_fun.scripts import SCRIPTS, Script
from mm.errors import ConfigError, raise_all

_WAIT_S = 0.5


def main(argv: Sequence[str]) -> None:
    """Make features and train on them; the first word is the script.

    Raises:
        ConfigError: CFG-009 for another script; what is wrong in the words, files and environment, and every violated
            rule of the extraction and the training, all at once.
        MMError: what `mm.train.start_check.check_start`, `mm.cli.extraction.extract_features` and
            `mm.cli.training.train` raise.
    """
    script = _script(argv)
    command = read_command(script, argv[1:], os.environ, shape_of)
    check(command)
    require_writable_folder(command.writes.folder, "--output_dir")
    from mm.train.start_check import check_start  # torch takes seconds

    check_start(command.training)
    extract_features(command.extraction, command.place)
    from mm.cli.videox_fun_export import Exports
    from mm.data.store.catalog import is_sharded

    # A process that finds no features left to make does not wait for those that others are still making.
    _wait_for(lambda: is_sharded(Path(command.extraction.output.path)))
    exports = Exports(command.writes, command.training)
    word = "the newest of them are gone on with by --resume_from_checkpoint=latest"
    train(lambda _: command.training, saves=False, word=word, callbacks=[exports])


def check(command: Command) -> None:
    """Check both runs of a command, all problems at once, each told once.

    Raises:
        ConfigError: with these.
    """
    problems = [*command.training.problems, *broken(EXTRACTION_RULES, command.extraction)]
    problems += broken(TRAINING_RULES, command.training)
    raise_all(ConfigError, list(dict.fromkeys(problems)))


def shape_of(folder: str) -> WanConfig:
    """Shape of a model, by the config.json and the headers in its folder; raises what `WeightFolder.open` raises."""
    from mm.wan.folder import WeightFolder

    return WeightFolder.open(folder).config()


def _script(argv: Sequence[str]) -> Script:
    script = script_of(argv[0]) if argv else None
    if script is None:
        found = f"{argv[0]} is no script of VideoX-Fun that is here." if argv else "No script is named."
        raise ConfigError("CFG-009", found, f"Use one of {', '.join(SCRIPTS)}.")
    return script


def _wait_for(is_there: Callable[[], bool]) -> None:
    """Wait for what another process of the job makes; where that fails, the launcher ends all of them."""
    while not is_there():
        time.sleep(_WAIT_S)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
