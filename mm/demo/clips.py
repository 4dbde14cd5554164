"""The clips of the embedded default: one coloured shape that moves in one of four directions, and its caption.

The clips are drawn by code, so they cost nothing to ship, are the same everywhere, and what they show is known
exactly: `measure.py` can tell colour and direction of a generated clip without a second model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Frames = npt.NDArray[np.uint8]
Distances = npt.NDArray[np.floating]

SIZE = 64  # pixels, height and width
NUM_FRAMES = 9  # 4k + 1, three latent frames
FPS = 8
RADIUS = 11.0  # pixels, half the extent of every shape
TRAVEL = 32.0  # pixels from the first frame to the last
SIDE_STEP = 8.0  # pixels, how far off the centre line further clips of one caption start, at most

BACKGROUND = (40, 40, 48)  # away from black, because a decoder that clamps has no gradient at the ends of its range
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 50, 50),
    "green": (50, 185, 80),
    "blue": (60, 100, 225),
    "yellow": (230, 200, 50),
}
SHAPES: dict[str, str] = {"red": "circle", "green": "square", "blue": "triangle", "yellow": "diamond"}
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
"""Direction in which a camera turns for what it sees to move so."""


@dataclass(frozen=True, slots=True)
class DemoClip:
    """One clip to draw: its colour (which also decides the shape), its direction and which variant of the two it is."""

    colour: str
    direction: str
    variant: int = 0

    @property
    def caption(self) -> str:
        """`a red circle moving left`."""
        return f"a {self.colour} {SHAPES[self.colour]} moving {self.direction}"

    def centres(self) -> list[tuple[float, float]]:
        """Centre (x, y) of the shape in every frame, in pixels; variant 0 runs through the middle of the picture."""
        step_x, step_y = DIRECTIONS[self.direction]
        # Multiples of the golden ratio spread any number of variants evenly over (-SIDE_STEP, SIDE_STEP).
        side = 2 * SIDE_STEP * ((self.variant * 0.6180339887 + 0.5) % 1.0 - 0.5)
        along = [TRAVEL * (frame / (NUM_FRAMES - 1) - 0.5) for frame in range(NUM_FRAMES)]
        middle = SIZE / 2
        return [(middle + step_x * a + abs(step_y) * side, middle + step_y * a + abs(step_x) * side) for a in along]

    def draw(self) -> Frames:
        """The frames, uint8 [NUM_FRAMES, SIZE, SIZE, 3], RGB."""
        return np.stack([draw_frame(self.colour, x, y) for x, y in self.centres()])


def all_clips(clips_per_caption: int = 1) -> list[DemoClip]:
    """Every colour in every direction, `clips_per_caption` variants of each."""
    return [DemoClip(c, d, v) for c in COLOURS for d in DIRECTIONS for v in range(clips_per_caption)]


def all_captions() -> list[str]:
    """The 16 captions, in the order of `all_clips`."""
    return [clip.caption for clip in all_clips()]


def draw_frame(colour: str, x: float, y: float) -> Frames:
    """One anti-aliased picture, uint8 [SIZE, SIZE, 3]: the shape of `colour` centred at (x, y), in pixels."""
    return draw_shapes([(colour, SHAPES[colour], x, y)])


def draw_shapes(shapes: Iterable[tuple[str, str, float, float]]) -> Frames:
    """A picture, uint8 [SIZE, SIZE, 3], of shapes on the background, the last one on top.

    Args:
        shapes: of each its colour, its shape (a value of `SHAPES`) and its centre (x, y) in pixels.
    """
    pixel_centres = np.arange(SIZE) + 0.5
    picture = np.full((SIZE, SIZE, 3), BACKGROUND, np.float64)
    for colour, shape, x, y in shapes:
        distance = _DISTANCES[shape](pixel_centres[None, :] - x, pixel_centres[:, None] - y)
        coverage = np.clip(0.5 - distance, 0.0, 1.0)[..., None]
        picture = coverage * np.array(COLOURS[colour]) + (1 - coverage) * picture
    return np.rint(picture).astype(np.uint8)


def edges(frames: Frames) -> Frames:
    """Edges of the shapes in frames, white on black, uint8 as they are: where a neighbour's colour differs by much."""
    values = frames.astype(np.int16)
    steps = np.zeros(frames.shape[:3], np.int16)
    for axis in (1, 2):
        differences = np.abs(np.diff(values, axis=axis)).max(-1)
        steps = np.maximum(steps, np.pad(differences, [(0, 0), *[(0, int(one == axis)) for one in (1, 2)]]))
    return np.repeat(np.where(steps > 32, 255, 0).astype(np.uint8)[..., None], 3, axis=3)


def moving_block(num_frames: int) -> Frames:
    """Mask of a video: a block half as high and wide as the picture, white on black, that moves from left to right."""
    frames = np.zeros((num_frames, SIZE, SIZE, 3), np.uint8)
    for number in range(num_frames):
        left = round(number / max(1, num_frames - 1) * SIZE / 2)
        frames[number, SIZE // 4 : SIZE // 4 + SIZE // 2, left : left + SIZE // 2] = 255
    return frames


# Signed distance in pixels from the edge of a shape of half extent RADIUS around (0, 0), negative inside.


def _circle(dx: Distances, dy: Distances) -> Distances:
    return np.hypot(dx, dy) - RADIUS


def _square(dx: Distances, dy: Distances) -> Distances:
    return np.maximum(np.abs(dx), np.abs(dy)) - 0.9 * RADIUS


def _diamond(dx: Distances, dy: Distances) -> Distances:
    return (np.abs(dx) + np.abs(dy) - 1.2 * RADIUS) / np.sqrt(2)


def _triangle(dx: Distances, dy: Distances) -> Distances:
    # Base at +RADIUS, apex at -RADIUS: two slanted edges (half width RADIUS over height 2 RADIUS) and the base.
    slanted = (2 * np.abs(dx) - (dy + RADIUS)) / np.sqrt(5)
    return np.maximum(slanted, dy - RADIUS)


_DISTANCES: dict[str, Callable[[Distances, Distances], Distances]] = {
    "circle": _circle,
    "square": _square,
    "diamond": _diamond,
    "triangle": _triangle,
}
