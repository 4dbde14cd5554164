"""Tiles that are weighted by masks: their masks and blends against the numbers of another system, and what is held."""

import gc
import json
import os
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mm.config.run.encoders import Tiles
from mm.demo.components import load_vae
from mm.wan.encoders import VideoEncoder
from mm.wan.tile_masks import in_masked_tiles, tile_mask

ROWS = ["7x10_tile4x6_stride2x3", "7x9_tile5x4_stride3x3", "6x8_tile6x6_stride2x4", "5x5_tile3x3_stride2x2"]


@cache
def oracle() -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    folder = os.environ.get("MM_ORACLES")
    if not folder:
        pytest.skip("MM_ORACLES is not set; it names the folder of numbers of other systems")
    facts = json.loads((Path(folder) / "tiled_vae.json").read_text())
    return facts["rows"], load_file(Path(folder) / "tiled_vae.safetensors")


def pairs(text: str) -> list[tuple[int, int]]:
    """`7x10_tile4x6_stride2x3` as three pairs of numbers."""
    parts = text.replace("tile", "").replace("stride", "").split("_")
    return [(int(height), int(width)) for height, width in (part.split("x") for part in parts)]


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("row", ROWS)
def test_tiles_and_blends_are_those_of_diffsynth(row: str, decode: bool) -> None:
    """The k-th tile, counted from 0, gives k/16 throughout, so that the blend shows what each tile weighs."""
    rows, tensors = oracle()
    size, tile, stride = pairs(row)
    (facts,) = [one for one in rows if (one["latent_h_w"], one["tile"]) == (list(size), list(tile))]
    units = (1, 8) if decode else (8, 1)
    before, after = units
    places = torch.arange(size[0] * size[1] * before**2).view(1, 1, 1, size[0] * before, size[1] * before)
    seen: list[list[int]] = []

    def codec(part: Tensor) -> Tensor:
        height, width = (side // before for side in part.shape[-2:])
        top, left = divmod(int(part[0, 0, 0, 0, 0]), size[1] * before)
        seen.append([top // before, left // before, height, width])
        return torch.full((1, 3, 1, height * after, width * after), (len(seen) - 1) / 16)

    found = in_masked_tiles(codec, places, Tiles(size=tile, stride=stride), units)
    assert seen == facts["tiles_top_left_h_w"]
    expected = tensors[f"{'decode' if decode else 'encode'}.{row}.blend"]
    torch.testing.assert_close(found[0, 0, 0], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("row", ROWS)
def test_masks_are_those_of_diffsynth(row: str) -> None:
    """Of a tile with neighbours above, left and right, at the picture's lower edge."""
    _, tensors = oracle()
    _, tile, stride = pairs(row)
    found = tile_mask((5, 5 + tile[0], 5 + tile[0]), (5, 5 + tile[1], 99), Tiles(size=tile, stride=stride), 8)
    expected = tensors[f"decode.{row}.mask_top_open_bottom_edge"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_one_tile_is_the_whole() -> None:
    vae, tiles = load_vae(), Tiles(size=(8, 10), stride=(4, 5))
    source = torch.Generator().manual_seed(0)
    latents, pixels = (
        torch.randn(1, 16, 2, 8, 10, generator=source),
        torch.rand(1, 3, 5, 64, 80, generator=source) - 0.5,
    )
    whole, tiled = VideoEncoder(vae), VideoEncoder(vae, tiles, "masks")
    assert torch.equal(tiled.decode(latents), whole.decode(latents))
    assert torch.equal(tiled.encode(pixels), whole.encode(pixels))


def test_tiles_of_a_vae_differ_from_the_whole_by_what_they_do_not_see() -> None:
    """Where a tile sees as far as the VAE does, its inside is that of the whole; what is blended is near it."""
    vae = load_vae()
    latents = torch.randn(1, 16, 2, 12, 14, generator=torch.Generator().manual_seed(0))
    whole = VideoEncoder(vae).decode(latents)
    error = (VideoEncoder(vae, Tiles(size=(8, 8), stride=(4, 3)), "masks").decode(latents) - whole).abs()
    assert error.shape == whole.shape
    near = (VideoEncoder(vae, Tiles(size=(11, 11), stride=(4, 3)), "masks").decode(latents) - whole).abs()
    assert near.mean() < error.mean() < 0.1 * whole.abs().mean()


def test_one_tile_at_a_time_is_held() -> None:
    held: list[weakref.ref[Tensor]] = []
    most = 0

    def codec(part: Tensor) -> Tensor:
        nonlocal most
        gc.collect()
        made = torch.zeros(*part.shape[:3], *(8 * side for side in part.shape[-2:]))
        held.append(weakref.ref(made))
        most = max(most, sum(ref() is not None for ref in held))
        assert made.shape[-2] <= 32 and made.shape[-1] <= 48  # a tile's, never the picture's
        return made

    found = in_masked_tiles(codec, torch.zeros(1, 16, 1, 8, 12), Tiles(size=(4, 6), stride=(2, 3)), (1, 8))
    assert (found.shape[-2:], len(held), most) == ((64, 96), 9, 1)
