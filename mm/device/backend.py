"""The device a process computes on: its torch device, its collective backend, its memory figures.

This and its neighbours are the only files that name a kind of device. Everything else receives a `Backend`.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch

from mm.device.megatron_on_cpu import MegatronOnCpu
from mm.device.megatron_on_npu import MegatronOnNpu
from mm.device.out_of_memory import is_out_of_memory
from mm.device.present import refuse_silent_cpu, require_kernels, why_unusable
from mm.errors import ConfigError

DeviceKind = Literal["cpu", "cuda", "npu"]

_DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # matrix products that run at the same time do not share a workspace
    "NCCL_NVLS_ENABLE": "0",  # switches that add up do so in the order of arrival
    "HCCL_DETERMINISTIC": "true",
}
"""What cuBLAS, NCCL and HCCL must be told beside torch; those of other devices are not read."""


@dataclass(frozen=True)
class Backend:
    """One process's device.

    Attributes:
        kind: which kind of device.
        device: the torch device with its index.
        collective: name of the torch.distributed backend that talks between such devices.
        adapter: on CPU and NPU, what makes megatron-core's code mean that device where it says CUDA.
    """

    kind: DeviceKind
    device: torch.device
    collective: Literal["gloo", "nccl", "hccl"]
    adapter: MegatronOnCpu | MegatronOnNpu | None

    def megatron(self) -> AbstractContextManager[None]:
        """Enter this around every call into megatron-core (construction, schedule, optimizer)."""
        return self.adapter.inside() if self.adapter else contextlib.nullcontext()

    def model_code(self) -> AbstractContextManager[None]:
        """Enter this around our own code that megatron-core calls back, which needs no adapter and pays for it."""
        return self.adapter.outside() if self.adapter else contextlib.nullcontext()

    def synchronize(self) -> None:
        """Wait for the device's queued work; for measurements only."""
        if self.kind != "cpu":
            getattr(torch, self.kind).synchronize()

    def peak_memory_bytes(self) -> int:
        """Peak memory of this process: the allocator's on an accelerator, the resident set on the CPU."""
        if self.kind != "cpu":
            return int(getattr(torch, self.kind).max_memory_allocated())
        if sys.platform == "linux":  # getrusage would count the process that started this one, up to that moment
            status = Path("/proc/self/status").read_text(encoding="ascii")
            return int(status.partition("VmHWM:")[2].split(maxsplit=1)[0]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS

    def total_and_free_bytes(self) -> tuple[int, int] | None:
        """Memory of the device and what nobody uses of it; None on the CPU, whose limits are set in many places."""
        if self.kind == "cpu":
            return None
        free, total = getattr(torch, self.kind).mem_get_info(self.device)
        return int(total), int(free)

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Recognise an exception that says that this device has no room for an allocation."""
        return is_out_of_memory(error, on_host=self.kind == "cpu")

    def name(self) -> str:
        """Name of the device in reports."""
        if self.kind == "cpu":
            return "CPU"
        return str(getattr(torch, self.kind).get_device_name(self.device))


def select(kind: DeviceKind | None, local_rank: int = 0, processes: int = 1) -> Backend:
    """Choose this process's device.

    Args:
        kind: which kind, or None for the first of NPU, CUDA, CPU that is there.
        local_rank: index of this process on its node, which is the device's index.
        processes: of the job.

    Raises:
        ConfigError: CFG-030 when the kind asked for, or the device of that index, is not there; CFG-180 and CFG-181
            when none was asked for and it would be the CPU against expectation; CFG-182 for a device that is too old or
            too new for torch.
    """
    kind = kind or _first_available(processes)
    if kind == "cpu":
        return Backend("cpu", torch.device("cpu"), "gloo", MegatronOnCpu())
    count = _device_count(kind)
    if local_rank >= count:
        found = f"Local process {local_rank} needs {kind}:{local_rank}, and this node has {count} such devices"
        remedy = "Start at most that many processes a node (NPUS_PER_NODE), or choose another --device."
        if count == 0:
            reason, remedy = why_unusable(kind, os.environ)
            found += f" that torch {torch.__version__} can use: {reason}"
        raise ConfigError("CFG-030", f"{found}.", remedy)
    device = torch.device(kind, local_rank)
    if kind == "cuda":
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        require_kernels(name, capability, torch.cuda.get_arch_list())
    getattr(torch, kind).set_device(device)
    if kind == "npu":
        return Backend(kind, device, "hccl", MegatronOnNpu())
    return Backend(kind, device, "nccl", None)


def free_host_bytes() -> int:
    """Memory that this node still gives to its processes: free on the machine, and left of a container's limit."""
    free = psutil.virtual_memory().available
    limit, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(used.read_text()))
    return int(free)


@contextlib.contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Ask torch and the libraries below it for the same bits every time, inside the block when `enabled`.

    Enter it before processes are joined and before the first matrix product: the libraries read their variables once.
    """
    before = torch.are_deterministic_algorithms_enabled()
    for name, value in _DETERMINISTIC.items() if enabled else ():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(enabled or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _first_available(processes: int) -> DeviceKind:
    if _device_count("npu"):
        return "npu"
    if _device_count("cuda"):
        return "cuda"
    refuse_silent_cpu(processes, os.environ)
    return "cpu"


def _device_count(kind: DeviceKind) -> int:
    if kind == "npu":
        try:
            import torch_npu  # noqa: F401  registers torch.npu; absent everywhere but on Ascend machines
        except ImportError:
            return 0
    module = getattr(torch, kind, None)
    return int(module.device_count()) if module is not None and module.is_available() else 0


def visible_devices() -> int:
    """Number of accelerators of this machine that a process may use; 0 where there is the CPU alone."""
    return max(_device_count("npu"), _device_count("cuda"))
