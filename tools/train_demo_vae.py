# mypy: disallow-untyped-calls=False
"""Train a tiny causal Wan VAE of the embedded default and write it as the asset that `mm demo` ships.

    python tools/train_demo_vae.py                    # writes mm/demo/assets/tiny_vae.{safetensors,json}
    python tools/train_demo_vae.py --stride 16        # the same of Wan2.2's kind, tiny_vae_16

About 15 minutes on two CPU cores that do nothing else, and less of Wan2.2's kind, which begins with channels of 2 x 2
pixels. Two stages, because trained on clips from the start the model stays at the background colour:

1. single pictures: the spatial part of every convolution, on its newest time tap only (older taps see zero padding);
2. nine-frame clips: older taps start at zero and the two time convolutions as copies, so that the stage begins with
   a VAE that repeats the last frame of every chunk, and learns motion from there.

The loss is the squared error, with more weight on the shape than on the background, plus a pull of the latents to zero
mean and unit variance. The decoder sees latents with noise of LATENT_NOISE, so that small errors of a generated latent
stay small on the picture. Seeds are fixed; another CPU or OMP_NUM_THREADS rounds otherwise, so another run gives a VAE
of the same quality, not the same bytes. The asset was made with OMP_NUM_THREADS=2.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mm.demo.clips import BACKGROUND, COLOURS, DIRECTIONS, NUM_FRAMES, SIZE, TRAVEL, all_clips, draw_frame
from mm.demo.components import VAE_ASSETS
from mm.rng import generator, key

log = logging.getLogger("train_demo_vae")

SEED = 1
_WIDTHS = {"base_dim": 16, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
MODELS: dict[int, dict[str, Any]] = {
    8: {**_WIDTHS, "z_dim": 16},
    16: {
        **_WIDTHS,
        "z_dim": 48,
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "scale_factor_spatial": 16,
    },
}
"""Configurations by the pixels of a latent pixel."""
LATENT_NOISE = 0.1  # standard deviation, in units of a normalised latent
SHAPE_WEIGHT = 4.0  # extra weight of a pixel that is not background
CLIPS_TO_MEASURE = 8  # variants of every caption for latents_mean and latents_std


def main() -> None:
    """Train both stages and write the asset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_out = Path(__file__).resolve().parents[1] / "mm" / "demo" / "assets"
    parser.add_argument("--out", type=Path, default=default_out, help="folder of the asset")
    parser.add_argument("--stride", type=int, default=8, choices=MODELS, help="pixels of a latent pixel")
    parser.add_argument("--picture-steps", type=int, default=2200, help="steps of stage 1")
    parser.add_argument("--clip-steps", type=int, default=1200, help="steps of stage 2")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    args.out.mkdir(parents=True, exist_ok=True)

    asset = VAE_ASSETS[args.stride]
    torch.manual_seed(key(SEED, "init_weights", "demo_vae", 0))
    vae = AutoencoderKLWan(**MODELS[args.stride])
    start_as_picture_vae(vae)
    log.info("%d parameters", sum(p.numel() for p in vae.parameters()))
    with newest_tap_only():
        train(vae, "pictures", pictures, args.picture_steps, batch=8, peak_lr=2e-3, last_lr=2e-4)
    # The decay is laid out for a third more steps than are run: where it is cut, the error is 0.002 and falls slowly.
    train(
        vae, "clips", clips, args.clip_steps, batch=2, peak_lr=1e-3, last_lr=1e-5, decay_steps=args.clip_steps * 4 // 3
    )
    write_asset(vae, MODELS[args.stride], args.out / asset)


def start_as_picture_vae(vae: AutoencoderKLWan) -> None:
    """Zero the older time taps and make the time convolutions copies, so that a picture VAE is also a clip VAE."""
    with torch.no_grad():
        for name, module in vae.named_modules():
            if not isinstance(module, WanCausalConv3d) or module.kernel_size[0] == 1:
                continue
            module.weight[:, :, :-1] = 0
            if name.endswith("time_conv"):
                copies = module.out_channels // module.in_channels  # 2 where one frame becomes two
                module.weight[:, :, -1, 0, 0] = torch.eye(module.in_channels).repeat(copies, 1)
                module.bias.zero_()


@contextmanager
def newest_tap_only() -> Iterator[None]:
    """Run the causal convolutions of single pictures as 2-D ones: the same numbers at a third of the work."""
    full = WanCausalConv3d.forward

    def flat(self: WanCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        padding = (self._padding[2], self._padding[0])
        return F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=padding).unsqueeze(2)

    WanCausalConv3d.forward = flat
    try:
        yield
    finally:
        WanCausalConv3d.forward = full


def pictures(step: int, batch: int) -> Tensor:
    """Random pictures of a shape, [batch, 3, 1, SIZE, SIZE] in [-1, 1]."""
    random = generator(SEED, "sample_order", "pictures", step)
    names = list(COLOURS)
    frames = []
    for _ in range(batch):
        colour = names[int(torch.randint(len(names), (), generator=random))]
        x, y = (SIZE / 2 + (torch.rand(2, generator=random) - 0.5) * (TRAVEL + 16)).tolist()
        frames.append(draw_frame(colour, x, y)[None])
    return to_model(np.stack(frames))


