"""The encoders against the pipelines of diffusers that users compare with, on tiny random weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from feature_samples import make_text_encoder, make_tokenizer, make_vae
from safetensors.torch import load_file, save_file

from mm.config.run.encoders import Tiles
from mm.config.tasks.registry import TASKS
from mm.errors import DataError
from mm.wan.encoders import TextEncoder, VideoEncoder, clean_text, require_stride
from mm.wan.tokenizer import open_tokenizer

CPU = torch.device("cpu")
CAPTIONS = [
    "a red circle moving left",
    "",
    "x",
    "  a\n\tblue   square &amp;amp; <b>  ",
    "sch√∂n ‚Äútext‚Äù",
    "红色圆圈",
]


def video(frames: int = 9, height: int = 32, width: int = 48, batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def pipeline() -> Any:
    tokenizer = make_tokenizer()
    parts = {"scheduler": None, "transformer": None, "vae": make_vae()}
    return WanPipeline(tokenizer=tokenizer, text_encoder=make_text_encoder(len(tokenizer)), **parts)


@pytest.mark.parametrize("captions", [CAPTIONS, CAPTIONS[:1], [" ".join(["red"] * 700)]])
def test_text_is_what_the_diffusers_pipeline_embeds(captions: list[str], weights: Path) -> None:
    encoder = TextEncoder.from_pretrained(weights / "text_encoder", weights / "tokenizer", "fp32", CPU)
    with torch.no_grad():
        expected, _ = pipeline().encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=512)
    found = encoder.encode(captions)
    for embedding, reference in zip(found, expected, strict=True):
        length = len(embedding)
        assert torch.allclose(embedding, reference[:length], rtol=1e-5, atol=1e-5)
        assert reference[length - 1].any() and not reference[length:].any()  # the true length, neither more nor less


def test_a_caption_alone_and_in_company(weights: Path) -> None:
    encoder = TextEncoder.from_pretrained(weights / "text_encoder", weights / "tokenizer", "fp32", CPU)
    together = encoder.encode(CAPTIONS)
    for caption, embedding in zip(CAPTIONS, together, strict=True):
        assert torch.allclose(encoder.encode([caption])[0], embedding, rtol=1e-5, atol=1e-5)
    assert encoder.encode([""])[0].shape == (1, 32)  # the closing token


def test_a_cut_caption_is_told(weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = TextEncoder.from_pretrained(weights / "text_encoder", weights / "tokenizer", "fp32", CPU, max_length=16)
    (embedding,) = encoder.encode(["red " * 40])
    assert len(embedding) == 16
    assert "only 16 of 41 tokens" in caplog.text


def test_cleaning_is_that_of_wan() -> None:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    for text in [*CAPTIONS, "a&lt;b&gt;", "&amp;lt;", "\u3000全角　空格\u3000", "l‚Äôeau", "\x85x\u2028y", "ﬁne"]:
        assert clean_text(text) == prompt_clean(text)


def test_latents_are_the_normalised_mode(weights: Path) -> None:
    encoder = VideoEncoder.from_pretrained(weights / "vae", "fp32", CPU)
    vae = make_vae()
    with torch.no_grad():
        mode = vae.encode(video(batch=2)).latent_dist.mode()
    mean = torch.tensor(vae.config.latents_mean).view(1, 16, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, 16, 1, 1, 1)
    found = encoder.encode(video(batch=2))
    assert found.shape == (2, 16, 3, 4, 6)
    assert torch.allclose(found, (mode - mean) / std, rtol=1e-6, atol=1e-6)


def test_decoding_is_what_the_diffusers_pipeline_does(weights: Path) -> None:
    """The pipeline's last lines: latents / (1 / std) + mean, decode, clamp in its postprocessing."""
    encoder = VideoEncoder.from_pretrained(weights / "vae", "fp32", CPU)
    vae = make_vae()
    latents = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    mean = torch.tensor(vae.config.latents_mean).view(1, 16, 1, 1, 1)
    scale = 1.0 / torch.tensor(vae.config.latents_std).view(1, 16, 1, 1, 1)
    with torch.no_grad():
        expected = vae.decode(latents / scale + mean).sample.clamp(-1, 1)
    assert torch.allclose(encoder.decode(latents), expected, rtol=1e-5, atol=1e-5)
    assert encoder.decode(latents).shape == (1, 3, 9, 32, 48)


def test_encode_then_decode_undo_the_same_normalisation(weights: Path) -> None:
    encoder = VideoEncoder.from_pretrained(weights / "vae", "fp32", CPU)
    with torch.no_grad():
        plain = encoder.vae.decode(encoder.vae.encode(video()).latent_dist.mode()).sample.clamp(-1, 1)
    assert torch.allclose(encoder.decode(encoder.encode(video())), plain, rtol=1e-4, atol=1e-4)


