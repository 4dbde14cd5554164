"""A look at what a run starts from, by names and shapes alone, for commands that have hours of work before it."""

from __future__ import annotations

from pathlib import Path

from mm.checkpoint.directory import candidates
from mm.checkpoint.identify import identify
from mm.checkpoint.weights import open_weights
from mm.config.run.training import TrainingRun
from mm.train.adapters import fitting_adapter
from mm.train.run import expected_model
from mm.train.trained_parts import trained_model
from mm.wan.model import whole_shapes


def check_start(run: TrainingRun) -> None:
    """Look at the weights and adapters that a run starts from, where it does not go on; on one process.

    Raises:
        ConfigError: what `mm.train.trained_parts.trained_model` raises, CFG-028 for weights that say that they belong
            to another model.
        CheckpointError: CKPT-011 for missing or unexpected tensors or other shapes, and what `identify` and
            `open_weights` raise.
        DataError: what `mm.train.adapters.load_adapters` raises.
    """
    start, words = run.checkpoint, run.origins
    plan = trained_model(run).lora
    if start.save is not None and candidates(Path(start.save)):
        return
    base = start.load if run.adapters is None else run.adapters.base
    if base is not None:
        expected_model(run).require(open_weights(identify(base)))
    if plan is not None and start.load is not None:
        fitting_adapter(identify(start.load, wanted="adapters"), plan, whole_shapes(run.wan), words)
