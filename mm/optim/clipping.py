"""Limit of the gradient norm: one number, or one that begins elsewhere, and is less for gradients out of the ordinary.

With `abnormal_clip_samples` S, the limit of a step falls (or rises) in a straight line from `initial_clip_ratio` times
`clip_grad` at the first sample to `clip_grad` at sample S. After it a norm that is more than `ABNORMAL` times the limit
is clipped to the limit divided by norm / limit, at most by `MOST`: the further out a gradient is, the less it moves.

The norm is that of the whole gradient, on every layout, and the count of samples is in every checkpoint; so the limit
is a function of what all ranks know, and a resumed run goes on with it.

Source of the rule: VideoX-Fun's full-parameter trainers, which take each rank's norm for it, and count in steps.
"""

from __future__ import annotations

from mm.optim.settings import UpdateSettings

ABNORMAL = 5
"""A norm of so many times the limit is out of the ordinary."""
MOST = 10
"""The limit of such a norm is divided by no more than this."""


def clip_limit(settings: UpdateSettings, consumed_samples: int, norm: float) -> float:
    """Largest norm of the gradient of a step; 0 where nothing is clipped.

    Args:
        settings: of the run. consumed_samples: before the step. norm: global, of the step's gradient.
    """
    limit, settled = settings.clip_grad, settings.abnormal_clip_samples
    if settled is None or limit == 0:
        return limit
    if consumed_samples < settled:
        first = settings.initial_clip_ratio * limit
        return first + (limit - first) * consumed_samples / settled
    if consumed_samples > settled and norm > ABNORMAL * limit:
        return limit / min(norm / limit, MOST)
    return limit
