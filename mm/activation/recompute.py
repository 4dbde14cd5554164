"""Runs the blocks of a stage so that some of them are computed again in backward.

A recomputed group keeps its input and nothing else; torch's checkpoint runs it a second time when backward needs what
it made. A group that keeps attention also keeps the output of self attention and its log-sum-exp, and hands them out
in the second run instead of computing them: attention runs forward once. What is kept may wait in host memory
(`mm.activation.offload`).

The second run does the same operations in the same order, so losses and gradients keep every bit. Blocks have no
dropout and draw no random numbers, so no generator's state is kept.

Sources: Chen et al. 2016 (arXiv 1604.06174), section 4; Korthikanti et al. 2022 (arXiv 2205.05198), section 5.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mm.activation.offload import Offloader, OffloadPass
from mm.config.recompute import Kept, Recompute
from mm.ops.attention.api import ActivationPolicy, keep_nothing
from mm.wan.layers import BlockLayer, BlockRunner, Streams, run_in_order
from mm.wan.rope import Positions

NAMES: dict[Kept, frozenset[str]] = {"O": frozenset({"O"}), "q,k,v,O": frozenset({"q,k,v", "O"})}
"""What to keep, as the names that attention asks for (`mm.ops.attention.api.ActivationPolicy`)."""


def block_runner(
    recompute: Recompute | None,
    offloader: Offloader | None = None,
    model_code: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> BlockRunner:
    """The `Parts.run_blocks` of a plan.

    Args:
        recompute: the plan; None keeps everything.
        offloader: where a plan with `offload` keeps things; this rank's, for all its stages.
        model_code: the backend's; entered around blocks, whose second run is inside megatron-core's backward.
    """
    if recompute is None:
        return run_in_order

    def run_group(
        group: Sequence[BlockLayer],
        time_modulation: Tensor,
        context: Tensor,
        positions: Positions,
        keep: ActivationPolicy,
        *streams: Tensor,
    ) -> Streams:
        # Torch's checkpoint sees tensors among its arguments, and none inside of them.
        with model_code():
            return run_in_order(group, streams, time_modulation, context, positions, keep)

    def run(
        blocks: Sequence[BlockLayer], streams: Streams, time_modulation: Tensor, context: Tensor, positions: Positions
    ) -> Streams:
        groups = list(recompute.groups(len(blocks)))
        first = _first_with_backward(blocks, *streams, time_modulation, context)
        groups = [(indices, mode if indices.stop > first else "none") for indices, mode in groups]
        keeping = sum(mode == "keep attention" for _, mode in groups)
        layers = iter(range(keeping))
        offload = None if offloader is None or not torch.is_grad_enabled() else offloader.begin(keeping)
        for indices, mode in groups:
            group = blocks[indices.start : indices.stop]
            arguments = (group, time_modulation, context, positions)
            if mode == "none":
                streams = run_in_order(group, streams, time_modulation, context, positions)
            elif mode == "full":
                streams = _checkpoint(run_group, *arguments, keep_nothing, *streams)
            else:
                policy = NAMES[recompute.kept], offload, next(layers)
                streams = _keep_attention(run_group, arguments, streams, *policy)
        return streams

    return run


def _first_with_backward(blocks: Sequence[BlockLayer], *inputs: Tensor) -> int:
    """The first block that backward reaches; those before it keep nothing, and would never give it back."""
    if any(value.requires_grad for value in inputs):
        return 0
    trained = (index for index, block in enumerate(blocks) if any(p.requires_grad for p in block.parameters()))
    return next(trained, len(blocks))


def _checkpoint(
    run_group: Callable[..., Streams], *arguments: Any, contexts: Callable[[], tuple[Any, Any]] | None = None
) -> Streams:
    more: dict[str, Any] = {} if contexts is None else {"context_fn": contexts}
    out: Streams = checkpoint(run_group, *arguments, use_reentrant=False, preserve_rng_state=False, **more)
    return out


def _keep_attention(
    run_group: Callable[..., Streams],
    arguments: tuple[Any, ...],
    streams: Streams,
    names: frozenset[str],
    offload: OffloadPass | None,
    layer: int,
) -> Streams:
    """Run a group that keeps attention, and its input, on the device or in the layer of an offload pass."""
    if offload is None:
        kept = _Kept(names, put=lambda tensor: tensor, take=lambda tensor: tensor)
        return _checkpoint(run_group, *arguments, kept, *streams, contexts=kept.contexts)
    kept = _Kept(names, put=lambda tensor: offload.put(layer, tensor), take=lambda place: offload.take(layer, place))
    # What a stage receives holds the conditions too, and the schedule keeps it for its gradient: offload frees nothing.
    whole = [stream for stream in streams if stream.untyped_storage().nbytes() == stream.nbytes]
    own = {_storage_of(stream) for stream in whole}  # numbers: autograd keeps these hooks, and what they refer to

    def pack(saved: Tensor) -> Any:
        return kept.put(saved.detach()) if _storage_of(saved) in own else saved

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else kept.take(packed)

    # Torch's checkpoint saves its arguments as autograd saves tensors.
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        out = _checkpoint(run_group, *arguments, kept, *streams, contexts=kept.contexts)
    offload.done(layer)
    return out


def _storage_of(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


class _Kept:
    """An `ActivationPolicy` that computes and keeps in the first run of a group, and hands out in the second.

    Args:
        names: what it keeps. put, take: keep a tensor, and give it back for what `put` returned.
    """

    def __init__(self, names: frozenset[str], put: Callable[[Tensor], Any], take: Callable[[Any], Tensor]) -> None:
        self._names = names
        self.put, self.take = put, take
        self._kept: deque[tuple[Any, ...]] = deque()  # in the order of the blocks
        self._second = False

    def __call__(self, name: str, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        if name not in self._names:
            return compute()
        if self._second:
            return tuple(self.take(place) for place in self._kept.popleft())
        results = compute()
        self._kept.append(tuple(self.put(tensor.detach()) for tensor in results))
        return results

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Torch's checkpoint enters the first in the first run and the second in the second."""
        return contextlib.nullcontext(), self._second_run()

    @contextlib.contextmanager
    def _second_run(self) -> Iterator[None]:
        self._second = True
        yield
