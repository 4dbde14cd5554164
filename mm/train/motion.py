"""Loss of motion of a rank's tokens, whose neighbours in time may be on other ranks.

Each rank gets the errors of all tokens of a sequence, T D numbers in fp32: 8.4 MB at 480x832x81 with the 64 of Wan2.1's
latents, of which it sends its part. A halo of one frame would be less, but a rank may have less than a frame, and one
block's attention sends many times as much. Nothing is sent in backward (`mm.diffusion.motion`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mm.config.diffusion import LEAST_MOTION_FRAMES
from mm.data.loader import FeatureBatch
from mm.diffusion.motion import motion_squares
from mm.parallel.mesh import Mesh
from mm.train.parts import Part


def has_motion(segment: FeatureBatch) -> bool:
    """True of samples with frames enough."""
    return segment["latents"].shape[2] >= LEAST_MOTION_FRAMES


def motion_losses(
    mesh: Mesh,
    segments: Sequence[FeatureBatch],
    error: Tensor,
    counts: Sequence[tuple[int, int]],
    parts: Sequence[Sequence[Part]],
) -> list[tuple[int, Tensor]]:
    """This rank's parts of the losses of motion of samples that share a sequence; all ranks of the sequence call it.

    Args:
        mesh: of the run. segments: the samples, or samples of one shape as the only one.
        error: [B, t, D] of the velocity at this rank's places, with its history.
        counts: tokens in front of each one's video, and of the video. parts: of each one's frames.

    Returns:
        Index of a segment and loss [B], of each run of places.
    """
    if not any(map(has_motion, segments)):
        return []
    lengths = [sum(each) for each in counts]
    wholes = mesh.tokens.joined(mesh.gather_places(error.detach()), lengths)
    found, start = list[tuple[int, Tensor]](), 0
    for run in mesh.tokens.runs(lengths):
        segment, (ahead, tokens) = segments[run.sample], counts[run.sample]
        first, last = (min(max(token - ahead, 0), tokens) for token in (run.start, run.start + run.real))
        if has_motion(segment) and first < last:
            skipped = start + first + ahead - run.start
            own, whole = error[:, skipped : skipped + last - first], wholes[run.sample][:, ahead:]
            frames = segment["latents"].shape[2]
            of_frame, given = tokens // frames, parts[run.sample][0].learned
            pairs = frames - 1 if given is None else frames - 2 + given
            squares = motion_squares(own, whole, first, of_frame, given)
            found.append((run.sample, squares / (pairs * of_frame * error.shape[2])))
        start += run.places
    return found