def test_tiles_are_those_of_diffusers(weights: Path) -> None:
    tiling = Tiles(size=(4, 5), stride=(3, 4))
    tiled = VideoEncoder.from_pretrained(weights / "vae", "fp32", CPU, tiling)
    vae = make_vae()
    vae.enable_tiling(32, 40, 24, 32)  # pixels: minimum height and width, stride of height and width
    pixels = video(5, 64, 80)
    with torch.no_grad():
        mode = vae.encode(pixels).latent_dist.mode()
    mean = torch.tensor(vae.config.latents_mean).view(1, 16, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, 16, 1, 1, 1)
    found = tiled.encode(pixels)
    assert torch.allclose(found, (mode - mean) / std, rtol=1e-6, atol=1e-6)
    whole = VideoEncoder.from_pretrained(weights / "vae", "fp32", CPU).encode(pixels)
    assert found.shape == whole.shape and not torch.equal(found, whole)
    with torch.no_grad():
        decoded = vae.decode(mode).sample.clamp(-1, 1)
    assert torch.allclose(tiled.decode(found), decoded, rtol=1e-4, atol=1e-4)
    untiled = VideoEncoder.from_pretrained(weights / "vae", "fp32", CPU).decode(found)
    assert decoded.shape == untiled.shape and not torch.allclose(untiled, decoded, atol=1e-3)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_precision(dtype: Any, weights: Path) -> None:
    expected = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    encoder = TextEncoder.from_pretrained(weights / "text_encoder", weights / "tokenizer", dtype, CPU)
    assert encoder.encode(["a red circle"])[0].dtype == expected
    if dtype == "bf16":
        assert VideoEncoder.from_pretrained(weights / "vae", dtype, CPU).encode(video()).dtype == expected


def test_a_vae_of_another_stride_is_refused() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=8, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True], scale_factor_spatial=4
    )
    with pytest.raises(DataError, match="DATA-044"):
        VideoEncoder(vae).encode(video())


def vae_of_wan22() -> AutoencoderKLWan:
    """The kind of Wan2.2's TI2V-5B, small: 2x2 pixels become channels before three halvings; 48 channels of latents."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=8, decoder_base_dim=12, z_dim=48, dim_mult=[1, 2, 4, 4], num_res_blocks=1, is_residual=True,
        in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16,
        latents_mean=[0.01 * channel for channel in range(48)], latents_std=[0.5 + 0.02 * c for c in range(48)],
    )  # fmt: skip
    return vae.eval()


def test_latents_of_wan22_s_vae_are_those_of_diffusers(tmp_path: Path) -> None:
    """Against the VAE itself, normalised as diffusers' pipelines do, and its own pixels back."""
    vae_of_wan22().save_pretrained(tmp_path)
    encoder, vae = VideoEncoder.from_pretrained(tmp_path, "fp32", CPU), AutoencoderKLWan.from_pretrained(tmp_path)
    pixels = video(9, 64, 96)
    mean, std = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        expected = (vae.encode(pixels).latent_dist.mode() - mean) / std
        decoded = vae.decode(expected * std + mean).sample
    latents = encoder.encode(pixels)
    assert latents.shape == (1, 48, 3, 4, 6)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(encoder.decode(latents), decoded, rtol=0, atol=1e-6)
    assert decoded.shape == pixels.shape


def test_tiles_of_wan22_s_vae_are_counted_in_its_latent_pixels() -> None:
    """A tile as large as the frame gives the frame; smaller ones give as many latents."""
    vae, pixels = vae_of_wan22(), video(5, 64, 96)
    whole = VideoEncoder(vae).encode(pixels)
    assert torch.equal(VideoEncoder(vae, Tiles(size=(4, 6), stride=(4, 6))).encode(pixels), whole)
    tiled = VideoEncoder(vae, Tiles(size=(3, 4), stride=(2, 2)))
    assert tiled.encode(pixels).shape == whole.shape
    assert tiled.decode(whole).shape == pixels.shape


def test_a_vae_of_another_models_stride_is_named(weights: Path) -> None:
    small, large = VideoEncoder.from_pretrained(weights / "vae", "fp32", CPU), VideoEncoder(vae_of_wan22())
    for encoder, task in ((small, TASKS["t2v"]), (large, TASKS["ti2v"])):
        require_stride("vae", encoder, task)
    with pytest.raises(DataError, match=r"DATA-260: vae has a latent pixel for 8x8 pixels, .*16x16"):
        require_stride("vae", small, TASKS["ti2v"])
    with pytest.raises(DataError, match=r"DATA-260: vae has a latent pixel for 16x16 pixels, .*8x8"):
        require_stride("vae", large, TASKS["t2v"])


