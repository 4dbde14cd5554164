"""Meeting place of a job's processes: torch's key-value store at MASTER_ADDR:MASTER_PORT, closed as far as it can be.

torch's store answers whoever connects, and by itself listens on every address of the node. A job of one node needs one
address: here its socket is bound to that alone, and the processes' own connections stay on the loopback interface. The
store of a job of several nodes must be reachable from them; what its processes tell each other there is signed with a
secret that all of them have (`mm.supervise.messages`).
"""

from __future__ import annotations

import argparse
import datetime
import errno
import os
import secrets
import socket

import psutil
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from mm.config.place import ProcessPlace
from mm.errors import ConfigError

SECRET = "MM_JOB_SECRET"  # noqa: S105  (a name)
"""Environment variable: what signs a job's messages, any text, the same for all its processes."""
_SHORTEST = 16
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Which network interface the libraries of collectives listen on; each reads its own at the first connection."""


def on_one_node(where: ProcessPlace) -> bool:
    """Tell a job with all its processes on this node, as torchrun says, from one of several nodes."""
    return where.local_world_size == where.world_size


def job_secret() -> bytes | None:
    """The secret that this process was started with.

    Raises:
        ConfigError: CFG-151 when it can be guessed.
    """
    text = os.environ.get(SECRET, "")
    if not text:
        return None
    if len(text) < _SHORTEST:
        raise ConfigError(
            "CFG-151",
            f"{SECRET} has {len(text)} characters, at least {_SHORTEST} are expected.",
            "Give it random text, the same on every node, such as that of: openssl rand -hex 32",
        )
    return text.encode()


def serve_store(address: str, port: int, timeout: datetime.timedelta) -> Store:
    """Run the job's store inside this process, reachable under `address` and no other one.

    torch's own calls for a store on this port, in this process, get the same one.

    Args:
        address: a name or number of this node. port: 0 takes a free one, which `.port` of the result names.
        timeout: of the store's answers.

    Raises:
        ConfigError: CFG-150 when the address is not one of this node.
        DistNetworkError: the port is taken.
    """
    listener = _listen(address, port)
    return dist.TCPStore(  # type: ignore[attr-defined]  # missing from torch's __all__
        address,
        listener.getsockname()[1],
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listener.detach(),
    )


def prepare_launch(arguments: argparse.Namespace) -> Store | None:
    """Make the store and the secret that torchrun and its processes then find.

    Args:
        arguments: of torchrun, parsed; where they leave address and port of one node open, both are filled in.

    Returns:
        The store, to be kept while torchrun runs; None where several nodes meet, or it runs on another one.

    Raises:
        ConfigError: CFG-150; CFG-152 for a rendezvous that trusts whoever reaches it.
        DistNetworkError: the port is taken.
    """
    one_node = str(arguments.nnodes) in ("1", "1:1")
    if arguments.standalone or (one_node and arguments.master_port is None and arguments.rdzv_backend == "static"):
        arguments.standalone, arguments.rdzv_backend, arguments.rdzv_endpoint = False, "static", ""
        arguments.nnodes, arguments.node_rank, one_node = "1", 0, True
        arguments.master_addr, arguments.master_port = "127.0.0.1", 0
    if arguments.rdzv_backend != "static":
        raise ConfigError(
            "CFG-152",
            f"--rdzv-backend is {arguments.rdzv_backend}, which runs what anybody who reaches its port has written.",
            "Leave it out, and give --nnodes, --node-rank, --master-addr and --master-port.",
        )
    if not one_node or arguments.rdzv_endpoint:
        return None
    os.environ.setdefault(SECRET, secrets.token_hex(32))
    store = serve_store(arguments.master_addr, int(arguments.master_port), datetime.timedelta(minutes=10))
    arguments.master_port = store.port  # type: ignore[attr-defined]
    return store


def stay_on_this_node() -> None:
    """Let the libraries of collectives connect over the loopback interface, unless the user has named another."""
    stats = psutil.net_if_stats()
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == "127.0.0.1" for address in addresses) and stats[name].isup:
            for variable in _INTERFACES:
                os.environ.setdefault(variable, name)
            return


def _listen(address: str, port: int) -> socket.socket:
    """A socket that listens on one address; of a name with several, on the first of IPv4."""
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise _not_here(address, error) from None
    family, _, _, _, place = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(4096)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise dist.DistNetworkError(f"The port {address}:{port} is in use (EADDRINUSE).") from None
        raise _not_here(address, error) from None
    return listener


def _not_here(address: str, error: OSError) -> ConfigError:
    return ConfigError(
        "CFG-150",
        f"The store of a job of one node cannot listen on {address}: {error.strerror or error}.",
        "Give an address of this node as MASTER_ADDR (--master-addr), such as 127.0.0.1.",
    )