def clips(step: int, batch: int) -> Tensor:
    """Random clips of a moving shape, [batch, 3, NUM_FRAMES, SIZE, SIZE] in [-1, 1], at 3 to 5 pixels a frame."""
    random = generator(SEED, "sample_order", "clips", step)
    names, directions = list(COLOURS), list(DIRECTIONS.values())
    videos = []
    for _ in range(batch):
        colour = names[int(torch.randint(len(names), (), generator=random))]
        step_x, step_y = directions[int(torch.randint(len(directions), (), generator=random))]
        x, y = (SIZE / 2 + (torch.rand(2, generator=random) - 0.5) * 16).tolist()
        speed = 3 + 2 * float(torch.rand((), generator=random))
        times = [frame - (NUM_FRAMES - 1) / 2 for frame in range(NUM_FRAMES)]
        videos.append(np.stack([draw_frame(colour, x + step_x * speed * t, y + step_y * speed * t) for t in times]))
    return to_model(np.stack(videos))


def to_model(videos: np.ndarray) -> Tensor:
    """uint8 [B, F, H, W, 3] to float [B, 3, F, H, W] in [-1, 1]."""
    return torch.from_numpy(videos).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def train(
    vae: AutoencoderKLWan,
    name: str,
    draw: Callable[[int, int], Tensor],
    steps: int,
    *,
    batch: int,
    peak_lr: float,
    last_lr: float,
    decay_steps: int | None = None,
) -> None:
    """AdamW with warm-up and cosine decay over `decay_steps` (default: all of `steps`) on freshly drawn batches."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=peak_lr, betas=(0.9, 0.99), weight_decay=1e-4)
    began, recent = time.time(), 0.0
    for step in range(steps):
        decay = 0.5 * (1 + math.cos(math.pi * step / (decay_steps or steps)))
        for group in optimizer.param_groups:
            group["lr"] = min((step + 1) / 100, 1.0) * (last_lr + (peak_lr - last_lr) * decay)
        x = draw(step, batch)
        loss, error = loss_of(vae, x, generator(SEED, "noise", name, step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        recent += error
        if (step + 1) % 50 == 0:
            seconds = time.time() - began
            log.info("%s %d/%d  mean squared error %.5f  %.0f s", name, step + 1, steps, recent / 50, seconds)
            recent = 0.0


def loss_of(vae: AutoencoderKLWan, x: Tensor, random: torch.Generator) -> tuple[Tensor, float]:
    """Loss of one batch [B, 3, F, H, W] and its plain mean squared error."""
    posterior = vae.encode(x).latent_dist
    mean = posterior.mean
    decoded = vae.decode(mean + LATENT_NOISE * torch.randn(mean.shape, generator=random)).sample
    background = torch.tensor(BACKGROUND).view(1, 3, 1, 1, 1) / 127.5 - 1
    weight = 1 + SHAPE_WEIGHT * ((x - background).abs().amax(1, keepdim=True) > 0.1).float()
    squared = (decoded - x).square()
    spread = mean.std(dim=(0, 2, 3, 4))
    centre = mean.mean(dim=(0, 2, 3, 4))
    pull = centre.square().mean() + (spread - 1).square().mean()
    # The posterior's variance is not sampled from in training; keep what it claims equal to the noise that is added.
    claimed = (posterior.logvar - 2 * math.log(LATENT_NOISE)).square().mean()
    return (weight * squared).mean() + 0.01 * pull + 1e-4 * claimed, squared.mean().item()


@torch.no_grad()
def write_asset(vae: AutoencoderKLWan, model: dict[str, Any], out: Path) -> None:
    """Write the weights rounded to fp16 and the configuration with the latents' measured mean and deviation."""
    paths = {suffix: out.with_name(f"{out.name}.{suffix}") for suffix in ("safetensors", "json")}
    partials = {suffix: path.with_name(f"{path.name}.partial") for suffix, path in paths.items()}
    weights = {name: value.detach().half().contiguous() for name, value in vae.state_dict().items()}
    rounded = AutoencoderKLWan(**model)
    rounded.load_state_dict({name: value.float() for name, value in weights.items()})
    x = to_model(np.stack([clip.draw() for clip in all_clips(CLIPS_TO_MEASURE)]))
    latents = torch.cat([rounded.encode(part).latent_dist.mean for part in x.split(8)])
    decoded = torch.cat([rounded.decode(part).sample for part in latents.split(8)])
    error = (decoded - x).square().mean().item()
    axes = (0, 2, 3, 4)
    statistics = {"latents_mean": latents.mean(axes).tolist(), "latents_std": latents.std(axes).tolist()}
    statistics = {name: [round(value, 4) for value in values] for name, values in statistics.items()}
    save_file(weights, partials["safetensors"])
    partials["json"].write_text(json.dumps({**model, **statistics}, indent=2) + "\n", encoding="utf-8")
    for suffix, path in paths.items():
        os.replace(partials[suffix], path)
    log.info("wrote %s: mean squared error after rounding %.5f on %d drawn clips", out, error, len(x))


if __name__ == "__main__":
    main()
