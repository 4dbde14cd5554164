"""The part of a model that one virtual pipeline stage holds, in the form megatron-core's schedules expect."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mm.parallel.boundary import BoundaryShape, receive_side, send_side
from mm.parallel.tokens import TokenShare
from mm.wan.block import WanBlock
from mm.wan.inputs import ModelInputs
from mm.wan.model import WanModel
from mm.wan.patches import patchify
from mm.wan.rope import Grid, Positions

_EMBEDDERS = ("patch_embedding", "text_embedding", "time_embedding", "time_projection")
"""Of every model; those of its task's features are on the first stage, too."""


def cut(model: WanModel, blocks: range, *, first: bool, last: bool) -> WanModel:
    """Delete from `model` what a stage with these blocks does not hold; what stays keeps its name."""
    for name in list(model.blocks):
        if int(name) not in blocks:
            del model.blocks[name]
    for name in (*_EMBEDDERS, *model.config.task.modules) if not first else ():
        delattr(model, name)
    if not last:
        del model.head
    return model


class WanStage(MegatronModule):
    """One virtual stage: embeds on the first, runs its blocks, predicts on the last.

    Attributes:
        model: its part of the model. first, last: whether it begins and ends the model.
        tokens: this rank's share of a sample's tokens. dtype: of the hidden state.
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
        """The blocks it holds, in order."""
        return [block for block in self.model.blocks.values() if isinstance(block, WanBlock)]

    def set_input_tensor(self, tensors: Tensor | Sequence[Tensor | None] | None) -> None:
        """Take what the previous stage sent; the schedule calls it before every forward."""
        self._received = tensors if isinstance(tensors, Tensor) or tensors is None else tensors[0]

    def forward(self, inputs: ModelInputs) -> Tensor:
        """Run this stage for one micro-batch.

        Args:
            inputs: as `mm.wan.model.WanModel.forward` takes them, on the first stage. The others only need the shapes
                of latents and text, and no features.

        Returns:
            The velocity of this rank's tokens, [B, t, pt*ph*pw*C] fp32, on the last stage; on the others what the
            next one receives (`mm.parallel.boundary`).
        """
        model = self.model
        grid = model.token_grid(inputs.latents)
        shape = self._boundary_shape(inputs, math.prod(grid))
        if self.first:
            inputs.check(model.config)
            patches = patchify(inputs.with_channels(model.config), model.config.patch_size)
            hidden = model.patch_embedding(self.tokens.take(patches, dim=1))
            conditions = model.embed_conditions(inputs)
        elif self._received is None:
            raise AssertionError("a stage that is not the first one received nothing")
        else:
            hidden, conditions = receive_side(shape, self._received)
        hidden = model.run_blocks(hidden, conditions, self._positions(grid, hidden.device))
        if self.last:
            velocity: Tensor = model.head(hidden, conditions.time)
            return velocity
        return send_side(shape, hidden, conditions)

    def _positions(self, grid: Grid, device: torch.device) -> Positions:
        cos, sin = self.model.rotary.tables(grid, device)
        return Positions(
            self.tokens.take_chunk(cos, dim=0), self.tokens.take_chunk(sin, dim=0), num_tokens=math.prod(grid)
        )

    def _boundary_shape(self, inputs: ModelInputs, num_tokens: int) -> BoundaryShape:
        return BoundaryShape(
            batch=inputs.latents.shape[0],
            tokens=self.tokens.width(num_tokens),
            context_tokens=self.model.config.image_tokens + inputs.text.shape[1],
            width=self.model.config.hidden_size,
            dtype=self.dtype,
            rows=self.boundary_rows,
        )
