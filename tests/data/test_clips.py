from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from feature_samples import write_clip
from PIL import Image

from mm.config.run.extraction import SourceClip
from mm.data.clips import choose_frames, load_clip
from mm.data.metadata import Annotation, Resolution, VideoSample
from mm.data.transforms import resize_and_crop
from mm.data.video import probe, read_frames
from mm.errors import DataError


def sample(file: Path, **annotation: Any) -> VideoSample:
    return VideoSample(file.name, file, ("x",), Annotation(path=file.name, cap="x", **annotation))


def rules(num_frames: int, **changes: Any) -> SourceClip:
    return SourceClip(num_frames=num_frames, height=32, width=48, **changes)


ANY = sample(Path("a.mp4"))


@pytest.mark.parametrize(
    ("available", "min_num_frames", "interval", "length"),
    [
        (81, None, 1, 81),
        (200, None, 1, 81),
        (80, 1, 1, 77),
        (80, 80, 1, 77),
        (5, 1, 1, 5),
        (4, 1, 1, 1),
        (1, 1, 1, 1),
        (161, None, 2, 81),
        (160, 1, 2, 77),  # 80 frames at every second one
        (242, 1, 3, 81),
        (240, 1, 3, 77),
    ],
)
def test_length_is_asked_for_or_the_largest_4k_plus_1(
    available: int, min_num_frames: int | None, interval: int, length: int
) -> None:
    rule = rules(81, min_num_frames=min_num_frames, frame_interval=interval)
    frames = choose_frames(ANY, available, rule, seed=7)
    assert len(frames) == length
    assert frames[0] >= 0 and frames[-1] < available and frames.step == interval


@pytest.mark.parametrize(
    ("available", "min_num_frames", "interval"), [(80, None, 1), (1, None, 1), (40, 41, 1), (160, None, 2)]
)
def test_too_short(available: int, min_num_frames: int | None, interval: int) -> None:
    with pytest.raises(DataError, match=r"DATA-004: a\.mp4 has \d+ frames to use"):
        choose_frames(ANY, available, rules(81, min_num_frames=min_num_frames, frame_interval=interval), seed=7)


def test_start_is_drawn_from_seed_and_name_and_covers_all_places() -> None:
    starts = [choose_frames(ANY, 12, rules(9), seed)[0] for seed in range(60)]
    assert starts == [choose_frames(ANY, 12, rules(9), seed)[0] for seed in range(60)]
    assert set(starts) == {0, 1, 2, 3}
    others = [choose_frames(sample(Path("b.mp4")), 12, rules(9), seed)[0] for seed in range(60)]
    assert starts != others
    assert choose_frames(ANY, 9, rules(9), seed=3)[0] == 0


def test_cut_limits_the_frames() -> None:
    cut = sample(Path("a.mp4"), cut=[10])
    assert {choose_frames(cut, 20, rules(9), seed)[0] for seed in range(30)} == {10, 11}
    both = sample(Path("a.mp4"), cut=[10, 19])
    assert choose_frames(both, 30, rules(9), seed=1) == range(10, 19)
    for bad in ([20], [5, 5], [0, 21]):
        with pytest.raises(DataError, match="DATA-005"):
            choose_frames(sample(Path("a.mp4"), cut=bad), 20, rules(9), seed=1)


def test_annotation_is_compared_with_the_file(tmp_path: Path) -> None:
    file = write_clip(tmp_path / "a.mp4", num_frames=9, height=48, width=64)
    right = sample(file, num_frames=9, resolution=Resolution(height=48, width=64), fps=99)
    assert load_clip(right, rules(9), seed=0).pixels.shape == (3, 9, 32, 48)
    wrong = sample(file, num_frames=10, resolution=Resolution(height=64, width=48))
    with pytest.raises(DataError) as caught:
        load_clip(wrong, rules(9), seed=0)
    assert [p.id for p in caught.value.problems] == ["DATA-005", "DATA-005"]
    assert load_clip(sample(file, num_frames=3, cut=[2, 5]), rules(9, min_num_frames=1), seed=0).start in (2, 3, 4)


def test_clip_is_the_resized_frames_in_order(tmp_path: Path) -> None:
    file = write_clip(tmp_path / "a.mp4", num_frames=30)
    clip = load_clip(sample(file), rules(13, frame_interval=2), seed=5)
    wanted = range(clip.start, clip.start + 25, 2)
    frames = torch.cat(list(read_frames(file, probe(file), wanted, "pyav")))
    assert torch.equal(clip.pixels, resize_and_crop(frames, 32, 48).transpose(0, 1))
    assert clip.num_frames == 13


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((480, 832), (240, 416)),
        ((480, 720), (256, 448)),
        ((97, 61), (32, 48)),
        ((61, 97), (48, 32)),
        ((20, 30), (64, 48)),
    ],
)
def test_resize_and_crop_is_what_pillow_does(source: tuple[int, int], target: tuple[int, int]) -> None:
    """Pillow's bilinear filter is the antialiased one when shrinking; it rounds to whole levels."""
    rows, columns = np.mgrid[: source[0], : source[1]]
    pixels = np.stack([rows % 256, columns % 256, (rows * columns) // 97 % 256], -1).astype(np.uint8)
    scale = max(target[0] / source[0], target[1] / source[1])
    cover = [max(t, round(s * scale)) for s, t in zip(source, target, strict=True)]
    image = Image.fromarray(pixels).resize((cover[1], cover[0]), Image.Resampling.BILINEAR)
    top, left = (cover[0] - target[0]) // 2, (cover[1] - target[1]) // 2
    expected = np.asarray(image.crop((left, top, left + target[1], top + target[0]))) / 127.5 - 1
    found = resize_and_crop(torch.from_numpy(pixels).permute(2, 0, 1)[None], *target)[0].permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() <= 1.01 / 127.5  # one level: Pillow rounds after each direction


def test_same_size_is_not_touched() -> None:
    pixels = torch.arange(2 * 3 * 16 * 16).reshape(2, 3, 16, 16).remainder(256).to(torch.uint8)
    assert torch.equal(resize_and_crop(pixels, 16, 16), pixels.float() / 127.5 - 1)
    assert resize_and_crop(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), 16, 16).min() == -1
    assert resize_and_crop(torch.full((1, 3, 16, 16), 255, dtype=torch.uint8), 32, 16).max() == 1


def test_crop_takes_the_centre() -> None:
    pixels = torch.zeros(1, 3, 16, 48, dtype=torch.uint8)
    pixels[..., 16:32] = 255
    assert (resize_and_crop(pixels, 16, 16) == 1).all()
