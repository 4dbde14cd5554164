"""Prefixes and infixes that tools and wrappers put into the names of weights.

`model.diffusion_model.`, `pipe.dit.` and the like say which part of a program a model is; `ema.` that it is the average
of a training. torch's wrappers add a part of their own: `module` of data parallelism, `_orig_mod` of torch.compile,
`_fsdp_wrapped_module` and `_checkpoint_wrapped_module` wherever a submodule is wrapped. They stand in any order.
"""

from __future__ import annotations

from collections.abc import Iterable

WRAPPERS = (
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_zero3_wrapped_module",
    "_forward_module",
)
"""Parts of names that are wrappers, which no name of a model contains."""
HOLDERS = (
    "model.diffusion_model.",
    "diffusion_model.",
    "base_model.model.",
    "pipe.dit.",
    "transformer.",
    "predictor.",
    "ema_model.",
    "model.",
    "dit.",
    "ema.",
)
"""What ComfyUI, PEFT, DiffSynth, diffusers, MindSpeed and others put before every name; longest first where one begins
another."""
PREFIXES = (*HOLDERS, *(f"{wrapper}." for wrapper in WRAPPERS))


def common_prefix(names: Iterable[str]) -> str:
    """Beginning that all names share, made of `PREFIXES` in any order; often an empty text."""
    rest, prefix = list(names), ""
    while rest and (found := next((p for p in PREFIXES if all(name.startswith(p) for name in rest)), "")):
        prefix += found
        rest = [name.removeprefix(found) for name in rest]
    return prefix


def unwrapped(name: str) -> str:
    """A name without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
