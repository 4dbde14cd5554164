"""Joins the processes that torchrun started, and parts them again."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from mm.config.place import Place
from mm.errors import EXIT_CHECKPOINT, EXIT_HANG, ConfigError, RestartError
from mm.parallel.fingerprint import CHECK_NODES, agree, fingerprint

MAY_RESTART = (EXIT_CHECKPOINT, EXIT_HANG)
"""Exit codes after which the same command may do better at once."""
_ENDED = "how the start before ended"


class Job:
    """The processes of one run, joined. Use it as a context manager so that they part in order when all is done."""

    def __init__(
        self,
        where: Place,
        collective: str,
        device: torch.device,
        timeout_minutes: int,
        configuration: Mapping[str, Any] | None = None,
    ) -> None:
        """Compare this process with the others, then join them.

        Args:
            where: this process's place.
            collective: torch's name of the backend, from `mm.device.backend`.
            timeout_minutes: how long to wait for the others, now and in each collective.
            configuration: what must be equal on all ranks besides the code, by name (`mm.parallel.fingerprint`).

        Raises:
            ConfigError: CFG-031, CFG-090, CFG-091, on every rank, before any process group exists.
        """
        self.rank = where.rank
        self.world_size = where.world_size
        self.local_rank = where.local_rank
        timeout = datetime.timedelta(minutes=timeout_minutes)
        self._store = open_store(where, timeout)
        self._refuse_vain_restart()
        store = self._store.of_start()
        if where.world_size > 1:
            agree(
                PrefixStore("agree", store),
                where.rank,
                where.world_size,
                fingerprint(configuration or {}),
                timeout,
            )
        dist.init_process_group(
            collective,
            store=PrefixStore("group", store),
            rank=where.rank,
            world_size=where.world_size,
            timeout=timeout,
            device_id=None if device.type == "cpu" else device,
        )

    def host_group(self, timeout_minutes: int) -> dist.ProcessGroup:
        """A further group of all processes for messages between their hosts (gloo), apart from those of training."""
        return dist.new_group(backend="gloo", timeout=datetime.timedelta(minutes=timeout_minutes))

    def further_store(self, timeout_s: float) -> Store | None:
        """A client of the job's store apart from the others, which no long wait holds; None in a job of one process.

        Args:
            timeout_s: how long it waits for an answer.
        """
        if self.world_size == 1:
            return None
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        client = dist.TCPStore(  # type: ignore[attr-defined]
            address, port, is_master=False, timeout=datetime.timedelta(seconds=timeout_s), wait_for_workers=False
        )
        return PrefixStore(f"{self._store.prefix}/notices", client)

    def remember(self, exit_code: int, text: str) -> None:
        """Leave word for the processes that a launcher may start in place of these (torchrun's `--max-restarts`)."""
        with contextlib.suppress(dist.DistError):
            self._store.base.set(_ENDED, json.dumps([exit_code, text]))

    def _refuse_vain_restart(self) -> None:
        """A launcher starts again whatever ended; where another start cannot help, end with the same error.

        Raises:
            MMError: RUN-002, with the exit code of the start before.
        """
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or not self._store.base.check([_ENDED]):
            return
        exit_code, text = json.loads(self._store.base.get(_ENDED))
        if exit_code in MAY_RESTART:
            return
        error = RestartError(
            "RUN-002",
            f"The launcher started this job again after exit code {exit_code}, which another start cannot mend: {text}",
            "Mend that first.",
        )
        error.exit_code = exit_code
        raise error

    def barrier(self) -> None:
        """Wait until every process of the job has come here."""
        dist.barrier()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        # After an error the others may wait for this process in a collective. Parting here would end them, and then the
        # launcher this process, before its error is told. They see it end by itself.
        if kind is None or self.world_size == 1:
            dist.destroy_process_group()


class JobStore(NamedTuple):
    """The job's key-value store, and what the keys of this start begin with."""

    base: Store
    prefix: str

    def of_start(self) -> Store:
        """The store with keys that only this start uses."""
        return PrefixStore(self.prefix, self.base)


def open_store(where: Place, timeout: datetime.timedelta) -> JobStore:
    """The key-value store of the job.

    As torch's `env://` does, but without waiting for the other processes, which nothing would name. torchrun already
    runs a store at MASTER_ADDR:MASTER_PORT and says so; started otherwise, rank 0 runs it.

    Raises:
        ConfigError: CFG-031 when the address is missing or malformed; CFG-091 when the store cannot be reached, or rank
            0 cannot open its port.
    """
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if where.world_size == 1 and address is None:  # started without torchrun: a store inside the process needs no port
        return JobStore(dist.HashStore(), "start")  # type: ignore[attr-defined]  # missing from torch's __all__
    if not address or not port or not port.isdecimal() or int(port) >= 2**16:
        found = f"MASTER_ADDR={address}, MASTER_PORT={port}"
        raise ConfigError("CFG-031", f"The launcher's variables make no sense: {found}.", "Use torchrun.")
    launcher_has_one = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            address,
            int(port),
            is_master=where.rank == 0 and not launcher_has_one,
            timeout=timeout,
            wait_for_workers=False,
            multi_tenant=True,
        )
        # The launcher's store outlives its workers' restarts, and one process may join more than once.
        start = store.add(f"starts of rank {where.rank}", 1)
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        message = f"Rank {where.rank} cannot reach the job's store at {address}:{port}: {reason}"
        raise ConfigError("CFG-091", message, CHECK_NODES) from None
    prefix = f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}.{start}"
    return JobStore(store, prefix)
