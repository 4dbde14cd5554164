"""The Wan2.1 transformer on one device, for every task that is declared (`mm.config.tasks`).

`WanModel.forward` cuts latents into patches, embeds them and the conditions, runs the blocks and the head. The steps
are separate methods, so that a pipeline can cut the model between blocks and ranks can share the tokens of a sample.
Shapes: B batch, C latent channels, F H W latent frames, height and width, T video tokens, I image tokens,
L text tokens, D model width, K head width. Dtypes: see `mm.wan.precision`.

Source: Wan technical report (arXiv 2503.20314) section 4.2 and the released weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.config.model import WanConfig
from mm.config.tasks.task import Entry
from mm.ops.elementwise import autograd as ops
from mm.wan.block import WanBlock
from mm.wan.embeddings import EMBEDDINGS
from mm.wan.folder import WeightFolder
from mm.wan.initial import initial_value
from mm.wan.inputs import Inputs, ModelInputs, PackedInputs
from mm.wan.layers import ModuleFactories
from mm.wan.packed import PackedTokens, by_sample, joined
from mm.wan.patches import patchify, token_grid, unpatchify
from mm.wan.precision import keep_fp32
from mm.wan.rope import Grid, Positions, RotaryTables
from mm.wan.sinusoid import timestep_sinusoid

ModelT = TypeVar("ModelT", bound="WanModel")


@dataclass(frozen=True)
class Conditions:
    """Inputs of the blocks and the head besides the hidden state and the positions.

    Attributes:
        time: [B, D] fp32, the embedded timestep, for the head.
        time_modulation: [B, 6, D] fp32, for the blocks.
        context: [B, I + L, D] in the model's dtype, the embedded images, then the embedded text. One tensor, because
            blocks, pipelines and recomputation treat the two alike; cross attention tells them apart.

    Of samples that share a sequence, the first two have a row each, and the context [1, all image tokens + all text
    tokens, D] has them one after the other.
    """

    time: Tensor
    time_modulation: Tensor
    context: Tensor


class PatchEmbedding(nn.Module):
    """A linear on patches, whose weight has the shape that Wan's files give it: that of a convolution."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        # init_weights or a file fills them
        self.weight = nn.Parameter(torch.zeros(config.hidden_size, config.in_dim, *config.patch_size))
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, patches: Tensor) -> Tensor:
        """[B, T, pt*ph*pw*C] in the layout of `mm.wan.patches.patchify` to [B, T, D] in the weight's dtype."""
        channel_last = self.weight.permute(0, 2, 3, 4, 1).flatten(1)
        return F.linear(patches.to(self.weight.dtype), channel_last, self.bias)


class TextEmbedding(nn.Sequential):
    """Linear, GELU, linear, on text features of any dtype."""

    def __init__(self, config: WanConfig, parts: ModuleFactories) -> None:
        width = config.hidden_size
        super().__init__(parts.linear(config.text_dim, width), nn.GELU(approximate="tanh"), parts.linear(width, width))

    def forward(self, text: Tensor) -> Tensor:
        """[B, L, text_dim] to [B, L, D] in the weight's dtype."""
        out: Tensor = super().forward(text.to(next(self.parameters()).dtype))
        return out


class Head(nn.Module):
    """Modulated LayerNorm and a linear from D to the pixels of a patch, all in fp32."""

    def __init__(self, config: WanConfig, parts: ModuleFactories) -> None:
        super().__init__()
        self.eps = config.eps
        self.head = parts.linear_fp32(config.hidden_size, config.out_dim * math.prod(config.patch_size))
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.hidden_size))  # init_weights or a file fills it

    def forward(self, x: Tensor, time: Tensor, packed: PackedTokens | None = None) -> Tensor:
        """x [B, T, D] and time [B, D] to [B, T, pt*ph*pw*C] fp32, in the layout of `mm.wan.patches.patchify`.

        Where samples share a sequence, time has a row for each (`mm.wan.packed`).
        """
        shift, scale = (self.modulation.float() + time.unsqueeze(1)).chunk(2, dim=1)
        norm = partial(ops.layer_norm, eps=self.eps)
        out: Tensor = self.head(by_sample(norm, [x.float()], [1 + scale, shift], packed))
        return out


