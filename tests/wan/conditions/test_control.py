"""Conditions of Fun-Control and Control-Camera models against VideoX-Fun's and DiffSynth-Studio's numbers."""

from collections.abc import Callable

import pytest
import torch

from mm.errors import ConfigError
from mm.wan.conditions.control import control_condition, in_first_frame, reference_latents, start_condition
from mm.wan.conditions.pixels import ClipSize

SIZE = ClipSize(9, 32, 48)
Numbers = dict[str, torch.Tensor]
Pixels = Callable[[str], torch.Tensor]
Encode = Callable[[torch.Tensor], torch.Tensor]


def assert_is(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("start", [None, "start_image"])
def test_control_and_start(numbers: Numbers, pixels: Pixels, encode: Encode, start: str | None) -> None:
    image = None if start is None else pixels(start)
    found = control_condition(encode, SIZE, pixels("control_video"), image)
    assert_is(found, numbers[f"control.videox_fun.y_{'without' if start is None else 'with'}_start"])


def test_what_is_not_given_is_exactly_zero(pixels: Pixels, encode: Encode) -> None:
    video, image = pixels("control_video"), pixels("start_image")
    assert not control_condition(encode, SIZE, video)[16:].any()
    alone = control_condition(encode, SIZE, None, image)
    assert not alone[:16].any() and alone[16:, 0].all() and not alone[16:, 1:].any()
    nothing = control_condition(encode, SIZE)
    assert nothing.shape == (32, 3, 4, 6) and not nothing.any()
    assert not start_condition(encode, SIZE).any() and not reference_latents(encode, SIZE).any()
    assert control_condition(encode, SIZE, channels=48).shape == (96, 3, 4, 6)


def test_zeros_have_the_precision_of_what_is_given(pixels: Pixels, encode: Encode) -> None:
    def narrow(video: torch.Tensor) -> torch.Tensor:
        return encode(video).bfloat16()

    for control, start in ((pixels("control_video"), None), (None, pixels("start_image"))):
        assert control_condition(narrow, SIZE, control, start).dtype == torch.bfloat16


def test_diffsynth_has_the_code_of_grey_behind_the_start_image(
    numbers: Numbers, pixels: Pixels, encode: Encode
) -> None:
    """The two systems agree on all but the start image's later frames; ours are VideoX-Fun's zeros."""
    theirs = numbers["control.diffsynth.y_with_start"]
    found = control_condition(encode, SIZE, pixels("control_video"), pixels("start_image"))
    assert_is(found[:, :1], theirs[:, :1])
    assert_is(found[:16], theirs[:16])
    grey = encode(torch.zeros(1, 3, 9, 32, 48))[0]
    assert_is(theirs[16:, 1:], grey[:, 1:])
    assert not found[16:, 1:].any()


@pytest.mark.parametrize("system", ["videox_fun", "diffsynth"])
def test_camera_models_see_the_start_image(numbers: Numbers, pixels: Pixels, encode: Encode, system: str) -> None:
    assert_is(start_condition(encode, SIZE, pixels("start_image")), numbers[f"camera.{system}.y"])


@pytest.mark.parametrize("system", ["videox_fun", "diffsynth"])
def test_reference(numbers: Numbers, pixels: Pixels, encode: Encode, system: str) -> None:
    found = reference_latents(encode, SIZE, pixels("reference_image_1"))
    assert_is(found, numbers[f"control.{system}.reference_latents"])


def test_an_image_is_a_start_of_one_frame() -> None:
    latents = torch.ones(16, 2, 3)
    assert torch.equal(in_first_frame(latents, 1), latents.unsqueeze(1))


def never(video: torch.Tensor) -> torch.Tensor:
    raise AssertionError("what does not fit was encoded")


@pytest.mark.parametrize(
    ("control", "start", "id", "told"),
    [
        (torch.zeros(3, 5, 32, 48), None, "CFG-253", "ends after 5 of the clip's 9 frames"),
        (torch.zeros(3, 13, 32, 48), None, "CFG-253", "[3, 13, 32, 48], expected [3, 9, 32, 48]"),
        (torch.zeros(3, 9, 48, 32), None, "CFG-253", "[3, 9, 48, 32]"),
        (torch.zeros(1, 9, 32, 48), None, "CFG-253", "[1, 9, 32, 48]"),
        (torch.zeros(9, 3, 32, 48), None, "CFG-253", "[9, 3, 32, 48]"),
        (torch.zeros(1, 3, 9, 32, 48), None, "CFG-253", "[1, 3, 9, 32, 48]"),
        (torch.full((3, 9, 32, 48), 128.0), None, "CFG-256", "from 128 to 128"),
        (torch.zeros(3, 9, 32, 48, dtype=torch.uint8), None, "CFG-256", "uint8"),
        (torch.full((3, 9, 32, 48), torch.nan), None, "CFG-256", "nan"),
        (None, torch.zeros(4, 32, 48), "CFG-254", "with alpha"),
        (None, torch.zeros(1, 32, 48), "CFG-254", "grey"),
        (None, torch.zeros(32, 48), "CFG-254", "[32, 48]"),
        (None, torch.zeros(32, 48, 3), "CFG-254", "[32, 48, 3]"),
        (None, torch.zeros(3, 64, 96), "CFG-254", "64x96 pixels, the clip 32x48"),
        (None, torch.full((3, 32, 48), 1.5), "CFG-256", "from 1.5 to 1.5"),
    ],
)
def test_what_does_not_fit(control: torch.Tensor | None, start: torch.Tensor | None, id: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        control_condition(never, SIZE, control, start)
    assert caught.value.id == id and told in caught.value.problems[0].message


def test_a_reference_that_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="CFG-254: The reference image is 16x16 pixels"):
        reference_latents(never, SIZE, torch.zeros(3, 16, 16))
    with pytest.raises(ConfigError, match=r"CFG-254: The reference image is .*with alpha"):
        reference_latents(never, SIZE, torch.zeros(4, 32, 48))


def test_pixels_that_resizing_rounded_are_taken(encode: Encode) -> None:
    """The largest float32 below one level beyond white."""
    assert reference_latents(encode, SIZE, torch.full((3, 32, 48), 1 + 1e-6)).isfinite().all()


@pytest.mark.parametrize(("frames", "told"), [(8, "5 or 9"), (10, "9 or 13"), (0, "1 or 5"), (4, "1 or 5")])
def test_frames_that_no_latents_stand_for(frames: int, told: str) -> None:
    with pytest.raises(ConfigError, match="CFG-255") as caught:
        ClipSize(frames, 32, 48)
    assert f"Give {told} frames" in caught.value.problems[0].remedy


@pytest.mark.parametrize(("height", "width"), [(30, 48), (32, 44), (0, 48), (-8, 48)])
def test_sizes_that_no_latents_stand_for(height: int, width: int) -> None:
    with pytest.raises(ConfigError, match="CFG-255"):
        ClipSize(9, height, width)
