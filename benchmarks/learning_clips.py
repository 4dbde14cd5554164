"""Clips that tiny models of the Wan family learn from, and the questions that they are asked then.

A question asks for what nothing but the condition can tell: a control video against the caption, a reference of a
colour that the caption leaves open, a camera's direction where the caption and the start image tell none, a caption
that is not of the video whose pixels are kept. `family_learning.py` trains on them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

from mm.demo.clips import (
    BACKGROUND,
    COLOURS,
    DIRECTIONS,
    NUM_FRAMES,
    OPPOSITE,
    SHAPES,
    SIZE,
    TRAVEL,
    DemoClip,
    Frames,
    all_clips,
    draw_shapes,
    edges,
)
from mm.demo.measure import Measurement
from mm.poses import ORIGIN

VARIANTS = 6  # clips of a caption to learn from; the next one is for questions
GREY = 127  # pixels that VACE is to make anew, as uint8
CAMERA_SPEED = 1 / 22  # tangent of the angle that the camera turns from one frame to the next
FOCAL_LENGTH = SIZE * ORIGIN[2]  # pixels, of the whole height of a picture
JITTER = 3.0  # pixels

COLOUR_LIST = list(COLOURS)


@dataclass(frozen=True)
class Lesson:
    """A clip to learn from: its frames, its caption, and what is beside it by role: frames, or a camera's direction."""

    frames: Frames
    caption: str
    beside: dict[str, Frames | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """A clip to make.

    Attributes:
        caption: of it. inputs: what the model is given besides, by the arguments of `mm.generate_videos`.
        shown: frames that stand for the inputs on the sheet. label: what is asked, in a few words.
        expected: colour and direction of the answer.
        made: [SIZE, SIZE], True where pixels are made anew. answer: a right clip, whose other pixels are to be kept.
    """

    caption: str
    inputs: dict[str, Any]
    shown: Frames
    label: str
    expected: Measurement
    made: np.ndarray | None = None
    answer: Frames | None = None


def control_lessons() -> Iterator[Lesson]:
    """The demo's clips with their edges."""
    for clip in all_clips(VARIANTS):
        frames = clip.draw()
        yield Lesson(frames, clip.caption, {"control": edges(frames)})


def control_questions() -> Iterator[Question]:
    """Edges that move against the caption."""
    for clip in all_clips():
        against = DemoClip(clip.colour, OPPOSITE[clip.direction], VARIANTS)
        control = edges(against.draw())
        label = f"control moves {against.direction}"
        expected = Measurement(clip.colour, against.direction)
        yield Question(clip.caption, {"controls": control}, control, label, expected)


def reference_lessons() -> Iterator[Lesson]:
    """The demo's clips with a moving box, which tells no colour; the caption tells the direction alone."""
    for clip in all_clips(VARIANTS):
        yield Lesson(clip.draw(), f"moving {clip.direction}", {"control": _box(clip)})


def reference_questions() -> Iterator[Question]:
    """A moving box, and a reference that shows a shape elsewhere."""
    for clip in all_clips():
        control = _box(DemoClip(clip.colour, clip.direction, VARIANTS))
        reference = DemoClip(clip.colour, OPPOSITE[clip.direction], VARIANTS + 1).draw()[-2]
        shown = np.concatenate((reference[None], control[[0, -1]]))
        inputs = {"controls": control, "references": reference}
        expected = Measurement(clip.colour, clip.direction)
        yield Question(f"moving {clip.direction}", inputs, shown, f"reference is {clip.colour}", expected)


def camera_lessons() -> Iterator[Lesson]:
    """A shape in the middle that moves as the camera's turning has it; the caption tells the colour alone."""
    for index, (colour, direction, _) in enumerate(product(COLOURS, DIRECTIONS, range(VARIANTS))):
        frames = _moving(colour, SHAPES[colour], _seen_by_camera(direction, index))
        yield Lesson(frames, _named(colour), {"camera": OPPOSITE[direction].title()})


def camera_questions() -> Iterator[Question]:
    """A start image and a direction."""
    for index, (colour, direction) in enumerate(product(COLOURS, DIRECTIONS)):
        frames = _moving(colour, SHAPES[colour], _seen_by_camera(direction, 1000 + index))
        camera = OPPOSITE[direction].title()
        inputs = {"images": frames[0], "cameras": f"{camera} {CAMERA_SPEED}"}
        shown = frames[[0, 0, 0]]
        yield Question(_named(colour), inputs, shown, f"camera turns {camera.lower()}", Measurement(colour, direction))


def inpainting_lessons() -> Iterator[Lesson]:
    """A shape that moves in one half of the picture, where the mask is, and another that rests in the other half."""
    for index, (caption, side, other) in enumerate(product(all_clips(), range(2), range(1, 4))):
        scene = _Scene(caption.colour, caption.direction, side, _after(caption.colour, other), index)
        yield Lesson(scene.draw(), caption.caption, {"mask": np.repeat(_white(scene.half())[None], NUM_FRAMES, 0)})


def inp_questions() -> Iterator[Question]:
    """A half of a clip to make anew, with a caption of another colour and the other direction."""
    return _inpainting_questions(blank=False)


def vace_questions() -> Iterator[Question]:
    """The same, with grey where the mask is, since VACE sees what the video has there."""
    return _inpainting_questions(blank=True)


def _inpainting_questions(blank: bool) -> Iterator[Question]:
    for index, clip in enumerate(all_clips()):
        resting, former = (_after(clip.colour, 1 + (index + number) % 3) for number in range(2))
        place = index // 2 % 2, resting, 1000 + index
        answer = _Scene(clip.colour, clip.direction, *place)
        before = _Scene(former, OPPOSITE[clip.direction], *place).draw()
        made = answer.half()
        shown = np.where(made[None, ..., None], GREY, before).astype(np.uint8)
        inputs = {"videos": shown if blank else before, "masks": _white(made)[..., 0]}
        expected = Measurement(clip.colour, clip.direction)
        yield Question(clip.caption, inputs, shown, f"{resting} stays, not {former}", expected, made, answer.draw())


@dataclass(frozen=True)
class _Scene:
    """A shape of `colour` moves in a half of the picture, 0 above or left; one of `resting` rests in the other half."""

    colour: str
    direction: str
    side: int
    resting: str
    number: int

    def half(self) -> np.ndarray:
        """[SIZE, SIZE], True in the half where the shape moves."""
        found = np.zeros((SIZE, SIZE), bool)
        across = slice(SIZE // 2) if self.side == 0 else slice(SIZE // 2, None)
        found[(across, slice(None)) if self._is_horizontal() else (slice(None), across)] = True
        return found

    def draw(self) -> Frames:
        middle, step = SIZE / 2, sum(DIRECTIONS[self.direction])
        across = SIZE / 4 + self.side * SIZE / 2 + 0.6 * _spread(self.number, JITTER)
        place = middle + _spread(self.number, 14.0), SIZE - SIZE / 4 - self.side * SIZE / 2
        frames = []
        for frame in range(NUM_FRAMES):
            moving = middle + step * TRAVEL * (frame / (NUM_FRAMES - 1) - 0.5), across
            at = [point if self._is_horizontal() else point[::-1] for point in (moving, place)]
            colours = self.colour, self.resting
            frames.append(draw_shapes((c, SHAPES[c], *point) for c, point in zip(colours, at, strict=True)))
        return np.stack(frames)

    def _is_horizontal(self) -> bool:
        return DIRECTIONS[self.direction][0] != 0


def _box(clip: DemoClip) -> Frames:
    """Edges of a square where a clip's shape is."""
    return edges(_moving(clip.colour, "square", clip.centres()))


def _moving(colour: str, shape: str, centres: Iterable[tuple[float, float]]) -> Frames:
    return np.stack([draw_shapes([(colour, shape, x, y)]) for x, y in centres])


def _seen_by_camera(direction: str, number: int) -> list[tuple[float, float]]:
    """Centres of what stands before a camera that turns against `direction`."""
    x, y = (SIZE / 2 + _spread(number * factor, JITTER) for factor in (1, 7))
    step_x, step_y = DIRECTIONS[direction]
    moved = [FOCAL_LENGTH * CAMERA_SPEED * frame for frame in range(NUM_FRAMES)]
    return [(x + step_x * pixels, y + step_y * pixels) for pixels in moved]


def _spread(number: int, most: float) -> float:
    """A number from -most to most: multiples of the golden ratio spread evenly."""
    return 2 * most * ((number * 0.6180339887) % 1.0 - 0.5)


def _after(colour: str, steps: int) -> str:
    return COLOUR_LIST[(COLOUR_LIST.index(colour) + steps) % 4]


def _named(colour: str) -> str:
    return f"a {colour} {SHAPES[colour]}"


def _white(mask: np.ndarray) -> Frames:
    return np.repeat(np.where(mask, 255, 0).astype(np.uint8)[..., None], 3, axis=-1)


def only(frames: Frames, made: np.ndarray | None) -> Frames:
    """Frames with the background wherever nothing was to be made."""
    return frames if made is None else np.where(made[None, ..., None], frames, np.array(BACKGROUND, np.uint8))
