"""DiffSynth-Studio's train.py for Wan: its command line, features made first, then the training on them."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from mm.cli.entry import run
from mm.cli.extraction import extract_features
from mm.cli.training import train
from mm.config.data import data_source_line
from mm.config.flags import words_of_process
from mm.config.output import require_writable_folder
from mm.config.place import ProcessPlace, process_place
from mm.config.rules.extraction import EXTRACTION_RULES
from mm.config.rules.training import TRAINING_RULES
from mm.config.unread import UNREAD, UnreadError, broken, read_or
from mm.dialects.diffsynth.named_models import named_models
from mm.dialects.diffsynth.sharding import read_launcher
from mm.dialects.diffsynth.train_flags import DiffSynthFlags
from mm.dialects.diffsynth.translation import DiffSynthRun, FoundModels, MetadataTable, Places, translate
from mm.dialects.diffsynth.words import PROGRAM
from mm.dialects.underscored import read_flags
from mm.errors import ConfigError, MMError, Problem, raise_all
from mm.stopping import StopRequest

log = logging.getLogger(__name__)

ReadT = TypeVar("ReadT")
_LOOK_S = 1.0


def main(argv: Sequence[str]) -> None:
    """Make the features of a data set where they are not there yet, and train.

    Raises:
        ConfigError: what is wrong in the words, the files that they name and accelerate's configuration, and every
            violated rule of both stages; all at once, before any device is touched.
        MMError: what `mm.train.start_check.check_start`, `mm.cli.extraction.extract_features` and
            `mm.cli.training.train` raise.
    """
    where = process_place()
    flags, described, joins = read_run(argv, where.world_size, os.environ)
    check_run(described)
    places = described.places
    require_writable_folder(str(places.output), "--output_path")
    if joins and where.rank == 0:
        from mm.cli.diffsynth_models import join_models  # torch, after the command line is known to be good

        join_models(named_models(flags), flags.tokenizer_path, places.model)
    if not joins or where.rank == 0:  # who has just made what others do not wait for here
        from mm.train.start_check import check_start

        check_start(described.training)
    extract_features(described.extraction, where)
    _share_features(places, where)

    from mm.cli.diffsynth_files import EpochFiles

    callbacks = [EpochFiles(described, where)]
    train(lambda where: described.training.on(where.world_size), saves=True, word="the command", callbacks=callbacks)


def read_run(
    argv: Sequence[str], world_size: int, environment: Mapping[str, str], *, may_download: bool = True
) -> tuple[DiffSynthFlags, DiffSynthRun, bool]:
    """Both stages that the words describe, with all that is wrong in them; not yet checked by the rules.

    Args:
        argv: the words after the program's name. world_size: processes. environment: in which accelerate says its own.
        may_download: fetch models that are not there.

    Returns:
        The flags, the stages, and whether two parts of a transformer are to be joined first.
    """
    flags, read = read_flags(DiffSynthFlags, argv, PROGRAM, "CFG-389")
    launcher, problems = read_launcher(environment)
    read.problems.extend(problems)
    found = _attempt(lambda: _models(flags, may_download=may_download), read.problems)
    table = _attempt(lambda: _table(Path(flags.dataset_metadata_path)), read.problems)
    return flags, translate(flags, read, found, table, launcher, world_size), read_or(found.joins, False)


def _attempt(look: Callable[[], ReadT], problems: list[Problem]) -> ReadT:
    """Result of a look at files, or `UNREAD`, where its problems are kept or the word that names them was not read."""
    try:
        return look()
    except MMError as error:
        problems += error.problems
    except UnreadError:
        pass
    unread: ReadT = UNREAD
    return unread


def check_run(described: DiffSynthRun) -> None:
    """Check both stages.

    Raises:
        ConfigError: with what could not be read, what contradicts itself, and every violated rule; then what
            `mm.train.trained_parts.trained_model` raises.
    """
    extraction, training = described.extraction, described.training
    found = (
        *extraction.problems,
        *broken(EXTRACTION_RULES, extraction),
        *broken(TRAINING_RULES, training),
    )
    raise_all(ConfigError, list(dict.fromkeys(found)))

    from mm.train.trained_parts import trained_model  # torch

    trained_model(training)


def _models(flags: DiffSynthFlags, *, may_download: bool) -> FoundModels:
    named = named_models(flags)

    from mm.cli.diffsynth_models import find_models  # torch

    return find_models(named, flags.tokenizer_path, Places(Path(flags.output_path)).model, may_download=may_download)


def _table(path: Path) -> MetadataTable:
    """Count the rows of the metadata."""
    from mm.data.tables import open_table

    rows, columns = 0, frozenset[str]()
    for row in open_table(path, "DATA-060"):
        if rows == 0 and isinstance(row.value, dict):
            columns = frozenset(row.value)
        rows += 1
    return MetadataTable(rows, columns)


def _share_features(places: Places, where: ProcessPlace) -> None:
    """Wait until every process's part of the features is there, and name the store to training."""
    from mm.checkpoint.files import replace_text, writing_errors
    from mm.data.store.catalog import is_sharded

    kept = "The features written so far stay, and are not made again."
    with StopRequest(saves=False, kept=kept):
        if where.rank == 0:
            with writing_errors():
                replace_text(places.listing, data_source_line(places.features.absolute()) + "\n")
        if not is_sharded(places.features):
            log.info("waiting for the other processes' features")
        while not (is_sharded(places.features) and places.listing.exists()):
            time.sleep(_LOOK_S)


if __name__ == "__main__":
    sys.exit(run(main, words_of_process()))
