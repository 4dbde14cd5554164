"""Runs one function on several processes joined by gloo: the one way tests start ranks."""

import faulthandler
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from queue import Empty
from typing import Any

ANY_PORT = "0"
"""MASTER_PORT of a job of one node under `mm.cli.launch`, which takes a free one and holds it from then on."""


_servers: set[int] = set()
"""Process ids of the servers that `start_server` has started here."""


def start_server() -> None:
    """Start the server that ranks and readers are forked from, unless it runs.

    It imports once what both need, for seconds of computing; without that every rank would do so for itself. A server
    that something else has started, after this one was killed, has not: it is replaced.
    """
    server = multiprocessing.forkserver._forkserver  # type: ignore[attr-defined]  # no public word for its process
    if server._forkserver_pid not in {None, *_servers}:
        os.kill(server._forkserver_pid, signal.SIGKILL)
        os.waitid(os.P_PID, server._forkserver_pid, os.WEXITED | os.WNOWAIT)  # which ensure_running then sees
    multiprocessing.get_context("forkserver").set_forkserver_preload(["mm.train.loop", "mm.extract.run"])
    multiprocessing.forkserver.ensure_running()
    _servers.add(server._forkserver_pid)


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120) -> list[Any]:
    """Call `function(*args)` on `world_size` new processes whose environment is torchrun's.

    Args:
        world_size: number of processes.
        function: importable at module level; joins the job itself (`mm.supervise.job.Job`). Its result must be
            small and made of plain Python objects.
        args: passed on as they are.
        timeout_s: after it every process is killed, each having dumped its stacks.

    Returns:
        The results by rank.
    """
    import torch.distributed as dist

    start_server()
    context = multiprocessing.get_context("forkserver")
    results = context.Queue()
    # As under torchrun, the launcher runs the store: no port can be taken between choosing and using it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    processes = [
        context.Process(target=_rank, args=(rank, world_size, port, results, timeout_s, function, args))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        found: dict[int, Any] = {}
        for _ in range(world_size):
            try:
                rank, result, failure = results.get(timeout=timeout_s)
            except Empty:
                raise AssertionError(f"no result in {timeout_s} s from some of {world_size} ranks") from None
            if failure is not None:
                raise AssertionError(f"rank {rank} of {world_size} failed:\n{failure}")
            found[rank] = result
        return [found[rank] for rank in range(world_size)]
    finally:
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


def _rank(
    rank: int, world_size: int, port: int, results: Any, timeout_s: float, function: Callable[..., Any], args: Any
) -> None:
    faulthandler.dump_traceback_later(timeout_s - 5, exit=True)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # a server that readers started blocks what torchrun would not
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",  # ranks of tests are the CPU's
    )
    import torch

    torch.set_num_threads(1)
    has_imported = "mm.train.loop" in sys.modules
    try:
        assert has_imported, "this rank's fork server has not imported what ranks need, see start_server"
        results.put((rank, function(*args), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def free_port() -> int:
    """A port that was free just now; another process may take it before it is used. See `ANY_PORT`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
