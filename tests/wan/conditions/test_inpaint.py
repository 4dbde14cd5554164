"""Fun-InP's masks and conditions against VideoX-Fun's numbers, and those of the systems that agree with it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mm.errors import ConfigError
from mm.wan.conditions.inpaint import inpaint_condition, kept_frames_mask, mask_channels
from mm.wan.conditions.known_frames import condition_latents
from mm.wan.conditions.pixels import ClipSize

SIZE = ClipSize(9, 32, 48)
KINDS = (
    "block_all_frames", "all_ones", "first_frames", "first_and_last_frames", "block_some_frames", "pixel_noise",
    "small_blocks", "ellipse", "circle", "circle_one_frame", "random_frames", "only_first_frame",
)  # fmt: skip
Numbers = dict[str, torch.Tensor]
Pixels = Callable[[str], torch.Tensor]
Encode = Callable[[torch.Tensor], torch.Tensor]


def assert_is(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)


@pytest.fixture(scope="module")
def masks(oracles: Path) -> Numbers:
    return load_file(oracles / "inpaint_masks.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_channels_of_a_mask(masks: Numbers, kind: str) -> None:
    assert torch.equal(mask_channels(masks[f"{kind}.pixel"].float()), masks[f"{kind}.latent"])


def test_no_kind_is_left_out(masks: Numbers) -> None:
    assert {name.split(".")[0] for name in masks} == set(KINDS)


@pytest.mark.parametrize("kept", [(0,), (0, -1)])
def test_kept_frames(numbers: Numbers, pixels: Pixels, encode: Encode, kept: tuple[int, ...]) -> None:
    """As VideoX-Fun's InP, DiffSynth's and Wan's I2V and FLF2V, and our own I2V condition."""
    images = dict(zip((0, -1), (pixels("start_image"), pixels("end_image")), strict=True))
    video = torch.full((3, 9, 32, 48), 0.25)  # what is not kept must not be seen
    for index in kept:
        video[:, index] = images[index]
    found = inpaint_condition(encode, SIZE, video, kept_frames_mask(SIZE, kept))
    known = condition_latents(encode, {index: images[index].unsqueeze(0) for index in kept}, 9)[0]
    both = ("inp.videox_fun.y_start_end", "flf2v.diffsynth.y")
    one = ("inp.videox_fun.y_start", "i2v.diffsynth.y", "i2v.wan21.y", "i2v.wan22_a14b.y")
    for name in one if len(kept) == 1 else both:
        assert_is(found, numbers[name])
        assert_is(known, numbers[name])


def test_first_and_last_of_81_frames(numbers: Numbers, pixels: Pixels, encode: Encode) -> None:
    corner = {index: pixels(name)[None, :, :16, :16] for index, name in ((0, "start_image"), (-1, "end_image"))}
    assert_is(condition_latents(encode, corner, 81)[0], numbers["flf2v.wan21.y_81_frames_top_left_16x16"])


def test_video_and_mask(numbers: Numbers, pixels: Pixels, encode: Encode) -> None:
    found = inpaint_condition(encode, SIZE, pixels("video"), pixels("mask"))
    assert_is(found, numbers["inp.videox_fun.y_mask"])


def test_what_is_to_be_generated_is_not_looked_at(pixels: Pixels, encode: Encode) -> None:
    video, mask = pixels("video"), pixels("mask")
    other = torch.where(mask > 0.5, -video, video)
    found = inpaint_condition(encode, SIZE, video, mask)
    assert torch.equal(inpaint_condition(encode, SIZE, other, mask), found)
    assert not torch.equal(inpaint_condition(encode, SIZE, -video, mask), found)


def test_nothing_known_is_zero_as_a_whole(pixels: Pixels, encode: Encode) -> None:
    """As VideoX-Fun's pipeline has it; the trainer keeps one in ten, whose latents are the code of grey."""
    mask = torch.ones(9, 32, 48)
    found = inpaint_condition(encode, SIZE, pixels("video"), mask)
    assert found.shape == (20, 3, 4, 6) and not found.any()
    kept = inpaint_condition(encode, SIZE, pixels("video"), mask, nothing_known_is_zero=False)
    assert not kept[:4].any() and torch.equal(kept[4:], encode(torch.zeros(1, 3, 9, 32, 48))[0])
    mask[-1, -1, -1] = 0  # a single known pixel
    assert inpaint_condition(encode, SIZE, pixels("video"), mask)[4:].any()
    nothing = inpaint_condition(encode, SIZE)
    assert nothing.shape == (20, 3, 4, 6) and not nothing.any()


def test_grey_masks_are_split_in_the_middle(pixels: Pixels, encode: Encode) -> None:
    grey = pixels("mask_grey")
    split = (grey * 255).round() >= 128
    found, expected = (inpaint_condition(encode, SIZE, pixels("video"), mask) for mask in (grey, split.float()))
    assert torch.equal(found, expected)


def never(video: torch.Tensor) -> torch.Tensor:
    raise AssertionError("what does not fit was encoded")


VIDEO, MASK = torch.zeros(3, 9, 32, 48), torch.zeros(9, 32, 48)


@pytest.mark.parametrize(
    ("video", "mask", "id", "told"),
    [
        (VIDEO, torch.zeros(9, 4, 6), "CFG-252", "[9, 4, 6], the clip's pixels are [9, 32, 48]"),
        (VIDEO, torch.zeros(5, 32, 48), "CFG-252", "[5, 32, 48]"),
        (VIDEO, torch.zeros(1, 9, 32, 48), "CFG-252", "[1, 9, 32, 48]"),
        (VIDEO, None, "CFG-252", "A video was given without a mask"),
        (None, MASK, "CFG-252", "A mask was given without a video"),
        (VIDEO, MASK + 255, "CFG-256", "from 255 to 255, expected 0 to 1"),
        (VIDEO, MASK - 1, "CFG-256", "from -1 to -1, expected 0 to 1"),
        (VIDEO, MASK.to(torch.uint8), "CFG-256", "uint8"),
        (VIDEO[:, :5], MASK, "CFG-253", "The video"),
    ],
)
def test_what_does_not_fit(video: torch.Tensor | None, mask: torch.Tensor | None, id: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        inpaint_condition(never, SIZE, video, mask)
    assert caught.value.id == id and told in caught.value.problems[0].message


def test_frames_that_are_not_there() -> None:
    assert kept_frames_mask(SIZE, [0, -9]).sum() == 8 * 32 * 48
    for index in (9, -10):
        with pytest.raises(ConfigError, match=f"CFG-252: Frame {index} is to be kept of a clip of 9 frames"):
            kept_frames_mask(SIZE, [index])
