"""The exponential moving average of the fp32 masters: of the elements that a rank owns, without a message."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Average:
    """average = decay * average + (1 - decay) * master after every step, element by element in fp32.

    It begins at the masters and is not corrected for that: after n steps the first ones weigh decay^n.

    Attributes:
        decay: between 0 and 1, without these.
        values: the average by parameter, each flat like its master.
    """

    def __init__(self, masters: Mapping[str, Tensor], decay: float) -> None:
        """Begin at the masters.

        Args:
            masters: what is averaged, by parameter; the tensors themselves, which the optimizer changes.
            decay: see above.
        """
        self.decay = decay
        self.values = {name: master.detach().clone() for name, master in masters.items()}
        self._masters = dict(masters)

    @torch.no_grad()
    def restart(self) -> None:
        """Begin again at the masters as they are."""
        for name, value in self.values.items():
            value.copy_(self._masters[name])

    @torch.no_grad()
    def update(self) -> None:
        """Take in the masters that a step has just changed."""
        if self.values:  # a stage may have nothing to train
            torch._foreach_lerp_(list(self.values.values()), list(self._masters.values()), 1 - self.decay)
