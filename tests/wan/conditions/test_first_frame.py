"""TI2V-5B's clean first frame and timesteps of tokens against Wan2.2's numbers."""

from collections.abc import Callable

import pytest
import torch

from mm.errors import ConfigError
from mm.wan.conditions.first_frame import (
    learned_frames,
    token_timesteps,
    with_clean_first_frame,
    with_given_frame,
)
from mm.wan.inputs import ModelInputs

Numbers = dict[str, torch.Tensor]
Pixels = Callable[[str], torch.Tensor]
Encode = Callable[[torch.Tensor], torch.Tensor]


def test_the_first_frame_is_clean(numbers: Numbers, pixels: Pixels, encode_48: Encode) -> None:
    first = encode_48(pixels("image_5b")[None, :, None])
    torch.testing.assert_close(first[0], numbers["ti2v.wan22.first_frame_latents"], rtol=0, atol=5e-6)
    noise = torch.randn(48, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    found = with_clean_first_frame(noise.unsqueeze(0), first)
    torch.testing.assert_close(found[0], numbers["ti2v.wan22.latents"], rtol=0, atol=5e-6)


def test_timesteps_of_tokens(numbers: Numbers) -> None:
    expected = numbers["ti2v.wan22.timestep_per_token"]
    found = token_timesteps(torch.tensor([999.0, 250.5]), (3, 4, 6), (1, 2, 2))
    assert torch.equal(found[0], expected)
    assert found[1].tolist() == [0.0] * 6 + [250.5] * 12


def test_timesteps_that_are_given_stay() -> None:
    timestep = torch.tensor([999.0])
    token_timesteps(timestep, (3, 4, 6), (1, 2, 2))
    assert timestep.tolist() == [999.0]


def test_the_first_frame_is_not_learned() -> None:
    assert learned_frames(3).tolist() == [False, True, True]


@pytest.mark.parametrize("shape", [(1, 48, 3, 4, 6), (1, 16, 1, 4, 6), (2, 48, 1, 4, 6), (48, 1, 4, 6)])
def test_a_first_frame_that_does_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"CFG-259: .*expected \[1, 48, 1, 4, 6\]"):
        with_clean_first_frame(torch.zeros(1, 48, 3, 4, 6), torch.zeros(shape))


def test_inputs_with_a_given_frame_have_two_runs() -> None:
    noisy, first = torch.ones(2, 48, 3, 4, 6), torch.full((2, 48, 1, 4, 6), 7.0)
    found = with_given_frame(ModelInputs(noisy, torch.tensor([999.0, 250.5]), torch.zeros(2, 3, 8)), first, (1, 2, 2))
    assert found.runs == (6, 12)
    assert found.timestep.tolist() == [[0, 999], [0, 250.5]]
    assert found.latents[0, 0, :, 0, 0].tolist() == [7, 1, 1]
