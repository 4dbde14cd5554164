"""Message across a pipeline boundary: one tensor with the blocks' streams and the embedded conditions.

The conditions travel with the hidden state because only the first stage has the embedders. Rebuilding them on every
stage would need their weights there: 1.6 % of the 14B model a stage, and the sum of their gradients over the stages.
They are I image rows, L text rows and 7 time rows of the model's width for each sample: 1.6 % of the 32,760 token rows
of a 480x832x81 clip, 2.4 % with one image, 3.2 % with two. Everything else is known on every stage: rotary tables come
from the grid, noise, timesteps and targets from the sample (mm.rng).

megatron-core's schedules send one tensor of a known shape, so the parts lie one after the other in rows of the
model's width. Time rows stay fp32: in a bf16 tensor each takes two rows, moved as bytes and never computed with.
The stream of side blocks crosses beside the hidden state, as many rows again; hints never cross.
Shapes: B batch, t tokens of this rank, I image tokens, L text tokens, D model width, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mm.config.model import WanConfig
from mm.parallel.tokens import TokenShare
from mm.wan.layers import Streams
from mm.wan.model import Conditions

TIME_ROWS = 7
"""Six of `time_modulation` and one of `time`."""


@dataclass(frozen=True)
class SequenceLengths:
    """Sizes of a micro-batch: sequences of one sample each, or one sequence of several samples.

    Attributes:
        batch: B sequences; 1 where one has several samples.
        tokens, text_tokens: video and text tokens of each sample in a sequence; with those in front of the video's.
        runs: of tokens with one timestep, of each sample in a sequence; empty where every sample has one.
    """

    batch: int
    tokens: tuple[int, ...]
    text_tokens: tuple[int, ...]
    runs: tuple[int, ...] = ()

    @property
    def num_times(self) -> int:
        """Number of embedded timesteps of the micro-batch."""
        return self.batch * (sum(self.runs) if self.runs else len(self.tokens))


@dataclass(frozen=True)
class BoundaryShape:
    """Layout of one micro-batch's parts in the tensor that crosses.

    Attributes:
        batch: B. times: embedded timesteps. tokens: t, with padding. context_tokens: of a sequence.
        width: D. dtype: of the streams. streams: how many there are.
        rows: R of the tensor; may be more than this micro-batch needs, as all of a step have the same.
    """

    batch: int
    times: int
    tokens: int
    context_tokens: int
    width: int
    dtype: torch.dtype
    streams: int = 1
    rows: int = 0

    @classmethod
    def of(cls, lengths: SequenceLengths, share: TokenShare, wan: WanConfig, dtype: torch.dtype) -> BoundaryShape:
        """The shape that a micro-batch needs.

        Args:
            lengths: of the micro-batch. share: of the sending rank. wan: of the model. dtype: of the hidden state.
        """
        context_tokens = wan.image_tokens * len(lengths.tokens) + sum(lengths.text_tokens)
        tokens = share.places(lengths.tokens)
        streams = 2 if wan.side_blocks else 1
        shape = cls(lengths.batch, lengths.num_times, tokens, context_tokens, wan.hidden_size, dtype, streams)
        return replace(shape, rows=sum(shape._sizes()))

    def _sizes(self) -> list[int]:
        """Rows of the streams, context and times."""
        times = self.times * TIME_ROWS * (4 // self.dtype.itemsize)
        return [*[self.batch * self.tokens] * self.streams, self.batch * self.context_tokens, times]

    def join(self, time_modulation: Tensor, time: Tensor, context: Tensor, *streams: Tensor) -> Tensor:
        """Modulation, time, context (`mm.wan.model.Conditions`) and the streams as one [R, 1, D] of the dtype."""
        times = torch.cat((time_modulation.float(), time.float().unsqueeze(1)), dim=1).view(self.dtype)
        parts = [part.reshape(-1, 1, self.width) for part in (*streams, context, times)]
        missing = self.rows - sum(len(part) for part in parts)
        if missing:
            parts.append(context.new_zeros(missing, 1, self.width))
        return torch.cat(parts)

    def split(self, crossing: Tensor) -> tuple[Tensor, ...]:
        """The inverse of `join`; all but the time rows are views."""
        sizes = self._sizes()
        *hidden, times = crossing.squeeze(1)[: sum(sizes)].split(sizes)
        *streams, context = (part.reshape(self.batch, -1, self.width) for part in hidden)
        fp32 = times.reshape(self.times, TIME_ROWS, -1).view(torch.float32)
        return fp32[:, :6], fp32[:, 6], context, *streams


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shape: BoundaryShape, *parts: Tensor) -> Tensor:
        ctx.shape = shape
        return shape.join(*parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, *ctx.shape.split(grads[0])


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shape: BoundaryShape, crossing: Tensor) -> tuple[Tensor, ...]:
        ctx.shape = shape
        return shape.split(crossing)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, ctx.shape.join(*grads)


def send_side(shape: BoundaryShape, streams: Streams, conditions: Conditions) -> Tensor:
    """Tensor that a stage hands to the next one, [R, 1, D]. Its gradient comes back in the same form."""
    out: Tensor = _Join.apply(shape, conditions.time_modulation, conditions.time, conditions.context, *streams)
    return out


def receive_side(shape: BoundaryShape, crossing: Tensor) -> tuple[Streams, Conditions]:
    """Streams [B, t, D] and conditions out of what the stage before sent."""
    time_modulation, time, context, *streams = _Split.apply(shape, crossing)
    return tuple(streams), Conditions(time, time_modulation, context)
