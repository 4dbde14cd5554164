"""VACE's context against Wan2.1's, DiffSynth-Studio's and VideoX-Fun's numbers, and diffusers' pipeline."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import pytest
import torch
from diffusers import WanVACEPipeline
from PIL import Image

from mm.canvas import white_canvas
from mm.config.tasks.registry import TASKS
from mm.data.clips import Clip
from mm.demo.components import load_vae, make_scheduler, make_text_encoder, make_tokenizer, make_transformer
from mm.errors import ConfigError
from mm.extract.sources import VisualEncoders, feature_makers, latents_in_front
from mm.wan.conditions.pixels import ClipSize
from mm.wan.conditions.vace import blanked, mask_channels, vace_context
from mm.wan.encoders import VideoEncoder

SIZE = ClipSize(9, 32, 48)
CASES = {
    "video_mask": ("video", "mask", ()),
    "video_mask_1ref": ("video", "mask", ("reference_image_1",)),
    "video_mask_2refs": ("video", "mask", ("reference_image_1", "reference_image_2")),
    "video_only": ("video", None, ()),
    "ref_only": (None, None, ("reference_image_1",)),
    "video_mask_grey": ("video", "mask_grey", ()),
}
Numbers = dict[str, torch.Tensor]
Pixels = Callable[[str], torch.Tensor]
Encode = Callable[[torch.Tensor], torch.Tensor]


def assert_is(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("case", CASES)
def test_context(numbers: Numbers, pixels: Pixels, encode: Encode, case: str) -> None:
    video, mask, references = CASES[case]
    found = vace_context(
        encode,
        SIZE,
        None if video is None else pixels(video),
        None if mask is None else pixels(mask),
        [pixels(name) for name in references],
    )
    assert_is(found, numbers[f"vace.{case}.wan21"])


@dataclass(frozen=True)
class StandIn:
    """The oracle's VAE where extraction has Wan's."""

    encode: Encode


@pytest.mark.parametrize("case", ["video_mask_1ref", "video_mask_2refs", "ref_only"])
def test_extraction_makes_these_contexts(numbers: Numbers, pixels: Pixels, encode: Encode, case: str) -> None:
    """Of a row with these files; the latents in front of the clip's are the references', as trainers noise them."""
    video, mask, references = CASES[case]
    beside = {} if video is None or mask is None else {"vace_video": pixels(video), "mask": pixels(mask)}
    canvases = [white_canvas(pixels(name), SIZE.height, SIZE.width) for name in references]
    clip = Clip(pixels("video"), 0, "memory", beside={**beside, "vace_reference": torch.stack(canvases)})
    vae = cast(VideoEncoder, StandIn(encode))
    features = {name: make(clip, {}) for name, make in feature_makers(VisualEncoders(TASKS["vace"], vae, vae)).items()}
    assert_is(features["vace_context"], numbers[f"vace.{case}.wan21"])
    in_front = latents_in_front(TASKS["vace"], features, encode(clip.pixels[None])[0])
    assert_is(in_front, torch.cat([encode(canvas[None, :, None])[0] for canvas in canvases], dim=1))


def test_a_blanked_video_is_that_of_videox_fun(numbers: Numbers, pixels: Pixels, encode: Encode) -> None:
    """Nothing of what is masked is left: the second part is the code of grey."""
    video, mask = pixels("video"), pixels("mask")
    found = vace_context(encode, SIZE, blanked(video, mask), mask)
    assert_is(found, numbers["vace.video_mask.videox_fun_video"])
    assert torch.equal(found[16:32], encode(torch.zeros(1, 3, 9, 32, 48))[0])
    hidden = torch.where(mask > 0.5, -video, video)
    assert torch.equal(vace_context(encode, SIZE, blanked(hidden, mask), mask), found)
    assert not torch.equal(vace_context(encode, SIZE, hidden, mask), vace_context(encode, SIZE, video, mask))


def test_diffsynth_splits_by_grey_values(numbers: Numbers, pixels: Pixels, encode: Encode) -> None:
    """The mask's channels are alike; how the video is split is not, and ours is Wan2.1's."""
    theirs = numbers["vace.video_mask_grey.diffsynth"]
    found = vace_context(encode, SIZE, pixels("video"), pixels("mask_grey"))
    assert_is(found[32:], theirs[32:])
    mask, video = pixels("mask_grey"), pixels("video")
    assert_is(encode((video * mask).unsqueeze(0))[0], theirs[16:32])
    assert (found[:32] - theirs[:32]).abs().max() > 0.01


def test_nothing_given_is_grey_that_changes(encode: Encode) -> None:
    found = vace_context(encode, SIZE)
    grey = encode(torch.zeros(1, 3, 9, 32, 48))[0]
    assert torch.equal(found, torch.cat((grey, grey, torch.ones(64, 3, 4, 6))))


def test_references_stand_in_front_in_their_order() -> None:
    """With a code of pixels that is their value: each is a frame of its own, and zeros where nothing changes."""
    values = (-0.5, 0.25, 1.0)
    images = [torch.full((3, SIZE.height, SIZE.width), value) for value in values]
    found = vace_context(lambda x: x[:, :1, ::4, ::8, ::8].repeat(1, 16, 1, 1, 1), SIZE, references=images)
    assert found.shape == (96, 3 + 3, 4, 6)
    for frame, value in enumerate(values):
        assert torch.equal(found[:16, frame], torch.full((16, 4, 6), value))
        assert not found[16:, frame].any()


def test_frames_and_pixels_of_the_mask() -> None:
    mask = torch.arange(9.0)[:, None, None] * 1000 + torch.arange(16.0)[:, None] * 24 + torch.arange(24.0)
    found = mask_channels(mask)
    assert found.shape == (64, 3, 2, 3)
    for channel, frame, row, column in ((0, 0, 0, 0), (13, 1, 1, 2), (63, 2, 0, 1)):
        pixel = (row * 8 + channel // 8) * 24 + column * 8 + channel % 8
        assert found[channel, frame, row, column] == (1000, 4000, 7000)[frame] + pixel
    assert [int(frame) for frame in mask_channels(torch.arange(81.0).view(81, 1, 1).expand(81, 8, 8))[0, :, 0, 0]] == [
        int((i + 0.5) * 81 / 21) for i in range(21)
    ]


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (10, 10, (0, 8, 32, 40)),  # upright beside the canvas: bars left and right
        (10, 40, (10, 0, 22, 48)),  # wide: bars above and below
        (64, 96, (0, 0, 32, 48)),
        (7, 3, (0, 17, 32, 30)),  # 13.7 columns are 13, the odd bar at the right
        (1, 1000, (15, 0, 16, 48)),  # thinner than a pixel
    ],
)
def test_a_reference_keeps_its_aspect_on_white(height: int, width: int, box: tuple[int, int, int, int]) -> None:
    canvas = white_canvas(torch.full((3, height, width), -0.5), 32, 48)
    top, left, bottom, right = box
    torch.testing.assert_close(canvas[:, top:bottom, left:right], torch.full((3, bottom - top, right - left), -0.5))
    assert int((canvas == 1).sum()) == 3 * (32 * 48 - (bottom - top) * (right - left))


@pytest.fixture(scope="module")
def pipeline() -> WanVACEPipeline:
    tokenizer = make_tokenizer()
    return WanVACEPipeline(
        tokenizer=tokenizer,
        text_encoder=make_text_encoder(len(tokenizer)),
        transformer=make_transformer(),
        vae=load_vae(),
        scheduler=make_scheduler(),
    )


def picture(height: int, width: int, seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def as_pixels(image: Image.Image) -> torch.Tensor:
    raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
    return raw.permute(2, 0, 1).float() / 127.5 - 1


@pytest.mark.parametrize("reference", [None, (16, 64), (96, 32), (32, 48)])
def test_context_is_that_of_diffusers(pipeline: WanVACEPipeline, reference: tuple[int, int] | None) -> None:
    """With the embedded default's VAE; references of other sizes, in multiples of 16, to which diffusers cuts first."""
    frames = [picture(32, 48, seed) for seed in range(9)]
    masks = [picture(32, 48, 100 + seed).convert("L").convert("RGB") for seed in range(9)]
    image = None if reference is None else picture(*reference, 50)
    given = pipeline.preprocess_conditions(frames, masks, image, 1, 32, 48, 9, torch.float32, torch.device("cpu"))
    video, mask, references = given
    latents = pipeline.prepare_video_latents(video, mask, references, device=torch.device("cpu"))
    expected = torch.cat((latents, pipeline.prepare_masks(mask, references)), dim=1)[0]

    found = vace_context(
        VideoEncoder(pipeline.vae).encode,
        SIZE,
        torch.stack([as_pixels(frame) for frame in frames], dim=1),
        torch.stack([(as_pixels(mask)[0] + 1) / 2 for mask in masks]),
        [] if image is None else [as_pixels(image)],
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def never(video: torch.Tensor) -> torch.Tensor:
    raise AssertionError("what does not fit was encoded")


VIDEO, MASK = torch.zeros(3, 9, 32, 48), torch.zeros(9, 32, 48)


@pytest.mark.parametrize(
    ("given", "id", "told"),
    [
        ({"video": VIDEO[:, :5]}, "CFG-253", "ends after 5 of the clip's 9 frames"),
        ({"video": VIDEO[..., :40]}, "CFG-253", "[3, 9, 32, 40]"),
        ({"mask": MASK[:5]}, "CFG-252", "[5, 32, 48]"),
        ({"mask": MASK + 255}, "CFG-256", "from 255"),
        (
            {"references": [torch.zeros(3, 4, 4), torch.zeros(4, 4, 4)]},
            "CFG-254",
            "Reference image 2 is [4, 4, 4], with",
        ),
        ({"references": [torch.zeros(3, 0, 4)]}, "CFG-254", "Reference image 1 is [3, 0, 4]"),
        ({"references": [torch.full((3, 4, 4), 255.0)]}, "CFG-256", "Reference image 1"),
    ],
)
def test_what_does_not_fit(given: dict[str, object], id: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        vace_context(never, SIZE, **given)
    assert caught.value.id == id and told in caught.value.problems[0].message