class WanModel(nn.Module):
    """Predicts the flow velocity (noise - clean latents) of noisy latents.

    A new model's weights are not meaningful until `init_weights`, `load_state_dict` or `from_pretrained` sets them.
    Parameter names are those of the original Wan weights.

    Args:
        config: the shape.
        parts: layers and attention to build from; single-device by default.
    """

    def __init__(self, config: WanConfig, parts: ModuleFactories | None = None) -> None:
        super().__init__()
        parts = parts or ModuleFactories()
        width = config.hidden_size
        self.config = config
        self.runner = parts.run_blocks
        self.rotary = RotaryTables(config.head_dim)
        self.patch_embedding = PatchEmbedding(config)
        self.text_embedding = TextEmbedding(config, parts)
        self.time_embedding = nn.Sequential(
            parts.linear_fp32(config.freq_dim, width), nn.SiLU(), parts.linear_fp32(width, width)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), parts.linear_fp32(width, 6 * width))
        for name in config.task.modules:
            self.add_module(name, EMBEDDINGS[name](config, parts))
        # A dict, not a list: a pipeline stage deletes the blocks it does not hold and the others keep their names.
        self.blocks = nn.ModuleDict({str(index): WanBlock(config, parts) for index in range(config.num_layers)})
        self.head = Head(config, parts)

    @classmethod
    def from_pretrained(
        cls: type[ModelT],
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        parts: ModuleFactories | None = None,
    ) -> ModelT:
        """Load weights in diffusers, native or MindSpeed-MM names, detected by content, onto the CPU.

        Args:
            folder: a folder with safetensors and config.json, or one safetensors file.
            dtype: of the parameters, except those that stay fp32 (`mm.wan.precision`).
            parts: as for the class; parameters must not be sharded.

        Raises:
            DataError: DATA-020 to DATA-031 for unreadable files, a wrong config.json, and missing, unexpected or
                mis-shaped tensors; see `mm.wan.folder` and `mm.wan.shards`.
        """
        source = WeightFolder.open(folder)
        with torch.device("meta"):
            model = cls(source.config(), parts)
        source.require({name: tuple(value.shape) for name, value in model.named_parameters()})
        state = {name: value.to(torch.float32 if keep_fp32(name) else dtype) for name, value in source.tensors()}
        model.load_state_dict(state, strict=True, assign=True)
        return model

    def forward(self, inputs: ModelInputs) -> Tensor:
        """The velocity of noisy latents, [B, out_dim, F, H, W] fp32.

        Raises:
            ConfigError: CFG-040 when latents cannot be cut into patches, and what `ModelInputs.check` raises.
        """
        return unpatchify(self._predict(inputs), self.token_grid(inputs.latents), self.config.patch_size)

    def velocities(self, inputs: PackedInputs) -> list[Tensor]:
        """The velocity of each sample of a sequence, [1, out_dim, F, H, W] fp32; errors as of `forward`."""
        tokens = self._predict(inputs)
        grids = [self.token_grid(sample.latents) for sample in inputs.samples]
        each = zip(tokens.split([math.prod(grid) for grid in grids], dim=1), grids, strict=True)
        return [unpatchify(own, grid, self.config.patch_size) for own, grid in each]

    def _predict(self, inputs: Inputs) -> Tensor:
        """The velocity of all tokens, [B, T, pt*ph*pw*C] fp32."""
        inputs.check(self.config)
        hidden = self.patch_embedding(joined(self.patches(inputs), 1))
        conditions = self.embed_conditions(inputs)
        grids = [self.token_grid(sample.latents) for sample in inputs.samples]
        counts = [math.prod(grid) for grid in grids]
        packed = self.packed_tokens(inputs, counts, counts)
        hidden = self.run_blocks(hidden, conditions, self.rotary.positions(grids, hidden.device, packed))
        velocity: Tensor = self.head(hidden, conditions.time, packed)
        return velocity

    def patches(self, inputs: Inputs) -> list[Tensor]:
        """The patches of each sample of a sequence, [B, T, pt*ph*pw*C] each."""
        return [patchify(sample.with_channels(self.config), self.config.patch_size) for sample in inputs.samples]

    def packed_tokens(self, inputs: Inputs, counts: Sequence[int], queries: Sequence[int]) -> PackedTokens | None:
        """Shares of the samples in the tokens at hand (`PackedTokens.of_counts`); None of a batch."""
        if len(inputs.samples) == 1:
            return None
        text_lengths = [sample.text.shape[1] for sample in inputs.samples]
        return PackedTokens.of_counts(counts, queries, text_lengths, self.config.image_tokens)

    def velocity(self, latents: Tensor, timestep: Tensor, text: Tensor, **features: Tensor) -> Tensor:
        """`forward` of the attributes of `ModelInputs`, with the task's features by their names."""
        out: Tensor = self(ModelInputs(latents, timestep, text, features))
        return out

    def token_grid(self, latents: Tensor) -> Grid:
        """Tokens along frames, rows and columns of latents [B, C, F, H, W]; CFG-040 as `mm.wan.patches.token_grid`."""
        frames, height, width = latents.shape[2:]
        return token_grid((frames, height, width), self.config.patch_size)

    def embed_conditions(self, inputs: Inputs) -> Conditions:
        """Embed timesteps, text and the features that do not enter as channels."""
        time = self.time_embedding(timestep_sinusoid(inputs.timestep, self.config.freq_dim))
        context, time_modulation = self.text_embedding(inputs.text), self.time_projection(time).unflatten(1, (6, -1))
        for feature in self.config.task.features:
            if feature.module is None:
                continue
            embedded = self.get_submodule(feature.module)(inputs.feature(feature.name))
            if feature.entry is Entry.CONTEXT:
                context = torch.cat((embedded.reshape(len(context), -1, context.shape[2]), context), dim=1)
            else:
                time_modulation = time_modulation + embedded
        return Conditions(time, time_modulation, context)

    def run_blocks(self, hidden: Tensor, conditions: Conditions, positions: Positions) -> Tensor:
        """[B, T, D] to [B, T, D] through the blocks this model holds, in order."""
        blocks = list(self.blocks.values())
        return self.runner(blocks, hidden, conditions.time_modulation, conditions.context, positions)

    def to_precision(self: ModelT, dtype: torch.dtype) -> ModelT:
        """Cast the parameters in place to `dtype`, except those that stay fp32 (`mm.wan.precision`)."""
        for name, parameter in self.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if keep_fp32(name) else dtype)
        return self

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill all parameters with `mm.wan.initial.initial_value`; they must be whole, not sharded."""
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, seed))


def whole_shapes(config: WanConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters of a model by native name, in the model's order."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in WanModel(config).named_parameters()}
