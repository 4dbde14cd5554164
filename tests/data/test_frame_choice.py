"""Which frames of a video a clip takes, by rules of frames."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from feature_samples import write_clip
from pydantic import TypeAdapter

from mm.config.run.extraction import SourceClip
from mm.data.clips import check_announced_length, choose_frames, load_clip
from mm.data.metadata import Annotation, VideoSample
from mm.data.shapes.frames import frames_at_times, shortened, starts_at, usable_at, whole_latents
from mm.errors import DataError


def sample(file: Path, **annotation: Any) -> VideoSample:
    return VideoSample(file.name, file, ("x",), Annotation(path=file.name, cap="x", **annotation))


ANY = sample(Path("a.mp4"))


def rules(num_frames: int, frames: dict[str, Any] | None = None, **changes: Any) -> SourceClip:
    values = {"num_frames": num_frames, "height": 32, "width": 48, "frames": frames or {}, **changes}
    return TypeAdapter(SourceClip).validate_json(json.dumps(values))


def test_frames_of_a_prefix_begin_with_the_first() -> None:
    first = rules(9, {"start": "first"})
    assert list(choose_frames(ANY, 40, first, seed=3)) == list(range(9))
    assert list(choose_frames(sample(Path("a.mp4"), cut=[11]), 40, first, seed=3)) == list(range(11, 20))
    strided = rules(9, {"start": "first"}, frame_interval=3)
    assert list(choose_frames(ANY, 40, strided, seed=3)) == list(range(0, 27, 3))


def test_lengths_are_4k_plus_1_of_whole_multiples() -> None:
    """SimpleTuner asks for 8k + 1; of 75 frames both give 73, and Wan takes 77 and 81 as they are."""
    assert [whole_latents(number) for number in (1, 4, 5, 75, 77, 80, 81)] == [1, 1, 5, 73, 77, 77, 81]
    assert [shortened(number, 20) for number in (19, 20, 39, 40, 79)] == [0, 17, 17, 37, 57]
    clip = rules(81, {"length_multiple": 20}, min_num_frames=5)
    assert [len(choose_frames(ANY, number, clip, seed=1)) for number in (20, 45, 80, 81, 200)] == [17, 37, 77, 81, 81]
    with pytest.raises(DataError, match=r"has 19 frames to use, and at least 20 are asked for"):
        choose_frames(ANY, 19, clip, seed=1)


def test_too_long_videos_are_left_out() -> None:
    clip = rules(9, {"max_frames": 40})
    assert len(choose_frames(ANY, 40, clip, seed=1)) == 9
    assert len(choose_frames(sample(Path("a.mp4"), cut=[1]), 41, clip, seed=1)) == 9
    for check in (lambda: choose_frames(ANY, 41, clip, 1), lambda: check_announced_length(long, clip)):
        with pytest.raises(DataError, match=r"DATA-160: a\.mp4 has 41 frames, and at most 40 are taken"):
            check()


long = sample(Path("a.mp4"), num_frames=41)


def test_a_share_of_clips_is_shorter(tmp_path: Path) -> None:
    file = write_clip(tmp_path / "a.mp4", num_frames=20, height=32, width=48)
    clip = rules(17, {"shorter_share": 0.5})
    names = [VideoSample(f"{number}.mp4", file, ("x",), Annotation(path="a.mp4", cap="x")) for number in range(60)]
    lengths = Counter(load_clip(one, clip, seed=5).num_frames for one in names)
    assert set(lengths) == {5, 9, 13, 17} and 18 <= lengths[17] <= 42, lengths
    assert lengths == Counter(load_clip(one, clip, seed=5).num_frames for one in names)


@pytest.mark.parametrize(
    ("rate", "fps", "expected"),
    [
        (30, 15, [0, 2, 4, 6, 8]),
        (30, 30, [0, 1, 2, 3, 4]),
        (24, 16, [0, 1, 3, 4, 6]),  # 0, 1.5, 3, 4.5, 6: the earlier of two
        (25, 16, [0, 2, 3, 5, 6]),  # 0, 1.56, 3.13, 4.69, 6.25
        (60, 16, [0, 4, 7, 11, 15]),  # 0, 3.75, 7.5, 11.25, 15
        (8, 16, [0, 0, 1, 1, 2]),  # a rate above the video's
        (30000 / 1001, 24, [0, 1, 2, 4, 5]),  # 0, 1.249, 2.498, 3.746, 4.995
    ],
)
@pytest.mark.parametrize("unit", [0, 1000], ids=["exact", "milliseconds"])
def test_rates_take_the_nearest_frames(rate: float, fps: float, expected: list[int], unit: int) -> None:
    times = [number / rate for number in range(60)]
    times = [round(time * unit) / unit for time in times] if unit else times
    assert frames_at_times(times, 0, fps, 5) == expected


def test_rates_leave_room_for_the_whole_clip() -> None:
    times = [number / 30 for number in range(31)]  # 0 to 1 s
    assert usable_at(times, 16) == 17 and usable_at(times[:30], 16) == 16
    assert starts_at(times, 16, 17) == 1 and starts_at(times, 16, 9) == 16  # up to 0.5 s, frame 15
    drawn = {tuple(choose_frames(ANY, 31, rules(9, {"fps": 16.0}), seed, times=times)) for seed in range(200)}
    assert {frames[0] for frames in drawn} == set(range(16))
    assert all(frames[-1] == frames[0] + 15 for frames in drawn)
    with pytest.raises(DataError, match=r"DATA-004: a\.mp4 has 17 frames to use at 16 a second"):
        choose_frames(ANY, 31, rules(21, {"fps": 16.0}), 1, times=times)
    assert len(choose_frames(ANY, 31, rules(21, {"fps": 16.0}, min_num_frames=5), 1, times=times)) == 17
    cut = choose_frames(sample(Path("a.mp4"), cut=[10]), 31, rules(9, {"fps": 16.0, "start": "first"}), 1, times=times)
    assert list(cut) == [10, 12, 14, 16, 17, 19, 21, 23, 25]
    with pytest.raises(DataError, match="DATA-162"):
        choose_frames(ANY, 31, rules(9, {"fps": 16.0}), 1)


def write_uneven(file: Path, times: list[int]) -> list[np.ndarray[Any, Any]]:
    """A video whose frames, each of one grey, are shown at these milliseconds; returns the frames as PyAV has them."""
    with av.open(str(file), "w", format="matroska") as container:
        stream = container.add_stream("mpeg4", rate=1000)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for number, time in enumerate(times):
            picture = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 6 * number, np.uint8), format="rgb24")
            picture.pts = time
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    with av.open(str(file)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_uneven_frames_are_taken_by_their_times(tmp_path: Path) -> None:
    """20 frames at 50 a second, then 10 at 10 a second: at 10 a second every fifth of the first, then each."""
    times = [*range(0, 400, 20), *range(400, 1400, 100)]
    frames = write_uneven(tmp_path / "a.mkv", times)
    clip = load_clip(sample(tmp_path / "a.mkv"), rules(13, {"fps": 10.0, "start": "first"}), seed=1)
    wanted = [0, 5, 10, 15, *range(20, 29)]
    assert clip.taken is not None and clip.taken["frames"] == wanted
    assert torch.equal((clip.pixels * 127.5 + 127.5).round().byte().permute(1, 2, 3, 0),
                       torch.from_numpy(np.stack([frames[number] for number in wanted])))  # fmt: skip
    twice = load_clip(sample(tmp_path / "a.mkv"), rules(5, {"fps": 100.0, "start": "first"}), seed=1)
    assert twice.taken is not None and twice.taken["frames"] == [0, 0, 1, 1, 2] and twice.num_frames == 5
    assert torch.equal(twice.pixels[:, 0], twice.pixels[:, 1])
