"""Samples that are given their first latent frame beside others that are not: what the model sees, and what counts."""

import torch

from mm.config.diffusion import DiffusionConfig
from mm.config.model import WanConfig, of_task
from mm.config.tasks.registry import TASKS
from mm.data.loader import FeatureBatch
from mm.diffusion.flow import FlowMatching
from mm.train.parts import draw_parts, frames_of_parts, learned_elements, noisy_latents, timesteps_of_runs

SHAPE = {"hidden_size": 48, "ffn_dim": 64, "num_heads": 4, "num_layers": 1, "text_dim": 8}
TEXT = WanConfig(**SHAPE)
TI2V = of_task(WanConfig(**SHAPE, in_dim=48, out_dim=48), TASKS["ti2v"])
CPU = torch.device("cpu")


def batch(frames: int, channels: int, count: int = 16) -> FeatureBatch:
    return FeatureBatch(
        latents=torch.randn(count, channels, frames, 4, 6, generator=torch.Generator().manual_seed(2)),
        text=torch.zeros(count, 3, 8),
        sample=[f"clip {index}" for index in range(count)],
        draw=[0] * count,
        features={},
    )


def test_a_given_frame_is_clean_at_timestep_0_and_out_of_the_loss() -> None:
    flow, segment = FlowMatching(DiffusionConfig()), batch(3, 48)
    (parts,) = draw_parts(flow, [segment], TI2V, 5, CPU)
    clean, noise = segment["latents"], torch.randn(16, 48, 3, 4, 6)
    noisy, (timestep, runs) = noisy_latents(flow, clean, noise, parts), timesteps_of_runs(parts)
    sigma, timesteps, _ = flow.draw_timesteps(5, segment["sample"], segment["draw"])
    given = flow.draw_given_frames(5, segment["sample"], segment["draw"], 0.5).bool()
    assert 0 < given.sum() < 16
    assert runs == (6, 12)
    assert torch.equal(noisy[given, :, :1], clean[given, :, :1])
    plain = flow.noisy(clean, noise, sigma)
    assert torch.equal(noisy[given, :, 1:], plain[given, :, 1:])
    assert torch.equal(noisy[~given], plain[~given])
    assert torch.equal(timestep[:, 1], timesteps)
    assert torch.equal(timestep[:, 0], torch.where(given, 0, timesteps))
    elements = learned_elements(parts, clean)
    assert isinstance(elements, torch.Tensor)
    assert elements.tolist() == [48 * 24 * (2 if one else 3) for one in given]
    assert torch.equal(parts[0].weight == 0, given)


def test_single_frames_and_other_tasks_are_one_part() -> None:
    flow = FlowMatching(DiffusionConfig())
    assert frames_of_parts(batch(1, 48), TI2V) == (1,)
    assert frames_of_parts(batch(3, 16), TEXT) == (3,)
    for segment, wan in ((batch(1, 48), TI2V), (batch(3, 16), TEXT)):
        (parts,) = draw_parts(flow, [segment], wan, 5, CPU)
        assert timesteps_of_runs(parts)[1] == ()
        assert learned_elements(parts, segment["latents"]) == segment["latents"][0].numel()