def load(folder: Path, part: str) -> object:
    if part == "vae":
        return VideoEncoder.from_pretrained(folder / "vae", "fp32", CPU)
    return TextEncoder.from_pretrained(folder / "text_encoder", folder / "tokenizer", "fp32", CPU)


FILES = {"vae": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_weights_that_do_not_fit(part: str, weights: Path, tmp_path: Path) -> None:
    shutil.copytree(weights, tmp_path / "w")
    file = tmp_path / "w" / part / FILES[part]
    whole = load_file(file)
    name = "decoder.conv_in.weight" if part == "vae" else "encoder.final_layer_norm.weight"

    def refused(content: dict[str, torch.Tensor] | bytes, id: str) -> str:
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            save_file(content, file, {"format": "pt"})
        with pytest.raises(DataError) as caught:
            load(tmp_path / "w", part)
        assert caught.value.id == id and str(tmp_path / "w" / part) in str(caught.value)
        return str(caught.value)

    assert f"missing {name}" in refused({k: v for k, v in whole.items() if k != name}, "DATA-041")
    assert "unexpected extra" in refused({**whole, "extra": torch.zeros(2)}, "DATA-041")
    refused({**whole, name: torch.zeros(3)}, "DATA-041")
    save_file(whole, file, {"format": "pt"})
    content = file.read_bytes()
    refused(content[: len(content) // 2], "DATA-042")
    refused(b"", "DATA-042")
    file.unlink()
    with pytest.raises(DataError, match="DATA-040"):
        load(tmp_path / "w", part)
    (tmp_path / "w" / part / "config.json").unlink()
    with pytest.raises(DataError, match="DATA-040"):
        load(tmp_path / "w", part)


def test_pickled_weights_are_not_read(weights: Path, tmp_path: Path) -> None:
    shutil.copytree(weights, tmp_path / "w")
    file = tmp_path / "w" / "text_encoder" / "model.safetensors"
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()
    with pytest.raises(DataError, match=r"DATA-040.*no safetensors"):
        load(tmp_path / "w", "text_encoder")


@pytest.mark.parametrize("names", [("shared.weight",), ("encoder.embed_tokens.weight",), "both"])
def test_either_name_of_the_shared_embedding_will_do(names: Any, weights: Path, tmp_path: Path) -> None:
    shutil.copytree(weights, tmp_path / "w")
    file = tmp_path / "w" / "text_encoder" / "model.safetensors"
    content = load_file(file)
    embedding = content.pop("shared.weight")
    names = ("shared.weight", "encoder.embed_tokens.weight") if names == "both" else names
    save_file({**content, **{name: embedding.clone() for name in names}}, file, {"format": "pt"})
    found = load(tmp_path / "w", "text_encoder")
    expected = load(weights, "text_encoder")
    assert isinstance(found, TextEncoder) and isinstance(expected, TextEncoder)
    assert torch.equal(found.encode(["a red circle"])[0], expected.encode(["a red circle"])[0])


def test_tokenizers_that_do_not_fit(weights: Path, tmp_path: Path) -> None:
    shutil.copytree(weights, tmp_path / "w")
    shutil.rmtree(tmp_path / "w" / "tokenizer")
    with pytest.raises(DataError, match="DATA-043"):
        load(tmp_path / "w", "text_encoder")
    (tmp_path / "w" / "tokenizer").mkdir()
    (tmp_path / "w" / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    (tmp_path / "w" / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="DATA-043"):
        load(tmp_path / "w", "text_encoder")
    with pytest.raises(DataError, match=r"DATA-043.*107 tokens, the text encoder 20|DATA-043.*text encoder 20"):
        TextEncoder(make_text_encoder(20), open_tokenizer(weights / "tokenizer"))


def test_fp32_encoders_are_not_computed_in_tf32(weights: Path) -> None:
    """Seen from inside the modules; what it was before is put back. On a CPU the switch has no effect on numbers."""
    seen: list[tuple[str, str]] = []

    def note(module: Any, inputs: Any) -> None:
        seen.append((torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision))

    vae = VideoEncoder.from_pretrained(weights / "vae", "fp32", CPU)
    text = TextEncoder.from_pretrained(weights / "text_encoder", weights / "tokenizer", "fp32", CPU)
    modules = (vae.vae.encoder, vae.vae.decoder, text.model)
    hooks = [module.register_forward_pre_hook(note) for module in modules]
    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    assert before[0] == "tf32"  # what torch does by itself
    vae.decode(vae.encode(video(1)))
    text.encode(["x"])
    for hook in hooks:
        hook.remove()
    assert set(seen) == {("ieee", "ieee")} and len(seen) >= 3
    assert before == (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision)
