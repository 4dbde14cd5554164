"""Clips whose first latent frame is given: a transformer that sees it clean at every step, whatever the sampler has."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mm.generate.pipeline import Velocity
from mm.wan.conditions.first_frame import with_clean_first_frame, with_given_frame
from mm.wan.inputs import ModelInputs


@dataclass(frozen=True)
class GivenFirstFrame:
    """Velocity of a transformer that is given the first latent frame of each clip.

    Attributes:
        model: the transformer. first: [B, C, 1, H, W], normalised latents. patch_size: of the transformer.
    """

    model: Velocity
    first: Tensor
    patch_size: tuple[int, int, int]

    def __call__(self, inputs: ModelInputs) -> Tensor:
        """The velocity of B clips, or of as many again behind them; what it is for the given frame means nothing."""
        first = self.first.repeat(len(inputs.latents) // len(self.first), 1, 1, 1, 1)
        return self.model(with_given_frame(inputs, first, self.patch_size))

    def in_clip(self, latents: Tensor) -> Tensor:
        """Finished latents [B, C, F, H, W] with the given frame in the place of theirs."""
        return with_clean_first_frame(latents, self.first)
