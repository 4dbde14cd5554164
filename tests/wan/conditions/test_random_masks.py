"""Random masks: shares and geometry of each kind, and that draws are by key."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from mm.errors import ConfigError
from mm.wan.conditions.pixels import ClipSize
from mm.wan.conditions.random_masks import (
    SHARES_OF_CLIPS,
    SHARES_OF_IMAGES,
    ZEROED,
    draw_zeroing,
    mask_of_kind,
    random_mask,
)

SIZE = ClipSize(13, 32, 48)
MANY = 400


def masks(kind: str, size: ClipSize = SIZE) -> torch.Tensor:
    """[MANY, frames, height, width] of one kind."""
    random = torch.Generator().manual_seed(5)
    return torch.stack([mask_of_kind(kind, size, random) for _ in range(MANY)])


def box(frame: torch.Tensor) -> tuple[int, int, int, int]:
    """Top, left, height and width of the smallest box around what is filled."""
    rows, columns = frame.any(1).nonzero(), frame.any(0).nonzero()
    top, left = int(rows.min()), int(columns.min())
    return top, left, int(rows.max()) - top + 1, int(columns.max()) - left + 1


def is_block(frame: torch.Tensor) -> bool:
    _, _, tall, wide = box(frame)
    return int(frame.sum()) == tall * wide


def is_uneven(frame: torch.Tensor) -> bool:
    """Tell an ellipse that is no circle, inside the borders, which cut circles too."""
    if not frame.any() or is_block(frame):
        return False
    top, left, tall, wide = box(frame)
    return 0 < top < 32 - tall and 0 < left < frame.shape[1] - wide and tall != wide


def same_in_all(frames: torch.Tensor) -> bool:
    return bool((frames == frames[0]).all())


@pytest.mark.parametrize("kind", SHARES_OF_CLIPS)
def test_masks_are_of_zeros_and_ones(kind: str) -> None:
    found = masks(kind)
    assert found.shape == (MANY, 13, 32, 48) and found.dtype == torch.float32
    assert set(found.unique().tolist()) <= {0.0, 1.0}


def test_a_block_in_all_frames() -> None:
    sides = set()
    for mask in masks("block_all_frames"):
        assert same_in_all(mask) and is_block(mask[0])
        _, _, tall, wide = box(mask[0])
        sides |= {("tall", tall), ("wide", wide)}
        assert tall <= 24 and wide <= 36
    assert {("tall", tall) for tall in range(8, 23, 2)} <= sides and ("wide", 34) in sides  # halves on either side
    assert any(tall < 8 for side, tall in sides if side == "tall"), "none was cut at a border"


def test_a_block_in_some_frames() -> None:
    spans = set()
    for mask in masks("block_some_frames"):
        filled = mask.flatten(1).any(1).nonzero()[:, 0].tolist()
        assert filled == list(range(filled[0], filled[-1] + 1))
        assert same_in_all(mask[filled]) and is_block(mask[filled[0]])
        spans.add((filled[0], filled[-1] + 1))
    assert {begin for begin, _ in spans} == set(range(6)) and {end for _, end in spans} == set(range(6, 13))


def test_all_ones() -> None:
    assert masks("all_ones").all()


@pytest.mark.parametrize(("frames", "most"), [(13, 4), (5, 4)])
def test_first_frames_are_kept(frames: int, most: int) -> None:
    counts = Counter()
    for mask in masks("first_frames", ClipSize(frames, 16, 16)):
        kept = int((mask.flatten(1).sum(1) == 0).sum())
        assert not mask[:kept].any() and mask[kept:].all()
        counts[kept] += 1
    assert set(counts) == set(range(1, most + 1)) and min(counts.values()) > MANY / most / 2


@pytest.mark.parametrize(("frames", "most"), [(13, 4), (9, 4), (5, 2)])
def test_frames_at_both_ends_are_kept(frames: int, most: int) -> None:
    """And something is left between them, however short the clip."""
    counts = Counter()
    for mask in masks("first_and_last_frames", ClipSize(frames, 16, 16)):
        kept = int((mask.flatten(1).sum(1) == 0).sum()) // 2
        assert not mask[:kept].any() and not mask[-kept:].any() and mask[kept:-kept].all() and 2 * kept < frames
        counts[kept] += 1
    assert set(counts) == set(range(1, most + 1)) and min(counts.values()) > MANY / most / 2


def test_noise_is_of_every_pixel_and_frame() -> None:
    found = masks("pixel_noise")
    assert abs(float(found.mean()) - 0.5) < 4 * 0.5 / found.numel() ** 0.5
    assert not any(same_in_all(mask) for mask in found)
    assert (found.mean(0) - 0.5).abs().max() < 6 * 0.5 / MANY**0.5


def test_small_blocks_in_some_frames() -> None:
    counts = set()
    for mask in masks("small_blocks"):
        filled = [frame for frame in mask if frame.any()]
        assert all(is_block(frame) for frame in filled)
        assert max(box(frame)[2] for frame in filled) <= 8 and max(box(frame)[3] for frame in filled) <= 12
        counts.add(len(filled))
    assert counts == set(range(1, 7))
    assert masks("small_blocks").flatten(2).any(2).any(0).all(), "a frame that never has one"


def test_ellipses_and_circles_lie_in_the_first_frame() -> None:
    """Radii are 4 to 8 of 32 rows; one pixel less to either side is filled, as the rim is not."""
    shapes: dict[str, Callable[[int, int], bool]] = {
        "circle": lambda tall, wide: tall == wide,
        "ellipse": lambda tall, wide: 7 <= tall <= 15 and 7 <= wide <= 15,
    }
    for kind, fits in shapes.items():
        sides = set()
        for mask in masks(kind):
            assert mask[0].any() and not mask[1:].any()
            top, left, tall, wide = box(mask[0])
            if top > 0 and left > 0 and top + tall < 32 and left + wide < 48:
                assert fits(tall, wide) and tall % 2 == wide % 2 == 1
                assert mask[0, top + tall // 2, left + wide // 2] and not mask[0, top, left]
                sides.add((tall, wide))
        assert {tall for tall, _ in sides} == {7, 9, 11, 13, 15}
        assert kind == "circle" or any(tall != wide for tall, wide in sides)


def test_a_circle_has_the_pixels_nearer_than_its_radius() -> None:
    for mask in masks("circle")[:20]:
        top, left, tall, wide = box(mask[0])
        if top > 0 and left > 0 and top + tall < 32 and left + wide < 48:
            radius = (tall + 1) // 2
            inside = sum(x * x + y * y < radius**2 for x in range(-radius, radius) for y in range(-radius, radius))
            assert int(mask[0].sum()) == inside


def test_whole_frames() -> None:
    found = masks("random_frames")
    per_frame = found.flatten(2)
    assert (per_frame == per_frame[..., :1]).all()
    assert abs(float(per_frame[..., 0].mean()) - 0.5) < 4 * 0.5 / (MANY * 13) ** 0.5
    assert (per_frame[..., 0].mean(0) - 0.5).abs().max() < 5 * 0.5 / MANY**0.5


@pytest.mark.parametrize("shares", [SHARES_OF_CLIPS, SHARES_OF_IMAGES])
def test_shares_are_a_whole(shares: dict[str, float]) -> None:
    assert sum(shares.values()) == pytest.approx(1)


def test_clips_have_each_kind_at_its_share() -> None:
    """By what tells the kinds apart."""
    found = [random_mask(ClipSize(9, 32, 32), 3, number, 0) for number in range(1500)]

    def share(holds: Callable[[torch.Tensor], bool]) -> float:
        return sum(holds(mask) for mask in found) / len(found)

    def near(rate: float) -> object:
        return pytest.approx(rate, abs=4 * (rate * (1 - rate) / len(found)) ** 0.5)

    def whole(mask: torch.Tensor) -> list[int]:
        flat = mask.flatten(1).mean(1)
        return [int(value) if value in (0, 1) else -1 for value in flat.tolist()]

    begins, ends = (
        [[0] * k + [1] * (9 - k) for k in range(1, 5)],
        [[0] * k + [1] * (9 - 2 * k) + [0] * k for k in range(1, 5)],
    )
    assert share(lambda mask: bool(mask.all())) == near(0.2)
    assert share(lambda mask: whole(mask) in begins) == near(0.2)
    assert share(lambda mask: whole(mask) in ends) == near(0.2)
    assert share(lambda mask: -1 in whole(mask) and same_in_all(mask)) == near(0.05)
    assert share(lambda mask: mask.mean() > 0.45 and whole(mask) == [-1] * 9 and not same_in_all(mask)) == near(0.05)
    assert share(lambda mask: bool(mask[0].any()) and not mask[1:].any() and not is_block(mask[0])) == near(0.15)
    frames = share(lambda mask: set(whole(mask)) == {0, 1} and whole(mask) not in begins + ends)
    assert frames == near(0.05 * (1 - 8 / 512 - 2 / 512))


def test_two_of_three_round_masks_are_ellipses() -> None:
    """Told by those that no border cuts and that are no circles."""
    size = ClipSize(5, 32, 128)
    drawn = (random_mask(size, 3, number, 0) for number in range(2500))
    rounds = [mask[0] for mask in drawn if mask[0].any() and not mask[1:].any() and not is_block(mask[0])]
    found = sum(map(is_uneven, rounds)) / len(rounds)
    expected = 2 / 3 * sum(is_uneven(mask[0]) for mask in masks("ellipse", size)) / MANY
    assert found == pytest.approx(expected, abs=0.07)


def test_images_have_their_own_shares() -> None:
    found = [random_mask(ClipSize(1, 32, 32), 3, number, 0) for number in range(2000)]
    ones = sum(bool(mask.all()) for mask in found) / len(found)
    blocks = sum(not mask.all() and is_block(mask[0]) for mask in found) / len(found)
    assert ones == pytest.approx(0.7, abs=0.04) and blocks == pytest.approx(0.2, abs=0.04)
    assert all(mask.any() for mask in found)


def test_masks_are_drawn_by_key() -> None:
    keys = [(seed, name, draw) for seed in (1, 2) for name in ("a", "b") for draw in range(10)]
    found = [random_mask(SIZE, *key) for key in keys]
    assert all(torch.equal(mask, random_mask(SIZE, *key)) for mask, key in zip(found, keys, strict=True))
    some = [mask for mask in found if not mask.all()]
    assert len({mask.numpy().tobytes() for mask in some}) > len(some) / 2


def test_nothing_known_is_zeroed_in_nine_of_ten() -> None:
    found = [draw_zeroing(ZEROED, 1, number, 0) for number in range(2000)]
    assert sum(found) / len(found) == pytest.approx(0.9, abs=4 * 0.3 / 2000**0.5)
    assert found == [draw_zeroing(ZEROED, 1, number, 0) for number in range(2000)]
    assert found != [draw_zeroing(ZEROED, 1, number, 1) for number in range(2000)]
    assert all(draw_zeroing(1.0, 1, number, 0) and not draw_zeroing(0.0, 1, number, 0) for number in range(20))
    for rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="CFG-260"):
            draw_zeroing(rate, 1, 0, 0)
