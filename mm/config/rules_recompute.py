"""Rules about recomputation and offload: flags that need each other, and counts of blocks that exist."""

from __future__ import annotations

from collections.abc import Iterator

from mm.config.recompute import recompute_of
from mm.config.request import Request
from mm.errors import Problem

_SKIP, _LAYERS = "--recompute-skip-core-attention", "--recompute-num-layers-skip-core-attention"


def _granularity_has_its_method(request: Request) -> Iterator[Problem]:
    """CFG-048: full recomputation has a method, and the other flags have a recomputation."""
    flags = request.flags
    granularity, method = flags.recompute_granularity, flags.recompute_method
    if granularity == "full" and method is None:
        found = "--recompute-granularity full has no effect alone."
        yield Problem("CFG-048", found, "Add --recompute-method uniform or block, or remove it.")
    others = {
        "--recompute-method": method is not None,
        "--recompute-num-layers": flags.recompute_num_layers is not None,
        _SKIP: flags.recompute_skip_core_attention,
        _LAYERS: flags.recompute_num_layers_skip_core_attention is not None,
    }
    if granularity != "full":
        remedy = "Remove it: all blocks keep their attention." if granularity else "Add that, or remove it."
        for name, given in others.items():
            if given:
                yield Problem("CFG-048", f"{name} has no effect without --recompute-granularity full.", remedy)


def _counts_are_of_blocks(request: Request) -> Iterator[Problem]:
    """CFG-048: groups have blocks, and stages have as many as are counted."""
    flags, largest = request.flags, max(request.blocks_of_stages)
    layers, skipped = flags.recompute_num_layers, flags.recompute_num_layers_skip_core_attention
    if flags.recompute_method == "uniform" and layers == 0:
        yield Problem("CFG-048", "--recompute-num-layers 0 makes groups without blocks.", "Use 1 or more.")
    if layers is not None and layers > largest:
        yield Problem(
            "CFG-048",
            f"--recompute-num-layers is {layers}, and no stage has more than {largest} blocks.",
            f"Use at most {largest}.",
        )
    elif flags.recompute_method == "block" and flags.recompute_skip_core_attention:
        left = largest - (largest if layers is None else layers)
        if left == 0:
            found = (
                f"--recompute-num-layers {layers}" if layers is not None else "The default of --recompute-num-layers"
            )
            yield Problem(
                "CFG-048",
                f"{found} recomputes all {largest} blocks of a stage whole, which leaves none for {_SKIP}.",
                "Use a smaller --recompute-num-layers (0: all blocks keep their attention), or remove the flag.",
            )
        elif skipped is not None and skipped > left:
            yield Problem(
                "CFG-048",
                f"{_LAYERS} is {skipped}; after --recompute-num-layers {layers} no stage has more than {left} blocks.",
                f"Use at most {left}.",
            )


def _kept_attention_is_asked_for(request: Request) -> Iterator[Problem]:
    """CFG-048: what is kept, of how many blocks and where it waits is about blocks that keep their attention."""
    flags = request.flags
    if flags.recompute_granularity == "full" and flags.recompute_num_layers_skip_core_attention is not None:
        if not flags.recompute_skip_core_attention:
            yield Problem("CFG-048", f"{_LAYERS} has no effect without {_SKIP}.", "Add that, or remove it.")
        elif flags.recompute_method == "uniform":
            yield Problem(
                "CFG-048",
                f"{_LAYERS} has no effect with --recompute-method uniform, where all blocks keep their attention.",
                "Remove it, or use --recompute-method block.",
            )
    plan = recompute_of(flags, request.model)
    if plan is not None and plan.keep_layers != 0:
        return
    remedy = f"Add --recompute-granularity selective, or {_SKIP} to full recomputation; or remove it."
    if flags.recompute_keep is not None:
        yield Problem("CFG-048", "--recompute-keep has no effect where no block keeps its attention.", remedy)
    if request.model.predictor.attention_async_offload:
        yield Problem(
            "CFG-048",
            f'"attention_async_offload" in {flags.mm_model} has no effect where no block keeps its attention.',
            remedy,
        )


RECOMPUTE_RULES = (_granularity_has_its_method, _counts_are_of_blocks, _kept_attention_is_asked_for)
