"""Numbers of other systems, and the linear stand-in for the VAE that they were made with."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture(scope="session")
def oracles() -> Path:
    """The folder of numbers that other systems computed."""
    folder = os.environ.get("MM_ORACLES")
    if not folder:
        pytest.skip("MM_ORACLES is not set; it names the folder of numbers of other systems")
    return Path(folder)


@pytest.fixture(scope="session")
def numbers(oracles: Path) -> dict[str, torch.Tensor]:
    """Inputs and conditions of other systems, by name."""
    return load_file(oracles / "conditions.safetensors")


def linear_vae(numbers: dict[str, torch.Tensor], name: str, stride: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """What conditions.json says of the stand-in: means of pixels, mixed linearly, four frames to a latent one."""
    first, group, bias = (numbers[f"{name}.{part}"] for part in ("first", "group", "bias"))

    def encode(video: torch.Tensor) -> torch.Tensor:
        batch, _, frames, height, width = video.shape
        means = video.reshape(batch, 3, frames, height // stride, stride, width // stride, stride).mean((4, 6))
        latents = [torch.einsum("cp,bphw->bchw", first, means[:, :, 0])]
        for start in range(1, frames, 4):
            latents.append(torch.einsum("kcp,bpkhw->bchw", group, means[:, :, start : start + 4]))
        return torch.stack(latents, dim=2) + bias.view(1, -1, 1, 1, 1)

    return encode


@pytest.fixture(scope="session")
def encode(numbers: dict[str, torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    return linear_vae(numbers, "vae", 8)


@pytest.fixture(scope="session")
def encode_48(numbers: dict[str, torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    return linear_vae(numbers, "vae48", 16)


@pytest.fixture(scope="session")
def pixels(numbers: dict[str, torch.Tensor]) -> Callable[[str], torch.Tensor]:
    """An input by its name: images [3, H, W] and videos [3, T, H, W] in [-1, 1], masks [T, H, W] in [0, 1]."""

    def find(name: str) -> torch.Tensor:
        value = numbers[f"input.{name}"].float()
        return value / 255 if "mask" in name else value.movedim(-1, 0) / 127.5 - 1

    return find
