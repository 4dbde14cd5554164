"""Joins the processes that torchrun started, and parts them again."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from mm.config.place import ProcessPlace
from mm.errors import EXIT_CHECKPOINT, EXIT_HANG, ConfigError, RestartError
from mm.supervise.fingerprint import CHECK_NODES, agree, fingerprint
from mm.supervise.mailbox import Failure, as_record
from mm.supervise.messages import Messages
from mm.supervise.rendezvous import SECRET, job_secret, on_one_node, serve_store, stay_on_this_node

logger = logging.getLogger(__name__)

MAY_RESTART = (EXIT_CHECKPOINT, EXIT_HANG)
"""Exit codes after which the same command may do better at once."""
_ENDED = "how the start before ended"


class Job:
    """The processes of one run, joined. Use it as a context manager so that they part in order when all is done."""

    def __init__(
        self,
        where: ProcessPlace,
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
            configuration: what must be equal on all ranks besides the code, by name (`mm.supervise.fingerprint`).

        Raises:
            ConfigError: CFG-031, CFG-090, CFG-091, CFG-150, CFG-151, before any process group exists; CFG-202 where one
                does.
        """
        if dist.is_initialized():
            found = "This process is in a process group of torch.distributed already."
            raise ConfigError("CFG-202", found, "Call torch.distributed.destroy_process_group() first.")
        self.rank = where.rank
        self.world_size = where.world_size
        self.local_rank = where.local_rank
        timeout = datetime.timedelta(minutes=timeout_minutes)
        self._secret = job_secret()
        if self._secret is None and where.world_size > 1 and where.rank == 0:
            logger.warning(
                "%s is not set: whoever reaches MASTER_PORT can end this job. Give it the same random text on all "
                "nodes; mm.cli.launch does so for a job of one node (docs/cluster.md).",
                SECRET,
            )
        self._store = open_job_store(where, timeout)
        self._memory = Messages(self._store.base, self._secret, "all starts")
        self._refuse_vain_restart()
        store = self._store.of_start()
        if on_one_node(where):
            stay_on_this_node()
        if where.world_size > 1:
            agree(
                self._messages(store, "agree"),
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

    def messages(self, timeout_s: float) -> Messages | None:
        """Messages over a client of the store that no long wait holds; None in a job of one process.

        Args:
            timeout_s: how long it waits for an answer.
        """
        if self.world_size == 1:
            return None
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        client = dist.TCPStore(  # type: ignore[attr-defined]
            address, port, is_master=False, timeout=datetime.timedelta(seconds=timeout_s), wait_for_workers=False
        )
        return self._messages(PrefixStore(self._store.prefix, client), "mailbox")

    def _messages(self, store: Store, name: str) -> Messages:
        """Signed messages under a name in the store of this start."""
        return Messages(PrefixStore(name, store), self._secret, f"{self._store.prefix}/{name}")

    def remember(self, exit_code: int, text: str) -> None:
        """Leave word for the processes that a launcher may start in place of these (torchrun's `--max-restarts`)."""
        with contextlib.suppress(dist.DistError):
            self._memory.write(_ENDED, asdict(Failure(0, exit_code, text)))

    def _refuse_vain_restart(self) -> None:
        """A launcher starts again whatever ended; where another start cannot help, end with the same error.

        Raises:
            MMError: RUN-002, with the exit code of the start before.
        """
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            return
        ended = as_record(Failure, self._memory.read(_ENDED))
        if ended is None or ended.exit_code in MAY_RESTART:
            return
        found = f"after exit code {ended.exit_code}, which another start cannot mend: {ended.text}"
        error = RestartError("RUN-002", f"The launcher started this job again {found}", "Mend that first.")
        error.exit_code = ended.exit_code
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


def join_until_exit(
    where: ProcessPlace, collective: str, device: torch.device, timeout_minutes: int, configuration: Mapping[str, Any]
) -> None:
    """Join the processes of a script until its interpreter ends; those that it has joined itself stay as they are.

    Args:
        where, collective, device, timeout_minutes, configuration: as for `Job`, and what that raises is raised.
    """
    if dist.is_initialized():
        return
    Job(where, collective, device, timeout_minutes, configuration)
    atexit.register(_part)  # after an error, too: its text is out by then


def _part() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


class JobStore(NamedTuple):
    """The job's key-value store, and what the keys of this start begin with."""

    base: Store
    prefix: str

    def of_start(self) -> Store:
        """The store with keys that only this start uses."""
        return PrefixStore(self.prefix, self.base)


def open_job_store(where: ProcessPlace, timeout: datetime.timedelta) -> JobStore:
    """The key-value store of the job.

    As torch's `env://` does, but without waiting for the other processes, which nothing would name. torchrun already
    runs a store at MASTER_ADDR:MASTER_PORT and says so; started otherwise, rank 0 runs it.

    Raises:
        ConfigError: CFG-031 when the address is missing or malformed; CFG-091 when the store cannot be reached, or rank
            0 cannot open its port; CFG-150 when the address of a job of one node is not the node's.
    """
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    launcher_has_one = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if where.world_size == 1 and not launcher_has_one:  # a store inside the process needs no port, whatever is set
        return JobStore(dist.HashStore(), "start")  # type: ignore[attr-defined]  # missing from torch's __all__
    if not address or not port or not port.isdecimal() or int(port) >= 2**16:
        found = f"MASTER_ADDR={address}, MASTER_PORT={port}"
        raise ConfigError("CFG-031", f"The launcher's variables make no sense: {found}.", "Use torchrun.")
    try:
        serves = where.rank == 0 and not launcher_has_one
        if serves and on_one_node(where):
            store = serve_store(address, int(port), timeout)
        else:
            store = dist.TCPStore(  # type: ignore[attr-defined]
                address, int(port), is_master=serves, timeout=timeout, wait_for_workers=False, multi_tenant=True
            )
        # The launcher's store outlives its workers' restarts, and one process may join more than once.
        start = store.add(f"starts of rank {where.rank}", 1)
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        message = f"Rank {where.rank} cannot reach the job's store at {address}:{port}: {reason}"
        raise ConfigError("CFG-091", message, CHECK_NODES) from None
    prefix = f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}.{start}"
    return JobStore(store, prefix)
