"""The part of a model that one virtual pipeline stage holds, in the form megatron-core's schedules expect."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mm.parallel.boundary import BoundaryShape, SequenceLengths, receive_side, send_side
from mm.parallel.tokens import TokenShare, counts_of
from mm.wan.block import WanBlock
from mm.wan.inputs import Inputs
from mm.wan.model import WanModel
from mm.wan.rope import Grid, Positions

_EMBEDDERS = ("patch_embedding", "text_embedding", "time_embedding", "time_projection")
"""Of every model; those of its task's features are on the first stage, too."""


def cut(model: WanModel, blocks: range, *, first: bool, last: bool) -> WanModel:
    """Delete from `model` what a stage with these blocks does not hold; what stays keeps its name."""
    for name in list(model.blocks):
        if int(name) not in blocks:
            del model.blocks[name]
    for block, number in model.config.side_blocks.items():
        if block not in blocks:
            del model.vace_blocks[str(number)]
    for name in (*_EMBEDDERS, *model.config.task.modules) if not first else ():
        delattr(model, name)
    if not last:
        del model.head
    return model


class WanStage(MegatronModule):
    """One virtual stage: embeds on the first, runs its blocks, predicts on the last.

    Attributes:
        model: its part of the model. first, last: whether it begins and ends the model.
        tokens: this rank's share of the tokens. dtype: of the hidden state.
        boundary_rows: rows of the tensors that cross in this step, set by the schedule's caller.
    """

    def __init__(
        self,
        config: TransformerConfig,
        model: WanModel,
        *,
        first: bool,
        last: bool,
        tokens: TokenShare,
        dtype: torch.dtype,
        vp_stage: int | None,
    ) -> None:
        super().__init__(config)
        self.model = model
        self.first, self.last = first, last
        self.tokens = tokens
        self.dtype = dtype
        self.boundary_rows = 0
        self.vp_stage = vp_stage
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self._received: Tensor | None = None

    @property
    def blocks(self) -> list[WanBlock]:
        """The blocks and side blocks it holds, in the order in which they run."""
        return self.model.blocks_in_order()

    def set_input_tensor(self, tensors: Tensor | Sequence[Tensor | None] | None) -> None:
        """Take what the previous stage sent; the schedule calls it before every forward."""
        self._received = tensors if isinstance(tensors, Tensor) or tensors is None else tensors[0]

    def forward(self, inputs: Inputs) -> Tensor:
        """Run this stage for one micro-batch.

        Args:
            inputs: as `mm.wan.model.WanModel.forward` takes them, on the first stage. The others need the shapes of
                latents and text, and which features there are, wherever these are.

        Returns:
            The velocity of this rank's tokens, [B, t, pt*ph*pw*C] fp32, on the last stage; on the others what the
            next one receives (`mm.parallel.boundary`).
        """
        model = self.model
        grids = [model.token_grid(sample) for sample in inputs.samples]
        shape = self._boundary_shape(inputs, grids)
        if self.first:
            inputs.check(model.config)
            streams = model.embed_tokens(inputs, self.tokens.runs([math.prod(grid) for grid in grids]))
            conditions = model.embed_conditions(inputs)
        elif self._received is None:
            raise AssertionError("a stage that is not the first one received nothing")
        else:
            streams, conditions = receive_side(shape, self._received)
        positions = self._positions(inputs, grids, streams[0].device)
        streams = model.run_blocks(streams, conditions, positions, inputs)
        if self.last:
            velocity: Tensor = model.head(streams[0], conditions.time, positions.runs)
            return velocity
        return send_side(shape, streams, conditions)

    def _positions(self, inputs: Inputs, grids: Sequence[Grid], device: torch.device) -> Positions:
        share, lengths = self.tokens, [math.prod(grid) for grid in grids]
        cos, sin = zip(*(self.model.rotary.tables(grid, device) for grid in grids), strict=True)
        queries = counts_of(share.chunk_runs(lengths), [[length] for length in lengths])
        packed = self.model.packed_tokens(inputs, queries)
        runs = tuple(counts_of(share.runs(lengths), self.model.runs_of_time(inputs)))
        tables = share.take_chunk(cos, dim=0), share.take_chunk(sin, dim=0)
        return Positions(*tables, share.segments(lengths), packed, runs if len(runs) > 1 else None)

    def _boundary_shape(self, inputs: Inputs, grids: Sequence[Grid]) -> BoundaryShape:
        tokens = tuple(math.prod(grid) for grid in grids)
        text_tokens = tuple(sample.text.shape[1] for sample in inputs.samples)
        runs = tuple(max(len(sample.runs), 1) for sample in inputs.samples)
        lengths = SequenceLengths(len(inputs.samples[0].latents), tokens, text_tokens, runs)
        shape = BoundaryShape.of(lengths, self.tokens, self.model.config, self.dtype)
        return replace(shape, rows=self.boundary_rows)
