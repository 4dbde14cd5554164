"""Image features and condition latents against diffusers' image-to-video pipeline, with the same VAE and encoder."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

from mm.demo.components import load_vae, make_scheduler, make_text_encoder, make_tokenizer, make_transformer
from mm.errors import DataError
from mm.wan.conditions.known_frames import condition_latents, known_frames_mask
from mm.wan.encoders import VideoEncoder
from mm.wan.image_encoder import ImageEncoder

CPU = torch.device("cpu")


def tiny_clip() -> CLIPVisionModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    return CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=224, patch_size=14)).eval()


@pytest.fixture(scope="module")
def pipeline() -> WanImageToVideoPipeline:
    tokenizer = make_tokenizer()
    return WanImageToVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=make_text_encoder(len(tokenizer)),
        image_encoder=tiny_clip(),
        image_processor=CLIPImageProcessor(),
        transformer=make_transformer(),
        vae=load_vae(),
        scheduler=make_scheduler(),
    )


@pytest.mark.parametrize("with_last", [False, True], ids=["i2v", "flf2v"])
@pytest.mark.parametrize("num_frames", [5, 13])
def test_condition_is_that_of_diffusers(pipeline: WanImageToVideoPipeline, num_frames: int, with_last: bool) -> None:
    random = torch.Generator().manual_seed(1)
    first, last = (torch.rand(1, 3, 32, 48, generator=random) * 2 - 1 for _ in range(2))
    given = {0: first, -1: last} if with_last else {0: first}
    _, expected = pipeline.prepare_latents(
        first, 1, height=32, width=48, num_frames=num_frames, dtype=torch.float32, device=CPU, last_image=given.get(-1)
    )
    found = condition_latents(VideoEncoder(pipeline.vae).encode, given, num_frames)
    assert found.shape == (1, 20, (num_frames + 3) // 4, 4, 6)
    assert torch.equal(found[:, :4], expected[:, :4])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_mask_of_81_frames() -> None:
    first, both = known_frames_mask(81, [0]), known_frames_mask(81, [0, -1])
    assert first.shape == both.shape == (4, 21)
    assert first.sum() == 4 and first[:, 0].tolist() == [1, 1, 1, 1]
    assert (both - first).nonzero().tolist() == [[3, 20]]


def test_features_are_those_of_diffusers(pipeline: WanImageToVideoPipeline) -> None:
    """At CLIP's own size, where diffusers resizes and cuts nothing either."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    expected = pipeline.encode_image([Image.fromarray(image) for image in pixels], CPU)
    encoder = ImageEncoder(pipeline.image_encoder)
    frames = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    found = encoder.encode(frames)
    assert found.shape == (2, encoder.num_tokens, encoder.width) == (2, 257, 32)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_the_whole_frame_is_seen(pipeline: WanImageToVideoPipeline) -> None:
    """A wide frame is squeezed: its outermost columns reach the features, and a flat one is as flat at any size."""
    encoder = ImageEncoder(pipeline.image_encoder)
    grey = encoder.encode(torch.full((1, 3, 224, 224), 0.25))
    wide = torch.full((1, 3, 48, 160), 0.25)
    torch.testing.assert_close(encoder.encode(wide), grey, rtol=0, atol=2e-5)
    wide[..., -4:] = 1
    assert (encoder.encode(wide) - grey).abs().max() > 1e-3


def test_a_folder_with_the_projection_of_clip(tmp_path: Path) -> None:
    """As diffusers' conversion of Wan2.1 I2V saves it; the tensors carry the prefix of the larger model."""
    plain = tiny_clip()
    whole = CLIPVisionModelWithProjection(plain.config).eval()
    whole.vision_model.load_state_dict(plain.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    assert "visual_projection.weight" in load_file(tmp_path / "whole" / "model.safetensors")
    frames = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = ImageEncoder.from_pretrained(tmp_path / "whole", "fp32", CPU).encode(frames)
    assert torch.equal(found, ImageEncoder(plain).encode(frames))


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    tiny_clip().save_pretrained(tmp_path / "clip")
    assert ImageEncoder.from_pretrained(tmp_path / "clip", "bf16", CPU).model.dtype == torch.bfloat16
    with pytest.raises(DataError, match="DATA-040"):
        ImageEncoder.from_pretrained(tmp_path / "nothing", "fp32", CPU)
    make_text_encoder(50).save_pretrained(tmp_path / "text")
    with pytest.raises(DataError, match=r"DATA-04[12]"):
        ImageEncoder.from_pretrained(tmp_path / "text", "fp32", CPU)
