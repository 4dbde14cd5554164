"""Names of Wan's video VAEs: the originals (Wan2.1_VAE.pth, Wan2.2_VAE.pth) and diffusers' AutoencoderKLWan.

Wan2.1's original numbers the layers of encoder and decoder through; diffusers keeps the numbers of the encoder and cuts
the decoder into blocks of three residual layers and, but for the last, an upsampler. Wan2.2's is in such blocks on both
sides, in either convention. Source: the published weights of both.
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
_BLOCKS = 4
_ENCODER_WIDENED, _DECODER_NARROWED = (1, 2), (2, 3)
"""Blocks of Wan2.2's whose first residual layer changes the number of channels."""
_ENCODER_TIMED, _DECODER_TIMED = (1, 2), (0, 1)
"""Those whose sampler changes the number of frames too; the last block has no sampler."""


def vae_pairs() -> list[Pair]:
    """All 194 tensors of Wan2.1's; the widths of a VAE are no matter."""
    return [*_around(), *_numbered()]


def vae_22_pairs() -> list[Pair]:
    """All 196 tensors of Wan2.2's; the widths of a VAE are no matter."""
    return [*_around(), *_in_blocks()]


def _around() -> Iterator[Pair]:
    """Layers in front of the blocks and behind them."""
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


def _numbered() -> Iterator[Pair]:
    """Layers of Wan2.1's, which its original numbers through."""
    for index in _ENCODER_RESIDUALS:
        names = f"encoder.downsamples.{index}", f"encoder.down_blocks.{index}"
        yield from _residual(*names, shortcut=index in _ENCODER_SHORTCUTS)
    for index in _ENCODER_SAMPLERS:
        native = f"encoder.downsamples.{index}"
        yield from _sampler(native, f"encoder.down_blocks.{index}", timed=native not in _WITHOUT_TIME)
    for index in range(_DECODER_LAYERS):
        block, place = divmod(index, 4)
        native, diffusers = f"decoder.upsamples.{index}", f"decoder.up_blocks.{block}"
        if place == 3:
            yield from _sampler(native, f"{diffusers}.upsamplers.0", timed=native not in _WITHOUT_TIME)
        else:
            yield from _residual(native, f"{diffusers}.resnets.{place}", shortcut=index in _DECODER_SHORTCUTS)


def _in_blocks() -> Iterator[Pair]:
    """Layers of Wan2.2's: two residual ones of a block of the encoder, three of one of the decoder, and a sampler."""
    sides = (
        ("encoder", "down", 2, _ENCODER_WIDENED, _ENCODER_TIMED),
        ("decoder", "up", 3, _DECODER_NARROWED, _DECODER_TIMED),
    )
    for side, way, layers, changed, timed in sides:
        for block in range(_BLOCKS):
            native, diffusers = f"{side}.{way}samples.{block}.{way}samples", f"{side}.{way}_blocks.{block}"
            for layer in range(layers):
                names = f"{native}.{layer}", f"{diffusers}.resnets.{layer}"
                yield from _residual(*names, shortcut=layer == 0 and block in changed)
            if block < _BLOCKS - 1:
                yield from _sampler(f"{native}.{layers}", f"{diffusers}.{way}sampler", timed=block in timed)


def _residual(native: str, diffusers: str, *, shortcut: bool) -> Iterator[Pair]:
    yield from same(f"{native}.residual.0", f"{diffusers}.norm1", _GAMMA)
    yield from same(f"{native}.residual.2", f"{diffusers}.conv1")
    yield from same(f"{native}.residual.3", f"{diffusers}.norm2", _GAMMA)
    yield from same(f"{native}.residual.6", f"{diffusers}.conv2")
    if shortcut:
        yield from same(f"{native}.shortcut", f"{diffusers}.conv_shortcut")


def _sampler(native: str, diffusers: str, *, timed: bool) -> Iterator[Pair]:
    yield from same(f"{native}.resample.1", f"{diffusers}.resample.1")
    if timed:
        yield from same(f"{native}.time_conv", f"{diffusers}.time_conv")
