"""Copies from host memory to the device that nothing waits for."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of host memory on a device, in the order of the device's work; itself where it is there already.

    An accelerator reads page-locked memory by itself. What is not is first copied to such memory, by the process, which
    then goes on; torch keeps that memory until it has been read.
    """
    if torch.device(device).type == "cpu" or x.device.type != "cpu":
        return x.to(device)
    locked = x if x.is_pinned() else x.pin_memory()
    return locked.to(device, non_blocking=True)
