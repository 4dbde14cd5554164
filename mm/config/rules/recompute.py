"""Rules about recomputation and offload: values that need each other, and counts of blocks that exist."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mm.config.recompute import recompute_of
from mm.config.run.training import TrainingRun
from mm.errors import Problem


def _granularity_has_its_method(run: TrainingRun) -> Iterator[Problem]:
    """CFG-048: full recomputation has a method, and the other values have a recomputation."""
    memory, words = run.memory, run.origins
    full, method = words["memory.recompute"].with_value("full"), words["memory.method"]
    if memory.recompute == "full" and memory.method is None:
        found = f"{full} has no effect alone."
        yield Problem("CFG-048", found, f"Add {method.with_value('uniform')} or block, or remove it.")
    others = {
        "memory.method": memory.method is not None,
        "memory.blocks": memory.blocks is not None,
        "memory.keep_attention": memory.keep_attention,
        "memory.keep_attention_blocks": memory.keep_attention_blocks is not None,
    }
    if memory.recompute != "full":
        remedy = "Remove it: all blocks keep their attention." if memory.recompute else "Add that, or remove it."
        for path, given in others.items():
            if given:
                yield Problem("CFG-048", f"{words[path].name} has no effect without {full}.", remedy)


def _counts_are_of_blocks(run: TrainingRun) -> Iterator[Problem]:
    """CFG-048: groups have blocks, and stages have as many as are counted."""
    memory, words, largest = run.memory, run.origins, max(run.blocks_of_stages)
    blocks, keeping = words["memory.blocks"], words["memory.keep_attention_blocks"].name
    skip, skipped = words["memory.keep_attention"].with_value(True), memory.keep_attention_blocks
    if memory.method == "uniform" and memory.blocks == 0:
        yield Problem("CFG-048", f"{blocks.with_value(0)} makes groups without blocks.", "Use 1 or more.")
    if memory.blocks is not None and memory.blocks > largest:
        yield Problem(
            "CFG-048",
            f"{blocks.name} is {memory.blocks}, and no stage has more than {largest} blocks.",
            f"Use at most {largest}.",
        )
    elif memory.method == "block" and memory.keep_attention:
        left = largest - (largest if memory.blocks is None else memory.blocks)
        if left == 0:
            whole = blocks.with_value(memory.blocks) if memory.blocks is not None else f"The default of {blocks.name}"
            yield Problem(
                "CFG-048",
                f"{whole} recomputes all {largest} blocks of a stage whole, which leaves none for {skip}.",
                f"Use a smaller {blocks.name} (0: all blocks keep their attention), or remove the flag.",
            )
        elif skipped is not None and skipped > left:
            yield Problem(
                "CFG-048",
                f"{keeping} is {skipped}; after {blocks.with_value(memory.blocks)} no stage has more than {left} "
                "blocks.",
                f"Use at most {left}.",
            )


def _kept_attention_is_asked_for(run: TrainingRun) -> Iterator[Problem]:
    """CFG-048: what is kept, of how many blocks and where it waits is about blocks that keep their attention."""
    memory, words = run.memory, run.origins
    keeping, method = words["memory.keep_attention_blocks"].name, words["memory.method"]
    skip = words["memory.keep_attention"].with_value(True)
    if memory.recompute == "full" and memory.keep_attention_blocks is not None:
        if not memory.keep_attention:
            yield Problem("CFG-048", f"{keeping} has no effect without {skip}.", "Add that, or remove it.")
        elif memory.method == "uniform":
            found = (
                f"{keeping} has no effect with {method.with_value('uniform')}, where all blocks keep their attention."
            )
            yield Problem("CFG-048", found, f"Remove it, or use {method.with_value('block')}.")
    plan = recompute_of(run.memory)
    if plan is not None and plan.keep_layers != 0:
        return
    selective = words["memory.recompute"].with_value("selective")
    remedy = f"Add {selective}, or {skip} to full recomputation; or remove it."
    if memory.keep is not None:
        found = f"{words['memory.keep'].name} has no effect where no block keeps its attention."
        yield Problem("CFG-048", found, remedy)
    if memory.offload:
        found = f"{words['memory.offload'].quoted()} has no effect where no block keeps its attention."
        yield Problem("CFG-048", found, remedy)


RECOMPUTE_RULES: tuple[Callable[[TrainingRun], Iterator[Problem]], ...] = (
    _granularity_has_its_method,
    _counts_are_of_blocks,
    _kept_attention_is_asked_for,
)
