"""Joins the processes that torchrun started, and parts them again."""

from __future__ import annotations

import datetime
import os

import torch
import torch.distributed as dist

from mm.config.place import Place


class Job:
    """The processes of one run, joined. Use it as a context manager so that they part in order."""

    def __init__(self, where: Place, collective: str, device: torch.device, timeout_minutes: int) -> None:
        self.rank = where.rank
        self.world_size = where.world_size
        self.local_rank = where.local_rank
        timeout = datetime.timedelta(minutes=timeout_minutes)
        device_id = None if device.type == "cpu" else device
        if where.world_size > 1 or "MASTER_ADDR" in os.environ:
            dist.init_process_group(collective, timeout=timeout, device_id=device_id)
        else:  # started without torchrun: a store inside the process needs no port
            store = dist.HashStore()  # type: ignore[attr-defined]  # missing from torch's __all__
            dist.init_process_group(collective, store=store, rank=0, world_size=1, timeout=timeout, device_id=device_id)

    def barrier(self) -> None:
        """Wait until every process of the job has come here."""
        dist.barrier()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *exc: object) -> None:
        dist.destroy_process_group()
