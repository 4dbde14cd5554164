"""`mm run FILE`: a training, an extraction or a generation that run.yaml describes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mm.cli.entry import run
from mm.cli.extraction import extract_features
from mm.cli.generation import generate
from mm.cli.run_file import flag_beside_a_file, kind_in
from mm.cli.training import train
from mm.config.place import process_place
from mm.config.run.extraction import ExtractionRun
from mm.config.run.file import load_run, of_kind
from mm.config.run.generation import GenerationRun
from mm.config.run.training import TrainingRun
from mm.errors import ConfigError, Problem, raise_all

_HELP = """usage: mm run FILE

Train, extract features or generate as run.yaml says: a file with the section `training` is a training, one with
`extraction` an extraction, one with `generation` a generation. `mm translate -- mm train FLAGS` writes one, and so it
does for `mm extract` and `mm generate`. A training keeps its own beside its checkpoints, and `mm run SAVE/run.yaml`
goes on with it. examples/run.yaml, run_extraction.yaml and run_generation.yaml show the keys."""


def main(argv: Sequence[str]) -> None:
    """Do what the file describes.

    Raises:
        ConfigError: CFG-006 without a file or with several, CFG-190 for flags beside it.
        MMError: what `mm.cli.training.train`, `mm.cli.extraction.extract_features` and `mm.cli.generation.generate`
            raise.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(_HELP)
        return
    file = run_file_of(argv)
    described = load_run(file)
    if isinstance(described, ExtractionRun):
        where = process_place()
        extract_features(described.on(where.world_size), where)
        return
    if isinstance(described, GenerationRun):
        where = process_place()
        generate(described.on(where.world_size), where)
        return
    training = of_kind(described, TrainingRun)
    word = f"checkpoint.save_on_signal in {file}"
    train(lambda where: training.on(where.world_size), saves=saves_on_signal(file), word=word)


def run_file_of(argv: Sequence[str]) -> Path:
    """The file that a command line names; raises what `main` raises for it."""
    kind = next((kind_in(Path(word)) for word in argv if word.endswith((".yaml", ".yml"))), "training")
    problems = [flag_beside_a_file(word.partition("=")[0], kind) for word in argv if word.startswith("--")]
    if not problems and len(argv) != 1:
        found = f"mm run takes one file, and {len(argv)} are given."
        problems.append(Problem("CFG-006", found, "Name one run.yaml: mm run run.yaml."))
    raise_all(ConfigError, problems)
    return Path(argv[0])


def saves_on_signal(file: Path) -> bool:
    """Tell whether a run saves when a signal asks it to stop; a file that cannot be read is told of later."""
    try:
        described = load_run(file)
    except ConfigError:
        return False
    return isinstance(described, TrainingRun) and described.checkpoint.save_on_signal is True


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
