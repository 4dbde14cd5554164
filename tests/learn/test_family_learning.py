"""After a short training the tiny models of the family obey their conditions, on the pixels of what they generate."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import learning_clips as clips  # noqa: E402  (the path above)
from family_learning import LEAST, ROWS, figures_of, judge, learn, train_base  # noqa: E402

from mm.demo.clips import NUM_FRAMES, OPPOSITE, SIZE, DemoClip, edges  # noqa: E402
from mm.demo.components import load_vae  # noqa: E402
from mm.demo.measure import measure_clip  # noqa: E402
from mm.poses import direction_rows  # noqa: E402
from mm.wan.encoders import VideoEncoder  # noqa: E402


@pytest.fixture(scope="module")
def vae() -> VideoEncoder:
    return VideoEncoder(load_vae())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("learning")


@pytest.mark.nightly
@pytest.mark.timeout(1800)  # the first row trains what all begin with
@pytest.mark.parametrize("name", ROWS)
def test_row(home: Path, name: str) -> None:
    row = ROWS[name]
    found = figures_of(learn(row, home, train_base(home)))
    print(name, found)
    for what in row.counted:
        assert found[what] >= LEAST, found
    if row.below_vae is not None:
        assert found["kept_db"] >= found["vae_db"] - row.below_vae, found


@pytest.mark.parametrize("name", ROWS)
def test_a_right_answer_counts_and_what_is_given_does_not(name: str, vae: VideoEncoder) -> None:
    """Right answers are drawn; the clip that a question goes against, or the condition itself, is none."""
    questions = list(ROWS[name].questions())
    assert len(questions) == 16
    assert len({question.label for question in questions}) >= 4
    for question in questions[::7]:
        expected = question.expected
        if question.answer is not None:
            right = judge(question, question.answer + 1, vae)
            assert right.kept == pytest.approx(20 * np.log10(255))
            assert right.by_vae is not None
            assert right.by_vae > 20
        else:
            right = judge(question, DemoClip(expected.colour or "", expected.direction or "").draw(), vae)
        assert right.hit("colour")
        assert right.hit("direction")
        given = np.minimum(question.shown, 254) + 1
        wrong = judge(question, np.resize(given, (NUM_FRAMES, SIZE, SIZE, 3)), vae)
        assert not (wrong.hit("colour") and wrong.hit("direction"))


def test_no_question_is_a_lesson() -> None:
    """Not even its condition is."""
    for row in ROWS.values():
        known = {frames.tobytes() for one in row.lessons() for frames in (one.frames, edges(one.frames))}
        for question in row.questions():
            given = [value for value in question.inputs.values() if isinstance(value, np.ndarray) and value.ndim == 4]
            assert not known & {frames.tobytes() for frames in given}


@pytest.mark.parametrize("direction", ["Left", "Right", "Up", "Down"])
def test_what_the_camera_sees_moves_as_its_path_says(direction: str) -> None:
    """A point straight ahead through the path's matrices, by the pinhole camera of a 16:9 picture's middle."""
    rows = direction_rows(direction, NUM_FRAMES, clips.CAMERA_SPEED)
    seen = rows[:, 7:].view(-1, 3, 4) @ torch.tensor([0, 0, 1, 1], dtype=rows.dtype)
    moved = (seen[:, :2] / seen[:, 2:]) * rows[:, 1:3] * SIZE * torch.tensor([16 / 9, 1])
    lesson = next(one for one in clips.camera_lessons() if one.beside["camera"] == direction)
    assert measure_clip(lesson.frames).direction == OPPOSITE[direction.lower()]
    shape = (lesson.frames != lesson.frames[0, 0, 0]).any(-1)
    first, later = (np.array([axis.mean() for axis in np.nonzero(shape[frame])][::-1]) for frame in (0, 6))
    assert moved[6].numpy() == pytest.approx(later - first, abs=0.5)
