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
from torch import Tensor, nn

from mm.config.model import WanConfig
from mm.config.tasks.task import Entry
from mm.ops.elementwise import autograd as ops
from mm.wan.block import Layer, SideBlock, WanBlock
from mm.wan.embeddings import EMBEDDINGS, PatchEmbedding
from mm.wan.folder import WeightFolder
from mm.wan.initial import initial_value
from mm.wan.inputs import Inputs, ModelInputs, PackedInputs, runs_of
from mm.wan.layers import ModuleFactories, Streams
from mm.wan.packed import PackedTokens, Run, by_run
from mm.wan.patches import token_grid, unpatchify, window
from mm.wan.precision import keep_fp32
from mm.wan.rope import Grid, Positions, RotaryTables
from mm.wan.sinusoid import timestep_sinusoid
from mm.wan.token_embedding import embed_tokens

ModelT = TypeVar("ModelT", bound="WanModel")


@dataclass(frozen=True)
class Conditions:
    """Inputs of the blocks and the head besides the hidden state and the positions.

    Attributes:
        time: [B, D] fp32, the embedded timestep, for the head.
        time_modulation: [B, 6, D] fp32, for the blocks. Both have such rows for each run of tokens with one timestep.
        context: [B, I + L, D] in the model's dtype, the embedded images, then the embedded text. One tensor, because
            blocks, pipelines and recomputation treat the two alike; cross attention tells them apart.

    Of samples that share a sequence, the first two have a row for each run, and the context [1, all image tokens + all
    text tokens, D] has them one after the other.
    """

    time: Tensor
    time_modulation: Tensor
    context: Tensor


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

    def forward(self, x: Tensor, time: Tensor, runs: Sequence[int] | None = None) -> Tensor:
        """x [B, T, D] and time [B, D] to [B, T, pt*ph*pw*C] fp32, in the layout of `mm.wan.patches.patchify`.

        For runs of tokens time has such rows for each (`mm.wan.packed.by_run`).
        """
        shift, scale = (self.modulation.float() + time.unsqueeze(1)).chunk(2, dim=1)
        norm = partial(ops.layer_norm, eps=self.eps)
        out: Tensor = self.head(by_run(norm, [x.float()], [1 + scale, shift], runs))
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
        self.patch_embedding = PatchEmbedding(config.in_dim, width, config.patch_size)
        self.text_embedding = TextEmbedding(config, parts)
        self.time_embedding = nn.Sequential(
            parts.linear_fp32(config.freq_dim, width), nn.SiLU(), parts.linear_fp32(width, width)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), parts.linear_fp32(width, 6 * width))
        for name in config.task.modules:
            self.add_module(name, EMBEDDINGS[name](config, parts))
        # A dict, not a list: a pipeline stage deletes the blocks it does not hold and the others keep their names.
        self.blocks = nn.ModuleDict({str(index): WanBlock(config, parts) for index in range(config.num_layers)})
        if config.side_blocks:
            sides = {str(number): SideBlock(config, parts, first=number == 0) for number in config.side_blocks.values()}
            self.vace_blocks = nn.ModuleDict(sides)
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
        return self.latents_of(inputs, self._predict(inputs))

    def velocities(self, inputs: PackedInputs) -> list[Tensor]:
        """The velocity of each sample of a sequence, [1, out_dim, F, H, W] fp32; errors as of `forward`."""
        tokens = self._predict(inputs)
        counts = [math.prod(self.token_grid(sample)) for sample in inputs.samples]
        each = zip(inputs.samples, tokens.split(counts, dim=1), strict=True)
        return [self.latents_of(sample, own) for sample, own in each]

    def velocity(self, latents: Tensor, timestep: Tensor, text: Tensor, **features: Tensor | float) -> Tensor:
        """`forward` of the attributes of `ModelInputs`, with the task's features by their names.

        Args:
            latents, text: as there.
            timestep: [B], or [B, T] where the tokens of a video have different ones.
            features: as there; one that is a number stands for all samples.
        """
        runs: tuple[int, ...] = ()
        if timestep.ndim == 2:
            timestep, runs = runs_of(timestep)
        batch = len(latents)
        tensors = {n: v if isinstance(v, Tensor) else latents.new_full((batch,), v) for n, v in features.items()}
        out: Tensor = self(ModelInputs(latents, timestep, text, tensors, runs))
        return out

    def _predict(self, inputs: Inputs) -> Tensor:
        """The velocity of all tokens, [B, T, pt*ph*pw*C] fp32."""
        inputs.check(self.config)
        grids = [self.token_grid(sample) for sample in inputs.samples]
        counts = [math.prod(grid) for grid in grids]
        streams = self.embed_tokens(inputs, [Run(index, 0, count, count) for index, count in enumerate(counts)])
        conditions = self.embed_conditions(inputs)
        packed = self.packed_tokens(inputs, counts)
        runs = [count for parts in self.runs_of_time(inputs) for count in parts]
        positions = self.rotary.positions(grids, streams[0].device, packed, tuple(runs) if len(runs) > 1 else None)
        hidden, *_ = self.run_blocks(streams, conditions, positions, inputs)
        velocity: Tensor = self.head(hidden, conditions.time, positions.runs)
        return velocity

    def embed_tokens(self, inputs: Inputs, runs: Sequence[Run]) -> Streams:
        """Tokens as the streams that blocks run on (`mm.wan.token_embedding.embed_tokens`)."""
        return embed_tokens(self.config, self.get_submodule, inputs, runs)

    def packed_tokens(self, inputs: Inputs, queries: Sequence[int]) -> PackedTokens | None:
        """Shares of the samples in the tokens at hand (`PackedTokens.of_counts`); None of a batch."""
        if len(inputs.samples) == 1:
            return None
        text_lengths = [sample.text.shape[1] for sample in inputs.samples]
        return PackedTokens.of_counts(queries, text_lengths, self.config.image_tokens)

    def runs_of_time(self, inputs: Inputs) -> list[tuple[int, ...]]:
        """Tokens of each sample's runs with one timestep; tokens in front of the video's are of the first run."""
        found = []
        for sample in inputs.samples:
            frames, height, width = self.token_grid(sample)
            first, *others = sample.runs or (frames * height * width,)
            ahead = sample.leading_frames(self.config) * height * width if sample.runs else 0
            found.append((first + ahead, *others))
        return found

    def token_grid(self, sample: ModelInputs) -> Grid:
        """Tokens along frames, rows and columns of a sample; the frames in front of the video's are the first.

        Raises:
            ConfigError: CFG-040 as `mm.wan.patches.token_grid`.
        """
        frames, height, width = sample.latents.shape[2:]
        frames, height, width = token_grid((frames, height, width), self.config.patch_size)
        return frames + sample.leading_frames(self.config), height, width

    def latents_of(self, sample: ModelInputs, tokens: Tensor) -> Tensor:
        """[B, out_dim, F, H, W] of all tokens of a sample, those in front of the video's left out."""
        frames, height, width = self.token_grid(sample)
        ahead = sample.leading_frames(self.config)
        video = window(tokens, 1, ahead * height * width, (frames - ahead) * height * width)
        return unpatchify(video, (frames - ahead, height, width), self.config.patch_size)

    def embed_conditions(self, inputs: Inputs) -> Conditions:
        """Embed timesteps, text and the features that are no tokens of the video and none beside them."""
        time = self.time_embedding(timestep_sinusoid(inputs.timestep_rows, self.config.freq_dim))
        context, time_modulation = self.text_embedding(inputs.text), self.time_projection(time).unflatten(1, (6, -1))
        for feature in self.config.task.features:
            value = inputs.feature(feature.name) if feature.entry in (Entry.CONTEXT, Entry.TIME_MODULATION) else None
            if value is None:
                continue
            embedded = self.get_submodule(str(feature.module))(value)
            if feature.entry is Entry.CONTEXT:
                context = torch.cat((embedded.reshape(len(context), -1, context.shape[2]), context), dim=1)
            else:
                time_modulation = time_modulation + embedded
        return Conditions(time, time_modulation, context)

    def run_blocks(self, streams: Streams, conditions: Conditions, positions: Positions, inputs: Inputs) -> Streams:
        """The streams through the blocks this model holds, in order, or what `ModelInputs.reuse` takes for it."""
        layers = self.layers(inputs, streams[0].device)
        compute = partial(self.runner, layers, streams, conditions.time_modulation, conditions.context, positions)
        return compute() if inputs.reuse is None else inputs.reuse(conditions.time_modulation, streams, compute)

    def layers(self, inputs: Inputs, device: torch.device) -> list[Layer]:
        """The blocks this model holds, in order, each with its side block."""
        sides = self.config.side_blocks
        scales = [inputs.feature(feature.name) for feature in self.config.task.entering(Entry.HINTS)]
        scale = None if not scales or scales[0] is None else scales[0].to(device).view(-1, 1, 1)
        return [
            Layer(block, self.vace_blocks[str(sides[int(name)])] if int(name) in sides else None, scale)
            for name, block in self.blocks.items()
        ]

    def blocks_in_order(self) -> list[WanBlock]:
        """The blocks and side blocks this model holds, in the order in which they run."""
        found: list[WanBlock] = []
        for name, block in self.blocks.items():
            number = self.config.side_blocks.get(int(name))
            each = [block] if number is None else [self.vace_blocks[str(number)], block]
            found += [one for one in each if isinstance(one, WanBlock)]
        return found

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
