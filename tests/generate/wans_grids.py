"""diffusers' schedulers, asked by a pipeline for the Wan release's noise levels: the reference for our samplers."""

from typing import Any

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler


class UniPCOnWansGrid(UniPCMultistepScheduler):
    """From 0.999 (in fp32) to 0, the last point left out; the scheduler shifts them."""

    def set_timesteps(self, num_inference_steps: Any = None, device: Any = None, **kwargs: Any) -> None:
        first = float(np.float32(0.999))
        sigmas = [first - first * step / num_inference_steps for step in range(num_inference_steps)]
        super().set_timesteps(sigmas=np.array(sigmas), device=device)


class EulerOnWansGrid(FlowMatchEulerDiscreteScheduler):
    """1, 1 - 1/S, ...; the scheduler shifts them."""

    def set_timesteps(self, num_inference_steps: Any = None, device: Any = None, **kwargs: Any) -> None:
        sigmas = [1 - step / num_inference_steps for step in range(num_inference_steps)]
        super().set_timesteps(sigmas=sigmas, device=device)
