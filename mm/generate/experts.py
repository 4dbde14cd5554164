"""Two experts as one transformer: each noise level goes to the one that was trained on it.

Wan2.2's A14B models are two of one shape: diffusers' folders have the one for much noise in `transformer` and the one
for little in `transformer_2`, and record the noise level between them as `boundary_ratio`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mm.checkpoint.expert_band import recorded_band, recorded_boundary
from mm.config.run.generation import LowNoiseExpert
from mm.config.run.origins import Origins
from mm.errors import ConfigError
from mm.generate.pipeline import Velocity
from mm.wan.inputs import ModelInputs

TRAIN_TIMESTEPS = 1000
"""Timestep of pure noise."""


@dataclass(frozen=True)
class TwoExperts:
    """Velocity of two transformers, called as one is.

    Attributes:
        high: at noise levels from `boundary` on. low: below it.
        boundary: noise level; 0.875 of the released T2V-A14B, 0.9 of I2V-A14B.
    """

    high: Velocity
    low: Velocity
    boundary: float

    def __call__(self, inputs: ModelInputs) -> Tensor:
        """The velocity of samples that have one noise level; raises what the transformers raise."""
        of_noise = float(inputs.timestep.max())  # a frame that is given clean is at 0, whatever the others are
        if is_high(of_noise, self.boundary):
            return self.high(inputs.part("high"))
        return self.low(inputs.part("low"))


def boundary_of(low: LowNoiseExpert, words: Origins) -> float:
    """Noise level between two experts: the one that is said, or what is recorded beside the weights.

    Raises:
        ConfigError: CFG-294 where neither is there.
    """
    return boundary_between(low.boundary, Path(low.weights), words["model.low_noise.boundary"].full())


def boundary_between(given: float | None, low: Path, word: str) -> float:
    """Noise level as of `boundary_of`, of the weights for little noise; `word` is where it may be given."""
    found = given if given is not None else recorded_boundary(low)
    if found is None:
        message = f"Nothing says at which noise level {low} begins: {word} is missing."
        raise ConfigError("CFG-294", message, "Give it: 0.875 of Wan2.2's T2V-A14B, 0.9 of I2V-A14B.")
    return found


def require_experts_in_place(high: Sequence[Path], low: Sequence[Path], boundary: float) -> None:
    """Check that two experts were trained on the noise levels that they are asked for.

    Args:
        high, low: their weights and adapters; none of one that is known to be. boundary: noise level between them.

    Raises:
        ConfigError: CFG-295 where what is recorded of weights or an adapter says that they are the other's.
    """
    named = []
    for path in high:
        band = recorded_band(path)
        if band is not None and band[1] <= boundary:
            named.append(f"{path}, which is asked from noise level {boundary:g} on, was trained below {band[1]:g}")
    for path in low:
        band = recorded_band(path)
        if band is not None and band[0] >= boundary:
            named.append(f"{path}, which is asked below noise level {boundary:g}, was trained from {band[0]:g} on")
    if named:
        remedy = "Exchange them: diffusers' transformer is the expert for much noise, transformer_2 that for little."
        raise ConfigError("CFG-295", f"The experts are swapped: {'; '.join(named)}.", remedy)


def is_high(timestep: float, boundary: float) -> bool:
    """Tell whether a timestep belongs to the expert for much noise."""
    return timestep >= boundary * TRAIN_TIMESTEPS
