"""Rules about packs: samples of any shapes in sequences of a token budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mm.config.run.training import TrainingRun
from mm.config.unread import is_given
from mm.errors import Problem


def _packs_are_the_micro_batches(run: TrainingRun) -> Iterator[Problem]:
    """CFG-206: what cannot be beside packs."""
    budget, words = run.data.pack_tokens, run.origins
    if budget is None:
        return
    pack, size = words["data.pack_tokens"].with_value(budget), run.data.micro_batch_size
    if size != 1:
        found = f"{words['data.micro_batch_size'].with_value(size)} has no effect with {pack}"
        remedy = f"Set it to 1; {words['data.global_batch_size'].name} says how many samples a step has."
        yield Problem("CFG-206", f"{found}: a micro-batch is one sequence, of as many samples as fit.", remedy)
    if any(share.micro_batch_size not in (None, 1) for share in run.data.mixture.shares):
        found = f"micro_batch_size in {words['data.mixture'].place()} has no effect with {pack}"
        yield Problem("CFG-206", f"{found}: a micro-batch is one sequence, of as many samples as fit.", "Remove it.")
    if run.memory.compile_blocks:
        compiled = words["memory.compile_blocks"].with_value(True)
        found = f"{compiled} compiles a block for few lengths, and with {pack} nearly every sequence has others."
        yield Problem("CFG-206", found, "Remove one of them.")
    if not run.data.shuffle and run.data.on_bad_sample != "fail":
        skip, shuffle = words["data.on_bad_sample"].with_value(run.data.on_bad_sample), words["data.shuffle"]
        found = f"{skip} replaces a sample by the next one, which with {shuffle.with_value(False)} may be longer"
        remedy = f"Remove it, or set {shuffle.name} to true: the next one is then of the same shape."
        yield Problem("CFG-206", f"{found} than its sequence has room for ({pack}).", remedy)


def _clips_fit_into_packs(run: TrainingRun) -> Iterator[Problem]:
    """CFG-207: a clip that no sequence takes, where all have one size; of others the features tell (DATA-077)."""
    budget, clip, words = run.data.pack_tokens, run.data.features.clip, run.origins
    pixels = run.wan.task.latent_pixels
    size = clip.latent_size(pixels) if budget is not None and clip is not None and is_given(clip) else None
    if budget is None or size is None:
        return
    tokens = run.wan.num_tokens(size)
    if tokens > budget:
        yield Problem(
            "CFG-207",
            f"A clip of {words.whole('data.features')} has {tokens:,} tokens, more than "
            f"{words['data.pack_tokens'].with_value(budget)}.",
            f"Raise it to at least {tokens}.",
        )


PACKING_RULES: tuple[Callable[[TrainingRun], Iterator[Problem]], ...] = (
    _packs_are_the_micro_batches,
    _clips_fit_into_packs,
)
