"""Message across a pipeline boundary: one tensor with the hidden state and the embedded conditions.

The conditions travel with the hidden state because only the first stage has the embedders. Rebuilding them on every
stage would need their weights there: 1.6 % of the 14B model a stage, and the sum of their gradients over the stages.
They are I image rows, L text rows and 7 time rows of the model's width for each sample: 1.6 % of the 32,760 token rows
of a 480x832x81 clip, 2.4 % with one image, 3.2 % with two. Everything else is known on every stage: rotary tables come
from the grid, noise, timesteps and targets from the sample (mm.rng).

megatron-core's schedules send one tensor of a known shape, so the parts lie one after the other in rows of the
model's width. Time rows stay fp32: in a bf16 tensor each takes two rows, moved as bytes and never computed with.
Shapes: B batch, t tokens of this rank, I image tokens, L text tokens, D model width, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mm.config.model import WanConfig
from mm.parallel.tokens import TokenShare
from mm.wan.model import Conditions

TIME_ROWS = 7
"""Six of `time_modulation` and one of `time`."""


@dataclass(frozen=True)
class SequenceLengths:
    """Sizes of a micro-batch: sequences of one sample each, or one sequence of several samples.

    Attributes:
        batch: B sequences; 1 where one has several samples.
        tokens, text_tokens: video and text tokens of each sample in a sequence.
    """

    batch: int
    tokens: tuple[int, ...]
    text_tokens: tuple[int, ...]

    @property
    def num_samples(self) -> int:
        """Number of samples of the micro-batch."""
        return self.batch * len(self.tokens)


@dataclass(frozen=True)
class BoundaryShape:
    """Layout of one micro-batch's parts in the tensor that crosses.

    Attributes:
        batch: B. samples: B, or those that share a sequence. tokens: t, with padding. context_tokens: of a sequence.
        width: D. dtype: of the hidden state.
        rows: R of the tensor; may be more than this micro-batch needs, as all of a step have the same.
    """

    batch: int
    samples: int
    tokens: int
    context_tokens: int
    width: int
    dtype: torch.dtype
    rows: int = 0

    @classmethod
    def of(cls, lengths: SequenceLengths, share: TokenShare, wan: WanConfig, dtype: torch.dtype) -> BoundaryShape:
        """The shape that a micro-batch needs.

        Args:
            lengths: of the micro-batch. share: of the sending rank. wan: of the model. dtype: of the hidden state.
        """
        context_tokens = wan.image_tokens * len(lengths.tokens) + sum(lengths.text_tokens)
        tokens = share.places(lengths.tokens)
        shape = cls(lengths.batch, lengths.num_samples, tokens, context_tokens, wan.hidden_size, dtype)
        return replace(shape, rows=sum(shape._sizes()))

    def _sizes(self) -> list[int]:
        """Rows of hidden state, context and times."""
        times = self.samples * TIME_ROWS * (4 // self.dtype.itemsize)
        return [self.batch * self.tokens, self.batch * self.context_tokens, times]

    def join(self, hidden: Tensor, context: Tensor, time_modulation: Tensor, time: Tensor) -> Tensor:
        """Hidden state, context, modulation and time (`mm.wan.model.Conditions`) as one [R, 1, D] of the dtype."""
        times = torch.cat((time_modulation.float(), time.float().unsqueeze(1)), dim=1).view(self.dtype)
        parts = [part.reshape(-1, 1, self.width) for part in (hidden, context, times)]
        missing = self.rows - sum(len(part) for part in parts)
        if missing:
            parts.append(hidden.new_zeros(missing, 1, self.width))
        return torch.cat(parts)

    def split(self, crossing: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The inverse of `join`; all but the time rows are views."""
        sizes = self._sizes()
        hidden, context, times = crossing.squeeze(1)[: sum(sizes)].split(sizes)
        hidden, context = (part.reshape(self.batch, -1, self.width) for part in (hidden, context))
        fp32 = times.reshape(self.samples, TIME_ROWS, -1).view(torch.float32)
        return hidden, context, fp32[:, :6], fp32[:, 6]


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, shape: BoundaryShape, hidden: Tensor, context: Tensor, time_modulation: Tensor, time: Tensor
    ) -> Tensor:
        ctx.shape = shape
        return shape.join(hidden, context, time_modulation, time)

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


def send_side(shape: BoundaryShape, hidden: Tensor, conditions: Conditions) -> Tensor:
    """Tensor that a stage hands to the next one, [R, 1, D]. Its gradient comes back in the same form."""
    out: Tensor = _Join.apply(shape, hidden, conditions.context, conditions.time_modulation, conditions.time)
    return out


def receive_side(shape: BoundaryShape, crossing: Tensor) -> tuple[Tensor, Conditions]:
    """Hidden state [B, t, D] and conditions out of what the stage before sent."""
    hidden, context, time_modulation, time = _Split.apply(shape, crossing)
    return hidden, Conditions(time, time_modulation, context)
