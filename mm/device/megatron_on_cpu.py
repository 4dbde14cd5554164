"""Runs megatron-core's own DDP, distributed optimizer and schedules on the CPU.

megatron-core 0.16 says "cuda" in about thirty places: `device="cuda"` in factories, `torch.cuda.current_device()`,
streams, RNG states, comparisons of `param.type()` with CUDA type names. While `MegatronOnCpu.inside()` is entered,
those mean the CPU. Nothing of megatron-core is edited or replaced, so what is proven here is the code that runs on a
cluster. A function mode costs time in every torch call, therefore the model's own forward runs under `outside()`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode

_CPU = torch.device("cpu")
_TYPE_NAMES = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
}


class MegatronOnCpu:
    """The adapter of one process; `inside()` and `outside()` nest."""

    def __init__(self) -> None:
        self._entered: list[_CudaMeansCpu] = []

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """CUDA means CPU for everything called in this block."""
        if self._entered:  # already inside: an outer block is responsible for leaving
            yield
            return
        with contextlib.ExitStack() as stack:
            for target, name, value in _replacements():
                stack.enter_context(replaced(target, name, value))
            mode = _CudaMeansCpu()
            stack.enter_context(mode)
            self._entered.append(mode)
            try:
                yield
            finally:
                self._entered.pop()

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """Plain torch for a block inside `inside()`: no function mode, so no cost."""
        # torch takes the mode off by itself for what it runs below the mode's own handler, as some backward passes.
        if not self._entered or _get_current_function_mode() is not self._entered[-1]:
            yield
            return
        mode = self._entered.pop()
        mode.__exit__(None, None, None)
        try:
            yield
        finally:
            mode.__enter__()
            self._entered.append(mode)


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites the `device` argument and the few tensor methods whose answer names the device."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            name = func(*args)
            return _TYPE_NAMES.get(name, name)
        if func is torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        if "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": _CPU}
        if func is torch.Tensor.to:
            args = tuple(_CPU if _names_cuda(arg) else arg for arg in args)
        return func(*args, **kwargs)


def _names_cuda(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.startswith("cuda")


class _NoStream:
    """A stream on a device that runs everything in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        del args, kwargs

    def wait_stream(self, other: Any) -> None:
        """Everything queued before has already run."""

    def wait_event(self, event: Any) -> None:
        """Everything queued before has already run."""

    def synchronize(self) -> None:
        """Everything queued before has already run."""


class _Works:
    """The collectives started inside one coalescing manager."""

    def __init__(self) -> None:
        self.started: list[Any] = []

    def recording(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        """`collective`, with the handle of every asynchronous call kept."""

        def call(*args: Any, **kwargs: Any) -> Any:
            work = collective(*args, **kwargs)
            if work is not None:
                self.started.append(work)
            return work

        return call

    def wait(self) -> None:
        """Wait for all of them."""
        for work in self.started:
            work.wait()


@contextlib.contextmanager
def _coalescing_on_gloo(*args: Any, **kwargs: Any) -> Iterator[_Works]:
    """gloo cannot coalesce: each collective inside starts at once, and waiting for the manager waits for all."""
    del args, kwargs
    from megatron.core.distributed import param_and_grad_buffer as buffers

    works = _Works()
    with contextlib.ExitStack() as stack:
        for target, name in (
            (buffers, "dist_all_gather_func"),
            (buffers, "dist_reduce_scatter_func"),
            (torch.distributed, "all_reduce"),
        ):
            stack.enter_context(replaced(target, name, works.recording(getattr(target, name))))
        yield works


_ABSENT = object()


@contextlib.contextmanager
def replaced(target: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute for the length of a block."""
    before = getattr(target, name, _ABSENT)
    setattr(target, name, value)
    try:
        yield
    finally:
        if before is _ABSENT:
            delattr(target, name)
        else:
            setattr(target, name, before)


def _replacements() -> list[tuple[Any, str, Any]]:
    """(object, attribute, stand-in) for what megatron-core reads outside torch's function dispatch."""
    from megatron.core.distributed import param_and_grad_buffer as buffers
    from megatron.core.tensor_parallel import random as megatron_random

    return [
        (torch.cuda, "current_device", lambda: _CPU),
        (torch.cuda, "synchronize", lambda *args: None),
        (torch.cuda, "empty_cache", lambda: None),
        (torch.cuda, "Stream", _NoStream),
        (torch.cuda, "current_stream", _NoStream),
        (torch.cuda, "default_stream", _NoStream),
        (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
        (torch.cuda, "get_rng_state", lambda *args, **kwargs: torch.get_rng_state()),
        (torch.cuda, "set_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state)),
        (megatron_random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state()),
        (megatron_random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state)),
        (torch.distributed, "_coalescing_manager", _coalescing_on_gloo),
        (buffers, "_coalescing_manager", _coalescing_on_gloo),
    ]
