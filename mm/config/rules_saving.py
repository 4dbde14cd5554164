"""Rules about checkpoints: flags that need a place for them, and what the MM format cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mm.config.request import Request
from mm.errors import Problem


def _saving_is_meant(request: Request) -> Iterator[Problem]:
    """CFG-024: flags about checkpoints without a place for them."""
    flags = request.flags
    for name in ("save_interval", "async_save", "save_on_signal", "keep_latest", "no_save_optim", "ema_decay"):
        if getattr(flags, name) and flags.save is None:
            flag = "--" + name.replace("_", "-")
            yield Problem("CFG-024", f"{flag} has no effect without --save.", "Give --save, or remove it.")
    if flags.ckpt_format == "torch" and flags.save is None:
        yield Problem("CFG-024", "--ckpt-format torch has no effect without --save.", "Give --save, or remove it.")
    if flags.verify_checkpoint == "full" and flags.save is None and flags.load is None:
        found = "--verify-checkpoint full has no effect without --save or --load."
        yield Problem("CFG-024", found, "Give one of them, or remove it.")
    if flags.resume_changed and flags.save is None and flags.load is None:
        found = "--resume-changed has no effect without --save or --load."
        yield Problem("CFG-024", found, "Give one of them, or remove it.")


def _mm_format_holds_weights(request: Request) -> Iterator[Problem]:
    """CFG-115: what a run in the MM format would lose or could not write."""
    flags = request.flags
    if flags.ckpt_format != "torch":
        return
    default = "or use the default --ckpt-format torch_dist, which has all of it on every layout."
    if not flags.no_save_optim:
        yield Problem(
            "CFG-115",
            "--ckpt-format torch holds no optimizer state, and --no-save-optim is absent.",
            f"Add it, {default}",
        )
    problems = {
        "--layerzero": (flags.layerzero, "shards parameters, which the MM format has no files for"),
        "--tensor-model-parallel-size": (request.tp > 1, "cuts parameters, which MindSpeed-MM does not for Wan"),
        "LoRA": (flags.lora, "has a base model besides, and its alpha has no place in the MM format"),
        "--ema-decay": (flags.ema_decay is not None, "keeps an average, which has no place in the MM format"),
        "--async-save": (flags.async_save, "writes pieces of the sharded format alone"),
    }
    for name, (given, why) in problems.items():
        if given:
            yield Problem("CFG-115", f"--ckpt-format torch with {name}, which {why}.", f"Remove one of them, {default}")


SAVING_RULES: tuple[Callable[[Request], Iterator[Problem]], ...] = (_saving_is_meant, _mm_format_holds_weights)
