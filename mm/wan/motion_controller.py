"""The module that turns a speed into a change of the time modulation."""

from __future__ import annotations

from torch import Tensor, nn

from mm.config.model import WanConfig
from mm.wan.layers import ModuleFactories
from mm.wan.sinusoid import timestep_sinusoid

_TIMESTEPS = 10  # what one of the hundred numbers is on the scale of the 1000 timesteps


class MotionController(nn.Module):
    """Linear, SiLU, linear, SiLU, linear on the sinusoid of the number; computed in fp32, as the time embedding is.

    New ones start with zeros in the last linear, so that training begins with the model as it was.

    Source: the controller that DiffSynth-Studio published for the 1.3B model; its file has the parameters of `linear`.
    """

    def __init__(self, config: WanConfig, parts: ModuleFactories) -> None:
        super().__init__()
        self.freq_dim, width = config.freq_dim, config.hidden_size
        self.linear = nn.Sequential(
            parts.linear_fp32(self.freq_dim, width),
            nn.SiLU(),
            parts.linear_fp32(width, width),
            nn.SiLU(),
            parts.linear_fp32(width, 6 * width),
        )

    def forward(self, motion_bucket_id: Tensor) -> Tensor:
        """[B] numbers from 0 to 100, of any dtype, to [B, 6, D] fp32."""
        out: Tensor = self.linear(timestep_sinusoid(motion_bucket_id.float() * _TIMESTEPS, self.freq_dim))
        return out.unflatten(1, (6, -1))
