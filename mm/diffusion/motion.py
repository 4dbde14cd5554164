"""Loss of motion: the squared error of the differences between neighbouring latent frames.

With e the error of the velocity, it is the mean of (e[f + 1] - e[f])^2 over the frames f of a sample: the difference of
two frames of the prediction less that of the target is the difference of their errors. A sample's loss is then
(1 - r) times the mean of weight e^2, plus r times this, which has no weight (VideoX-Fun's `motion_sub_loss`).

Shapes: B samples, T tokens of a whole video in row-major order, t of a rank, D elements of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def motion_squares(own: Tensor, whole: Tensor, first: int, of_frame: int, first_frame: Tensor | None = None) -> Tensor:
    """Part that some tokens have of the sum of squared differences of neighbouring frames.

    A pair of tokens, one frame apart, belongs to both: each has half of its value and the whole of its own gradient. So
    the parts of all tokens add up to the sum and its gradients, and none is to be sent back to another rank.

    Args:
        own: [B, t, D] errors of the tokens, with their history. whole: [B, T, D] errors of all tokens, without.
        first: token in the first place of `own`. of_frame: tokens of a latent frame.
        first_frame: [B], 0 where the first frame counts in no pair, else 1; None where it always counts.

    Returns:
        [B].
    """
    last, total = first + own.shape[1], whole.shape[1]
    begin, end = min(max(first, of_frame), last), min(last, total - of_frame)
    before = own[:, begin - first :] - whole[:, begin - of_frame : last - of_frame]
    after = whole[:, first + of_frame : end + of_frame] - own[:, : max(end - first, 0)]
    sums = []
    for difference, earlier in ((before, begin - of_frame), (after, first)):
        squares = difference.square().sum(dim=2)
        if first_frame is not None:
            places = torch.arange(earlier, earlier + squares.shape[1], device=own.device)
            squares = torch.where(places < of_frame, first_frame.unsqueeze(1) * squares, squares)
        sums.append(squares.sum(dim=1))
    both = sums[0] + sums[1]
    return both - both.detach() / 2
