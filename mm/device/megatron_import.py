"""Imports megatron-core without the compiler that its decorators ask for.

megatron-core puts `torch.compile` around some thirty functions while it is imported, which imports all of dynamo and
inductor. No path here calls one of these functions, so each is compiled when it is first called, if ever.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from mm.device.megatron_on_cpu import replaced


def import_megatron() -> None:
    """Import megatron-core; what of it is imported later compiles at the first call, too."""
    with replaced(torch, "compile", _compile_at_first_call):
        import megatron.core  # noqa: F401


def _compile_at_first_call(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """`torch.compile` as a decorator, with the compiling put off."""
    if function is None:
        return functools.partial(_compile_at_first_call, **options)
    compiled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not compiled:
            compiled.append(torch.compile(function, **options))
        return compiled[0](*args, **kwargs)

    return call
