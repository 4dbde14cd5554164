"""The clips show what their captions say, and the measurement sees it, and sees nothing where there is nothing."""

from pathlib import Path

import numpy as np
import pytest

from mm.demo.clips import BACKGROUND, COLOURS, NUM_FRAMES, SIZE, DemoClip, all_captions, all_clips, draw_frame
from mm.demo.measure import Measurement, measure_clip, read_caption, score
from mm.demo.video import read_video, write_video
from mm.errors import DataError

NOTHING = Measurement(None, None)


def test_there_are_16_different_captions_of_4_colours_and_4_directions():
    captions = all_captions()
    assert captions[0] == "a red circle moving left"
    assert len(set(captions)) == 16
    assert len({read_caption(c).colour for c in captions}) == 4
    assert len({read_caption(c).direction for c in captions}) == 4


def test_shape_moves_32_pixels_inside_the_picture():
    for clip in all_clips(5):
        frames = clip.draw()
        assert frames.shape == (NUM_FRAMES, SIZE, SIZE, 3)
        assert frames.dtype == np.uint8
        assert np.hypot(*(np.array(clip.centres()[-1]) - clip.centres()[0])) == pytest.approx(32)
        border = np.concatenate([frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]], axis=1)
        assert (border == BACKGROUND).all()


def test_drawn_circle_has_the_area_and_centre_of_its_formula():
    picture = draw_frame("red", 30.25, 21.5).astype(float)
    # Anti-aliasing: red rises from the background's 40 to 215 in proportion to the part of the pixel that is covered.
    coverage = (picture[..., 0] - 40) / (215 - 40)
    assert coverage.sum() == pytest.approx(np.pi * 11**2, rel=0.01)
    positions = np.arange(SIZE) + 0.5
    assert (coverage.sum(axis=0) @ positions) / coverage.sum() == pytest.approx(30.25, abs=0.02)
    assert (coverage.sum(axis=1) @ positions) / coverage.sum() == pytest.approx(21.5, abs=0.02)


def test_variants_differ_and_variant_0_does_not_depend_on_how_many_there_are():
    assert [c for c in all_clips(3) if c.variant == 0] == all_clips(1)
    tracks = {tuple(DemoClip("blue", "up", variant).centres()) for variant in range(20)}
    assert len(tracks) == 20


def test_every_drawn_clip_is_measured_right():
    for clip in all_clips(4):
        assert measure_clip(clip.draw()) == (clip.colour, clip.direction), clip


def test_every_clip_survives_h264(tmp_path: Path):
    for clip in all_clips():
        write_video(tmp_path / "clip.mp4", clip.draw(), 8)
        read = read_video(tmp_path / "clip.mp4")
        assert measure_clip(read) == (clip.colour, clip.direction), clip
        # 8-bit YUV rounds every RGB value by up to 2; halved chroma blurs the edges.
        assert np.abs(read.astype(float) - clip.draw()).mean() < 4


def test_mp4_is_h264_yuv420p_of_9_frames_at_8_fps(tmp_path: Path):
    import av

    write_video(tmp_path / "clip.mp4", DemoClip("green", "up").draw(), 8)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.frames, stream.average_rate, stream.width, stream.height) == (9, 8, 64, 64)


@pytest.mark.parametrize("level", [0, 40, 128, 255])
def test_a_uniform_clip_shows_nothing(level: int):
    assert measure_clip(np.full((9, 64, 64, 3), level, np.uint8)) == NOTHING


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1, 0.2, 1.0])
def test_noise_shows_nothing(share: float):
    """`share` of the pixels are noise; the smaller shares have the area of a drawn shape, but lie scattered."""
    random = np.random.default_rng(0)
    for _ in range(10):
        frames = np.full((9, 64, 64, 3), BACKGROUND, np.uint8)
        noisy = random.random((9, 64, 64)) < share
        frames[noisy] = random.integers(0, 256, (int(noisy.sum()), 3), dtype=np.uint8)
        assert measure_clip(frames) == NOTHING


def test_a_static_shape_has_a_colour_and_no_direction():
    for colour in COLOURS:
        frames = np.stack([draw_frame(colour, 30, 34)] * 9)
        assert measure_clip(frames) == (colour, None)


def test_a_shaking_shape_has_no_direction():
    random = np.random.default_rng(0)
    for _ in range(50):
        frames = np.stack([draw_frame("red", *random.uniform(16, 48, 2)) for _ in range(9)])
        assert measure_clip(frames).direction is None


def test_diagonal_motion_has_no_direction():
    frames = np.stack([draw_frame("red", 16 + 4 * t, 16 + 4 * t) for t in range(9)])
    assert measure_clip(frames) == ("red", None)


def test_motion_of_a_quarter_of_the_asked_one_has_no_direction():
    frames = np.stack([draw_frame("red", 28 + t, 32) for t in range(9)])
    assert measure_clip(frames) == ("red", None)


@pytest.mark.parametrize("rgb", [(255, 255, 255), (240, 120, 250), (128, 128, 128), (200, 60, 200)])
def test_a_colour_outside_the_palette_is_none(rgb: tuple[int, int, int]):
    frames = DemoClip("red", "left").draw().astype(float)
    coverage = (frames[..., :1] - 40) / (215 - 40)
    recoloured = (coverage * np.array(rgb) + (1 - coverage) * 40).round().astype(np.uint8)
    assert measure_clip(recoloured) == (None, "left")


def test_a_shape_that_vanishes_in_one_frame_shows_nothing():
    frames = DemoClip("red", "left").draw()
    frames[4] = BACKGROUND
    assert measure_clip(frames) == NOTHING


def test_two_shapes_show_nothing():
    frames = np.maximum(DemoClip("red", "left").draw(), DemoClip("red", "right").draw())
    assert measure_clip(frames) == NOTHING


def test_played_backwards_the_direction_turns_round():
    for direction, opposite in [("left", "right"), ("right", "left"), ("up", "down"), ("down", "up")]:
        assert measure_clip(DemoClip("yellow", direction).draw()[::-1]) == ("yellow", opposite)


def test_score_counts_hits_and_never_a_blank_clip(tmp_path: Path):
    captions = all_captions()
    for index, clip in enumerate(all_clips()):
        frames = clip.draw()
        if index == 0:
            frames = np.full_like(frames, 40)  # neither
        elif index == 1:
            frames = frames[::-1]  # the wrong direction
        elif index == 2:
            frames = DemoClip("blue", clip.direction).draw()  # the wrong colour
        write_video(tmp_path / f"{index:04d}.mp4", frames, 8)
    colour_hits, direction_hits, rows = score(tmp_path, captions)
    assert (colour_hits, direction_hits) == (14, 14)
    assert [(r.colour_hit, r.direction_hit) for r in rows[:4]] == [
        (False, False),
        (True, False),
        (False, True),
        (True, True),
    ]


def test_score_refuses_a_wrong_number_of_clips_a_broken_clip_and_an_open_caption(tmp_path: Path):
    with pytest.raises(DataError, match=r"DATA-080.*0 mp4 files for 16 captions"):
        score(tmp_path, all_captions())
    (tmp_path / "0.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match=r"DATA-081.*0.mp4"):
        score(tmp_path, ["a red circle moving left"])
    with pytest.raises(DataError, match=r"DATA-082.*a circle"):
        score(tmp_path, ["a circle"])
