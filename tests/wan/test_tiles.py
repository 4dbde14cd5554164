"""Tiles of the VAE: where they begin; the frame's edges are no worse than its inside. With the trained tiny VAE."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mm.config.run.encoders import Tiles
from mm.demo.components import load_vae
from mm.wan.encoders import VideoEncoder
from mm.wan.tiles import origins

# latent height and width, tile, stride; diffusers begins one tile more on an axis or on both
ENDS_IN_A_STRIP = [
    ((14, 14), (6, 6), (4, 4)),
    ((12, 14), (8, 8), (4, 3)),
    ((12, 13), (8, 8), (3, 2)),
    ((11, 13), (8, 8), (4, 4)),
]
EDGE = 8  # pixels


@pytest.fixture(scope="module")
def vae() -> Any:
    return load_vae()


@pytest.mark.parametrize(
    ("length", "size", "stride", "expected"),
    [
        (7, 4, 2, [0, 2, 4]),
        (10, 6, 3, [0, 3, 6]),
        (9, 4, 3, [0, 3, 6]),
        (6, 6, 2, [0]),
        (8, 6, 4, [0, 4]),
        (5, 3, 2, [0, 2]),
        (60, 30, 15, [0, 15, 30]),
        (104, 52, 26, [0, 26, 52]),
        (3, 6, 2, [0]),
        (12, 6, 6, [0, 6]),
        (13, 6, 6, [0, 6, 12]),
    ],
)
def test_a_tile_begins_where_the_one_before_has_not_reached_the_edge(
    length: int, size: int, stride: int, expected: list[int]
) -> None:
    """The first rows are tiles of DiffSynth-Studio, whose rule this is."""
    assert origins(length, size, stride) == expected


def of_diffusers(vae: Any, size: tuple[int, int], stride: tuple[int, int], latents: Tensor) -> Tensor:
    vae.enable_tiling(*(8 * side for side in (*size, *stride)))
    try:
        return VideoEncoder(vae).decode(latents)
    finally:
        vae.disable_tiling()


def edges_and_inside(tiled: Tensor, whole: Tensor) -> tuple[list[float], list[float]]:
    """Mean error of the last rows and columns, and the largest of equally wide bands inside."""
    error = (tiled - whole).abs().mean((0, 1, 2))
    edges, inside = [], []
    for line in (error.mean(1), error.mean(0)):
        bands = line.view(-1, EDGE).mean(1)
        edges.append(bands[-1].item())
        inside.append(bands[1:-1].max().item())
    return edges, inside


@pytest.mark.parametrize(("frame", "size", "stride"), ENDS_IN_A_STRIP)
def test_edges_are_no_worse_than_the_inside(
    vae: Any, frame: tuple[int, int], size: tuple[int, int], stride: tuple[int, int]
) -> None:
    latents = torch.randn(12, 16, 1, *frame, generator=torch.Generator().manual_seed(0))
    whole = VideoEncoder(vae).decode(latents)
    tiled = VideoEncoder(vae, Tiles(size=size, stride=stride)).decode(latents)
    assert tiled.shape == whole.shape
    edges, inside = edges_and_inside(tiled, whole)
    assert edges[0] <= inside[0] and edges[1] <= inside[1]
    theirs, _ = edges_and_inside(of_diffusers(vae, size, stride, latents), whole)
    assert sum(edges) < 0.8 * sum(theirs)


def test_the_last_tile_reaches_the_edge_with_all_it_sees(vae: Any) -> None:
    """Behind the blend a tiled frame is that tile decoded by itself, up to the last row and column."""
    latents = torch.randn(1, 16, 2, 8, 10, generator=torch.Generator().manual_seed(1))
    tiled = VideoEncoder(vae, Tiles(size=(6, 6), stride=(2, 4))).decode(latents)
    corner = VideoEncoder(vae).decode(latents[..., 2:, 4:])
    assert torch.equal(tiled[..., -16:, -32:], corner[..., -16:, -32:])


@pytest.mark.parametrize("frame", [(6, 8), (4, 8), (6, 3)])
def test_a_frame_that_fits_into_a_tile_is_whole(vae: Any, frame: tuple[int, int]) -> None:
    whole, tiled = VideoEncoder(vae), VideoEncoder(vae, Tiles(size=(6, 8), stride=(2, 3)))
    latents = torch.randn(1, 16, 2, *frame, generator=torch.Generator().manual_seed(2))
    assert torch.equal(tiled.decode(latents), whole.decode(latents))
    pixels = torch.rand(1, 3, 5, 8 * frame[0], 8 * frame[1], generator=torch.Generator().manual_seed(3)) * 2 - 1
    assert torch.equal(tiled.encode(pixels), whole.encode(pixels))


def test_encoding_ends_without_a_strip_too(vae: Any) -> None:
    pixels = torch.rand(2, 3, 5, 8 * 8, 14 * 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = VideoEncoder(vae).encode(pixels)
    tiled = VideoEncoder(vae, Tiles(size=(10, 8), stride=(5, 4))).encode(pixels)
    error = (tiled - whole).abs().mean((0, 1, 2))
    assert error[-1].mean() <= error[1:-1].mean(1).max()
    assert error[:, -1].mean() <= error[:, 1:-1].mean(0).max()
    vae.enable_tiling(80, 64, 40, 32)
    theirs = (VideoEncoder(vae).encode(pixels) - whole).abs().mean((0, 1, 2))
    vae.disable_tiling()
    assert error[:, -1].mean() < 0.2 * theirs[:, -1].mean()
