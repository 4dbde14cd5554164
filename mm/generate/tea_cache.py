"""TeaCache: steps at which a transformer's blocks do not run, because they would add about what they added before.

Of two steps the time modulation tells how much the result of the blocks will differ. A polynomial, fitted for each
model, turns its relative change into one of the result; changes add up until they reach a threshold, and then the
blocks run again. Until then what they have added to the residual stream is added once more.

Source: Liu et al. 2024 (arXiv 2411.19108), section 3; the polynomials are of its authors' release for Wan2.1. A
transformer's first and last step are always computed, as in DiffSynth-Studio.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import reduce

from torch import Tensor

from mm.config.run.generation import TeaCacheModel
from mm.wan.layers import Streams

COEFFICIENTS: dict[TeaCacheModel, tuple[float, ...]] = {
    "Wan2.1-T2V-1.3B": (-5.21862437e04, 9.23041404e03, -5.28275948e02, 1.36987616e01, -4.99875664e-02),
    "Wan2.1-T2V-14B": (-3.03318725e05, 4.90537029e04, -2.65530556e03, 5.87365115e01, -3.15583525e-01),
    "Wan2.1-I2V-14B-480P": (2.57151496e05, -3.54229917e04, 1.40286849e03, -1.35890334e01, 1.32517977e-01),
    "Wan2.1-I2V-14B-720P": (8.10705460e03, 2.13393892e03, -3.72934672e02, 1.66203073e01, -4.17769401e-02),
}
"""Of each model's polynomial, the highest power first."""


@dataclass(frozen=True)
class TeaCacheSettings:
    """Settings of TeaCache: the change at which blocks run again, and the model whose polynomial predicts it."""

    threshold: float
    model: TeaCacheModel


@dataclass
class _State:
    """Memory of one transformer, prompt and window.

    Attributes:
        step: the last one that asked. modulation: of that step, [B, 6, D] fp32.
        change: predicted since the blocks ran. added: by the blocks to the residual stream, [B, T, D].
    """

    step: int
    modulation: Tensor
    change: float
    added: Tensor


@dataclass
class TeaCache:
    """States of one batch of clips, from its first step to its last.

    Attributes:
        settings: of it. num_steps: that the sampler takes.
        agree: of all ranks that must do alike, whether all would skip; the identity where all see the same.
        computed, skipped: how often blocks ran and did not.
    """

    settings: TeaCacheSettings
    num_steps: int
    agree: Callable[[bool], bool] = bool
    computed: int = 0
    skipped: int = 0
    _states: dict[tuple[Hashable, ...], _State] = field(default_factory=dict)

    def at(self, step: int) -> CachedBlocks:
        """The blocks of a step, 0 to `num_steps` - 1. What the step before did not use is dropped."""
        self._states = {parts: state for parts, state in self._states.items() if state.step >= step - 1}
        return CachedBlocks(self, step)

    def run(self, at: CachedBlocks, modulation: Tensor, streams: Streams, compute: Callable[[], Streams]) -> Streams:
        """The streams behind the blocks, computed or, the first of them, with what the blocks added before."""
        state = self._states.get(at.parts)
        change = None if state is None or at.step == self.num_steps - 1 else self._change(state, modulation)
        skip = self.agree(change is not None and change < self.settings.threshold)
        if skip and state is not None and change is not None:
            self.skipped += 1
            state.step, state.modulation, state.change = at.step, modulation, change
            return streams[0] + state.added, *streams[1:]
        self.computed += 1
        computed = compute()
        self._states[at.parts] = _State(at.step, modulation, 0.0, computed[0] - streams[0])
        return computed

    def _change(self, state: _State, modulation: Tensor) -> float:
        """The change since the blocks ran. One number is read from the device."""
        before = state.modulation
        relative = ((modulation - before).abs().mean() / before.abs().mean()).item()
        return state.change + polynomial(COEFFICIENTS[self.settings.model], relative)


@dataclass(frozen=True)
class CachedBlocks:
    """The blocks of one step, or of one part of it, as a `mm.wan.reuse.BlockReuse`.

    Attributes:
        cache: what is remembered. step: which. parts: whose blocks.
    """

    cache: TeaCache
    step: int
    parts: tuple[Hashable, ...] = ()

    def of(self, part: Hashable) -> CachedBlocks:
        """Those of a part."""
        return CachedBlocks(self.cache, self.step, (*self.parts, part))

    def __call__(self, time_modulation: Tensor, streams: Streams, compute: Callable[[], Streams]) -> Streams:
        """The streams behind the blocks; with blocks left out only the first is new, and it is all that follows.

        Of several runs of tokens the last decides: a frame that is given clean has the same timestep at all steps.
        """
        noisy = time_modulation[-len(streams[0]) :]
        return self.cache.run(self, noisy, streams, compute)


def polynomial(coefficients: tuple[float, ...], x: float) -> float:
    """Value of a polynomial, the highest power's coefficient first."""
    return reduce(lambda value, coefficient: value * x + coefficient, coefficients, 0.0)
