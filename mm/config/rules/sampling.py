"""Rules about how the velocity is integrated, which `mm generate` and the Python API share."""

from __future__ import annotations

from collections.abc import Iterator

from mm.config.data import TEMPORAL_STRIDE
from mm.config.run.generation import GenerationRun
from mm.errors import Problem

FEWEST_STEPS = 3
"""Steps of which one can be left out: the first and the last of a transformer are always computed."""


def tea_cache_problems(threshold: float, num_steps: int, name: str) -> Iterator[Problem]:
    """CFG-321: a threshold above 0, and steps that can be left out.

    Args:
        threshold: of TeaCache. num_steps: that are taken of a clip. name: what to call the threshold.
    """
    if not threshold > 0:
        yield Problem("CFG-321", f"{name} is {threshold}.", "Give a number above 0; 0.05 is small, 0.3 large.")
    if num_steps < FEWEST_STEPS:
        found = f"{name} has no effect on clips of {num_steps} steps: the first and the last are always computed."
        yield Problem("CFG-321", found, "Remove it, or take more steps.")


def window_problems(size: int, stride: int, num_frames: int, name: str) -> Iterator[Problem]:
    """CFG-322 and CFG-323: windows without gaps between them, smaller than the clip.

    Args:
        size, stride: latent frames of a window, and between the beginnings of two. num_frames: of the clip, in pixels.
        name: what to call the windows.
    """
    latent_frames = (num_frames - 1) // TEMPORAL_STRIDE + 1
    if not 1 <= stride <= size:
        found = f"{name}: windows of {size} latent frames every {stride} leave gaps."
        yield Problem("CFG-322", found, "Give a stride from 1 to the window's size.")
    elif size >= latent_frames:
        found = f"{name}: a window of {size} latent frames is the whole clip, which has {latent_frames}."
        yield Problem("CFG-323", found, f"Leave windows out, or give fewer than {latent_frames} frames.")


def _tea_cache_is_whole(run: GenerationRun) -> Iterator[Problem]:
    """CFG-320."""
    yield from _both(run, "CFG-320", "tea_cache_threshold", "tea_cache_model")


def _tea_cache_skips(run: GenerationRun) -> Iterator[Problem]:
    """CFG-321."""
    sampling = run.sampling
    if sampling.tea_cache is not None:
        num_steps = run.inputs.num_evaluated(sampling.steps)
        name = run.origins["sampling.tea_cache_threshold"].place()
        yield from tea_cache_problems(sampling.tea_cache[0], num_steps, name)


def _windows_are_whole(run: GenerationRun) -> Iterator[Problem]:
    """CFG-322: a size and a stride, or neither."""
    yield from _both(run, "CFG-322", "window_size", "window_stride")


def _windows_fit_the_clip(run: GenerationRun) -> Iterator[Problem]:
    """CFG-322 and CFG-323."""
    if run.sampling.windows is not None:
        name = run.origins["sampling.window_size"].place()
        yield from window_problems(*run.sampling.windows, run.output.num_frames, name)


def _sage_has_a_kernel(run: GenerationRun) -> Iterator[Problem]:
    """CFG-325: 16 bits, CUDA, and whole sequences, which the ranks of a ring do not have."""
    if run.sampling.attention != "sage":
        return
    words, ring = run.origins, run.ulysses is not None and run.cp > run.ulysses
    place = words["sampling.attention"].place()
    against = {
        "model.precision": run.dtype if run.dtype == "fp32" else None,
        "generation.device": run.generation.device if run.generation.device in ("cpu", "npu") else None,
        "parallel.context_algorithm": run.parallel.context_algorithm if ring else None,
    }
    for path, value in against.items():
        if value is not None:
            found = f"{place} asks for SageAttention, which does not go with {words[path].with_value(value)}."
            yield Problem("CFG-325", found, "Use bf16 or fp16 on CUDA and no ring, or exact attention.")


def _both(run: GenerationRun, error: str, *names: str) -> Iterator[Problem]:
    """A problem where one of two values of sampling is given without the other."""
    given = [name for name in names if getattr(run.sampling, name) is not None]
    missing = [name for name in names if name not in given]
    if given and missing:
        there, other = (run.origins[f"sampling.{one[0]}"] for one in (given, missing))
        yield Problem(error, f"{there.place()} is given without {other.name}.", f"Give {other.name} too, or neither.")


SAMPLING_RULES = (_tea_cache_is_whole, _tea_cache_skips, _windows_are_whole, _windows_fit_the_clip, _sage_has_a_kernel)
