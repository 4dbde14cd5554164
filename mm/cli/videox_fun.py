"""A training script of VideoX-Fun: `scripts/wan2.1_fun/train_control.py WORDS`, by `mm.cli.videox_fun SCRIPT WORDS`.

Features are made first, into a store in --output_dir, and taken as they are where they are there already; with --live
the steps make them. Then the training begins. Beside each of the run's own checkpoints stands one as VideoX-Fun writes
it (`mm.cli.videox_fun_export`).
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mm.cli.entry import run
from mm.cli.extraction import extract_features
from mm.cli.training import train
from mm.config.model import WanConfig
from mm.config.output import require_writable_folder
from mm.config.place import ProcessPlace
from mm.config.rules.extraction import EXTRACTION_RULES
from mm.config.rules.generation import GENERATION_RULES
from mm.config.rules.training import TRAINING_RULES
from mm.config.run.file import whole_file
from mm.config.unread import broken, read_or
from mm.dialects.videox_fun.command import Command, read_command, script_of
from mm.dialects.videox_fun.scripts import SCRIPTS, Script
from mm.errors import ConfigError, raise_all

if TYPE_CHECKING:  # torch takes seconds
    from mm.train.sinks.base import Sink

log = logging.getLogger(__name__)

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

    place, training = command.place, command.training
    check_start(training)
    if command.live is None:
        _make_features(command)
    else:
        write_texts({Path(command.live.extractions[0]): whole_file(command.extraction)}, place)
        training = training.model_copy(update={"live": command.live})
        if place.rank == 0:
            log.info("the first batch is not shown: with --live its features are made in the steps")
    from mm.cli.videox_fun_export import Exports

    exports = Exports(command.writes, training)
    sinks: list[Sink] = []
    if command.clips is not None:
        from mm.cli.videox_fun_sample import Samples

        write_texts(command.clips.texts, place)
        sinks.append(Samples(command.clips.file.parent))
    word = "the newest of them are gone on with by --resume_from_checkpoint=latest"
    train(lambda _: training, saves=False, word=word, callbacks=[exports], sinks=sinks)


def check(command: Command) -> None:
    """Check both runs of a command, all problems at once, each told once.

    Raises:
        ConfigError: with these; then what `mm.train.trained_parts.trained_model` raises.
    """
    problems = [*command.training.problems, *broken(EXTRACTION_RULES, command.extraction)]
    problems += broken(TRAINING_RULES, command.training)
    clips = read_or(command.clips, None)
    if clips is not None:
        problems += broken(GENERATION_RULES, clips.run)
    raise_all(ConfigError, list(dict.fromkeys(problems)))
    from mm.train.trained_parts import trained_model  # torch

    trained_model(command.training)


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


def write_texts(texts: Mapping[Path, str], place: ProcessPlace) -> None:
    """Have text files that the training reads: the first process writes them, in their order, and the others wait.

    Raises:
        DataError: DATA-018, DATA-019 where they cannot be written.
    """
    from mm.data.files import make_folder, write_atomically

    if place.rank == 0:
        for file, text in texts.items():
            content = text.encode()
            make_folder(file.parent, "--output_dir")
            write_atomically(file, [content], len(content))
    _wait_for(lambda: all(file.exists() and file.read_text(encoding="utf-8") == text for file, text in texts.items()))


def _make_features(command: Command) -> None:
    """Extract; when all processes have, the first one shows what the first step is given."""
    from mm.data.store.catalog import is_sharded

    extract_features(command.extraction, command.place)
    # A process that finds no features left to make does not wait for those that others are still making.
    _wait_for(lambda: is_sharded(Path(command.extraction.output.path)))
    if command.place.rank == 0:
        _show_first_batch(command)


def _show_first_batch(command: Command) -> None:
    """Write what the first step is given, where a step is left to be taken."""
    if command.step > command.training.training.steps:
        return
    from mm.cli.videox_fun_first_batch import FOLDER, write_first_batch
    from mm.device.backend import select

    run, place = command.training, command.place
    folder, vae = Path(command.writes.folder) / FOLDER, Path(command.extraction.encoders.vae.from_pretrained)
    device = select(run.training.device, place.local_rank, place.world_size).device
    write_first_batch(run, vae, folder, command.step, device)


def _wait_for(is_there: Callable[[], bool]) -> None:
    """Wait for what another process of the job makes; where that fails, the launcher ends all of them."""
    while not is_there():
        time.sleep(_WAIT_S)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
