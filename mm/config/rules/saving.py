"""Rules about checkpoints: values that need a place for them, and what the MM format cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mm.config.run.training import TrainingRun
from mm.errors import Problem


def _saving_is_meant(run: TrainingRun) -> Iterator[Problem]:
    """CFG-024: values about checkpoints without a place for them."""
    kept, words = run.checkpoint, run.origins
    save, load = words["checkpoint.save"].name, words["checkpoint.load"].name
    asked = {
        "checkpoint.save_interval": kept.save_interval is not None,
        "checkpoint.in_background": kept.in_background,
        "checkpoint.save_on_signal": kept.save_on_signal,
        "checkpoint.keep_latest": kept.keep_latest is not None,
        "checkpoint.save_optimizer": not kept.save_optimizer,
        "optimizer.ema_decay": run.optimizer.ema_decay is not None,
    }
    for path, given in asked.items():
        if given and kept.save is None:
            yield Problem(
                "CFG-024", f"{_named(run, path)} has no effect without {save}.", f"Give {save}, or remove it."
            )
    format_, verify = (words[f"checkpoint.{name}"] for name in ("format", "verify"))
    if kept.format == "torch" and kept.save is None:
        found = f"{format_.with_value('torch')} has no effect without {save}."
        yield Problem("CFG-024", found, f"Give {save}, or remove it.")
    if kept.save is not None or kept.load is not None:
        return
    if kept.verify == "full":
        found = f"{verify.with_value('full')} has no effect without {save} or {load}."
        yield Problem("CFG-024", found, "Give one of them, or remove it.")
    if kept.resume_changed:
        found = f"{words['checkpoint.resume_changed'].name} has no effect without {save} or {load}."
        yield Problem("CFG-024", found, "Give one of them, or remove it.")


def _named(run: TrainingRun, path: str) -> str:
    """A switch as it is given, of anything else the name alone."""
    word = run.origins[path]
    return word.with_value(False) if path == "checkpoint.save_optimizer" else word.name


def _mindspeed_format_holds_weights(run: TrainingRun) -> Iterator[Problem]:
    """CFG-115: what a run in the MM format would lose or could not write."""
    kept, words = run.checkpoint, run.origins
    if kept.format != "torch":
        return
    torch = words["checkpoint.format"].with_value("torch")
    sharded = words["checkpoint.format"].with_value("torch_dist")
    default = f"or use the default {sharded}, which has all of it on every layout."
    if kept.save_optimizer:
        state = words["checkpoint.save_optimizer"]
        yield Problem(
            "CFG-115",
            f"{torch} holds no optimizer state, and {state.states(True).replace(' in ' + state.file, '')}.",
            f"{'Set it to false' if state.file else 'Add it'}, {default}",
        )
    problems = {
        words["parallel.layerzero"].name: (
            run.parallel.layerzero is not None,
            "shards parameters, which the MM format has no files for",
        ),
        words["parallel.tensor_size"].name: (run.tp > 1, "cuts parameters, which MindSpeed-MM does not for Wan"),
        "LoRA": (run.adapters is not None, "has a base model besides, and its alpha has no place in the MM format"),
        words["optimizer.ema_decay"].name: (
            run.optimizer.ema_decay is not None,
            "keeps an average, which has no place in the MM format",
        ),
        words["checkpoint.in_background"].name: (kept.in_background, "writes pieces of the sharded format alone"),
    }
    for name, (given, why) in problems.items():
        if given:
            yield Problem("CFG-115", f"{torch} with {name}, which {why}.", f"Remove one of them, {default}")


SAVING_RULES: tuple[Callable[[TrainingRun], Iterator[Problem]], ...] = (
    _saving_is_meant,
    _mindspeed_format_holds_weights,
)
