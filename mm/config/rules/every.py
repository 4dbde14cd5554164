"""The rules of every kind of run."""

from __future__ import annotations

from mm.config.rules.extraction import check_extraction
from mm.config.rules.generation import check_generation
from mm.config.rules.training import check_training
from mm.config.run.base import Run
from mm.config.run.extraction import ExtractionRun
from mm.config.run.generation import GenerationRun
from mm.config.run.training import TrainingRun


def check(run: Run) -> None:
    """Check a run of any kind before any device is touched.

    Raises:
        ConfigError: with what could not be read and every violated rule.
    """
    if isinstance(run, ExtractionRun):
        check_extraction(run)
    elif isinstance(run, GenerationRun):
        check_generation(run)
    elif isinstance(run, TrainingRun):
        check_training(run)
    else:
        raise TypeError(f"no rules for {type(run).__name__}")
