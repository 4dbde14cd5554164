"""Names of Wan2.1's video VAE: the original (Wan2.1_VAE.pth) and diffusers' AutoencoderKLWan.

The original numbers the layers of encoder and decoder through; diffusers keeps the numbers of the encoder and cuts the
decoder into blocks of three residual layers and, but for the last, an upsampler. Source: the published weights of both.
"""

from __future__ import annotations

from collections.abc import Iterator

from mm.wan.name_pairs import Pair, same

_GAMMA = ("gamma",)
_ENCODER_RESIDUALS, _ENCODER_SAMPLERS = (0, 1, 3, 4, 6, 7, 9, 10), (2, 5, 8)
_ENCODER_SHORTCUTS, _DECODER_SHORTCUTS = (3, 6), (4,)
"""Residual layers that change the number of channels."""
_DECODER_LAYERS = 15
_WITHOUT_TIME = ("encoder.downsamples.2", "decoder.upsamples.11")
"""Samplers that change the frame's size alone, not the number of frames."""


def vae_pairs() -> list[Pair]:
    """All 194 tensors; the widths of a VAE are no matter."""
    return list(_pairs())


def _pairs() -> Iterator[Pair]:
    yield from same("conv1", "quant_conv")
    yield from same("conv2", "post_quant_conv")
    for side in ("encoder", "decoder"):
        yield from same(f"{side}.conv1", f"{side}.conv_in")
        yield from _residual(f"{side}.middle.0", f"{side}.mid_block.resnets.0", shortcut=False)
        yield from same(f"{side}.middle.1.norm", f"{side}.mid_block.attentions.0.norm", _GAMMA)
        yield from same(f"{side}.middle.1.to_qkv", f"{side}.mid_block.attentions.0.to_qkv")
        yield from same(f"{side}.middle.1.proj", f"{side}.mid_block.attentions.0.proj")
        yield from _residual(f"{side}.middle.2", f"{side}.mid_block.resnets.1", shortcut=False)
        yield from same(f"{side}.head.0", f"{side}.norm_out", _GAMMA)
        yield from same(f"{side}.head.2", f"{side}.conv_out")
    for index in _ENCODER_RESIDUALS:
        names = f"encoder.downsamples.{index}", f"encoder.down_blocks.{index}"
        yield from _residual(*names, shortcut=index in _ENCODER_SHORTCUTS)
    for index in _ENCODER_SAMPLERS:
        yield from _sampler(f"encoder.downsamples.{index}", f"encoder.down_blocks.{index}")
    for index in range(_DECODER_LAYERS):
        block, place = divmod(index, 4)
        native, diffusers = f"decoder.upsamples.{index}", f"decoder.up_blocks.{block}"
        if place == 3:
            yield from _sampler(native, f"{diffusers}.upsamplers.0")
        else:
            yield from _residual(native, f"{diffusers}.resnets.{place}", shortcut=index in _DECODER_SHORTCUTS)


def _residual(native: str, diffusers: str, *, shortcut: bool) -> Iterator[Pair]:
    yield from same(f"{native}.residual.0", f"{diffusers}.norm1", _GAMMA)
    yield from same(f"{native}.residual.2", f"{diffusers}.conv1")
    yield from same(f"{native}.residual.3", f"{diffusers}.norm2", _GAMMA)
    yield from same(f"{native}.residual.6", f"{diffusers}.conv2")
    if shortcut:
        yield from same(f"{native}.shortcut", f"{diffusers}.conv_shortcut")


def _sampler(native: str, diffusers: str) -> Iterator[Pair]:
    yield from same(f"{native}.resample.1", f"{diffusers}.resample.1")
    if native not in _WITHOUT_TIME:
        yield from same(f"{native}.time_conv", f"{diffusers}.time_conv")
