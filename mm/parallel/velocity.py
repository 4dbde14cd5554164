"""The velocity of a whole sample from a model that lies on the mesh: what generation and validation call.

Every rank of a replica calls it with the same arguments and gets the same answer. Ranks compute their tokens, pipeline
stages run one after the other, and the pieces are put together at the end.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from mm.config.model import WanConfig
from mm.parallel.apply import ParallelModel
from mm.parallel.boundary import BoundaryShape, SequenceLengths
from mm.parallel.tensor import gather_tokens
from mm.wan.inputs import ModelInputs


class ParallelVelocity:
    """A transformer that is called as `mm.wan.model.WanModel` is, on one device or on many."""

    def __init__(self, parallel: ParallelModel) -> None:
        """Take a model from `mm.parallel.apply`, in training or not."""
        self._parallel = parallel

    @property
    def config(self) -> WanConfig:
        """Shape of the whole model."""
        return self._parallel.wan

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return self._parallel.backend.device

    @torch.no_grad()
    def __call__(self, inputs: ModelInputs) -> Tensor:
        """The velocity [B, C, F, H, W] fp32 of inputs that are whole on every rank.

        Raises:
            ConfigError: what `ModelInputs.check` raises.
        """
        parallel = self._parallel
        mesh = parallel.mesh
        model = parallel.stages[0].model
        num_tokens = math.prod(model.token_grid(inputs))
        tokens = self._through_stages(num_tokens, inputs)
        if mesh.layout.sequence_parallel:
            tokens = gather_tokens(tokens, mesh.groups.tp)
        if mesh.layout.cp_size > 1:
            tokens = gather_tokens(tokens, mesh.groups.cp)
        return model.latents_of(inputs, tokens[:, :num_tokens])

    def _through_stages(self, num_tokens: int, inputs: ModelInputs) -> Tensor:
        """The velocity of this rank's tokens, [B, t, pt*ph*pw*C] fp32, on every rank of the pipeline."""
        parallel = self._parallel
        layout, group, rank = parallel.mesh.layout, parallel.mesh.groups.pp, parallel.mesh.pp_rank
        if layout.pp_size == 1:
            velocity: Tensor = parallel.chunks[0](inputs)
            return velocity
        batch, width = len(inputs.latents), parallel.mesh.tokens.width(num_tokens)
        lengths = SequenceLengths(batch, (num_tokens,), (inputs.text.shape[1],), (max(len(inputs.runs), 1),))
        rows = BoundaryShape.of(lengths, parallel.mesh.tokens, parallel.wan, parallel.dtype).rows
        device = parallel.backend.device
        out = torch.empty(0)
        for part, (stage, chunk) in enumerate(zip(parallel.stages, parallel.chunks, strict=True)):
            stage.boundary_rows = rows
            if not stage.first:
                received = torch.empty(rows, 1, parallel.wan.hidden_size, dtype=parallel.dtype, device=device)
                dist.recv(received, group=group, group_src=(rank - 1) % layout.pp_size)
                stage.set_input_tensor(received)
            out = chunk(inputs.part(part))
            if not stage.last:
                dist.send(out, group=group, group_dst=(rank + 1) % layout.pp_size)
        if not parallel.last:
            channels = math.prod(parallel.wan.patch_size) * parallel.wan.out_dim
            out = torch.empty(batch, width, channels, dtype=torch.float32, device=device)
        dist.broadcast(out.contiguous() if parallel.last else out, group=group, group_src=layout.pp_size - 1)
        return out
