"""Place where torchrun put this process; read without torch, so that rules about the world run before any import."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from mm.errors import ConfigError


@dataclass(frozen=True)
class ProcessPlace:
    """Place of a process by torchrun: its rank in the job, the job's size, its index on its node, the node's size."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int = 1


def process_place(environment: Mapping[str, str] = os.environ) -> ProcessPlace:
    """Read a process's place, this one's, from the variables that torchrun sets; a process started alone is 0 of 1.

    Raises:
        ConfigError: CFG-031 when the variables are incomplete or contradict each other.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    values = [environment.get(name) for name in names]
    if all(value is None for value in values):
        return ProcessPlace(0, 1, 0)
    local_world_size = environment.get("LOCAL_WORLD_SIZE", "1")
    try:
        rank, world_size, local_rank = (int(value or "") for value in values)
        if not 0 <= rank < world_size or local_rank < 0 or int(local_world_size) < 1:
            raise ValueError
    except ValueError:
        found = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
        raise ConfigError("CFG-031", f"The launcher's variables make no sense: {found}.", "Use torchrun.") from None
    return ProcessPlace(rank, world_size, local_rank, int(local_world_size))
