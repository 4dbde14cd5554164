"""Accelerators that a machine has and this process cannot use: a run must not move to the CPU without a word.

torch says only that it sees no device. Whether there is one is read from the kernel's files; why it cannot be used,
from torch's build, the variables that hide devices, and what starting the device raises.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from mm.errors import ConfigError

Accelerator = Literal["cuda", "npu"]

VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "npu": "ASCEND_RT_VISIBLE_DEVICES"}
"""The variables that choose the devices a process sees; empty or -1, they hide all of them."""

_DRIVERS = {"12": "525", "13": "580"}  # the oldest branch of NVIDIA's driver for a major version of CUDA
_NVIDIA, _DISPLAY = "0x10de", "0x03"  # of a PCI device: its vendor, and how the class of display and 3D devices begins


def refuse_silent_cpu(processes: int, variables: Mapping[str, str], root: Path = Path("/")) -> None:
    """Return where the CPU is what a user means who names no device; called where torch sees no accelerator.

    Args:
        processes: of the job. One process on a machine without an accelerator is a laptop; several are a cluster whose
            devices are missing.
        variables: the environment. Hiding all devices of a kind is a word for the CPU.
        root: where the machine's files are.

    Raises:
        ConfigError: CFG-180 where an accelerator is in the machine, CFG-181 where several processes were asked for.
    """
    kinds: tuple[Accelerator, ...] = ("cuda", "npu")
    hidden = [kind for kind in kinds if is_hidden(kind, variables)]
    for kind in kinds:
        sign = None if kind in hidden else sign_of(kind, root)
        if sign is not None:
            reason, remedy = why_unusable(kind, variables)
            raise ConfigError(
                "CFG-180",
                f"This machine has an accelerator ({sign}), and torch {torch.__version__} cannot use it: {reason}.",
                f"{remedy} Or give --device cpu to compute on the CPU.",
            )
    if processes > 1 and not hidden:
        raise ConfigError(
            "CFG-181",
            f"{processes} processes were asked for, and this node has no accelerator.",
            "Give --device cpu to compute on the CPU, or hide devices (CUDA_VISIBLE_DEVICES=) from a script without "
            "that flag; or see why the node's devices are missing (a container must be given them, a job of the "
            "cluster must ask for them).",
        )


def is_hidden(kind: Accelerator, variables: Mapping[str, str]) -> bool:
    """Tell whether the user hid all devices of a kind from the process."""
    value = variables.get(VISIBLE[kind])
    return value is not None and (not value.strip() or value.strip().startswith("-"))


def sign_of(kind: Accelerator, root: Path = Path("/")) -> str | None:
    """The file by which the kernel says that a device of a kind is there; None without one."""
    if kind == "npu":
        return _first(root, "dev/davinci[0-9]*")
    driver = _first(root, "dev/nvidia[0-9]*", "proc/driver/nvidia/version", "usr/lib/wsl/lib/libcuda.so*")
    return driver or next(
        (
            f"/{path.parent.relative_to(root)}"
            for path in sorted((root / "sys/bus/pci/devices").glob("*/vendor"))
            if _text(path) == _NVIDIA and _text(path.with_name("class")).startswith(_DISPLAY)
        ),
        None,
    )


def why_unusable(kind: Accelerator, variables: Mapping[str, str]) -> tuple[str, str]:
    """The reason for which torch sees no device of a kind that is there, and the remedy."""
    if kind == "npu":
        try:
            importlib.import_module("torch_npu")
        except Exception as error:  # without CANN's libraries it fails in many ways
            reason = f"torch_npu cannot be imported ({_first_line(error)})"
            return reason, "Load CANN's set_env.sh and install torch_npu of torch's version (docs/npu.md)."
        return "torch_npu sees no device", f"Look at npu-smi info and at {VISIBLE[kind]}."
    if torch.version.cuda is None:
        remedy = f"Install torch's CUDA build: pip install --force-reinstall torch=={torch.__version__.split('+')[0]}."
        return "it is a build without CUDA", remedy
    driver = _DRIVERS.get(torch.version.cuda.split(".")[0], "a newer one")
    remedy = f"CUDA {torch.version.cuda} needs NVIDIA's driver {driver} or newer: look at nvidia-smi."
    shown = variables.get(VISIBLE[kind])
    if shown is not None:
        remedy += f" {VISIBLE[kind]} is {shown!r}."
    try:
        torch.cuda.init()
    except Exception as error:
        return _first_line(error), remedy
    return "it sees no device", remedy


def require_kernels(name: str, capability: tuple[int, int], built_for: Sequence[str]) -> None:
    """Refuse a CUDA device for which torch's build has no kernels: the first would fail, long after the start.

    Args:
        name: of the device. capability: its (major, minor).
        built_for: torch's `sm_90`, which runs on that major version from that minor one on, and `compute_90`, which is
            compiled for any newer device.

    Raises:
        ConfigError: CFG-182.
    """
    targets = [target for target in built_for if target.startswith(("sm_", "compute_"))]
    for target in targets:
        kind, _, digits = target.partition("_")
        number = digits.rstrip("af")  # of one device, and of a family
        major, minor = int(number[:-1]), int(number[-1])
        same = major == capability[0] and minor <= capability[1] and not digits.endswith("a")
        exact = (major, minor) == capability
        if same or exact or (kind == "compute" and (major, minor) <= capability):
            return
    if not targets:  # a build for other devices that call themselves CUDA
        return
    found = (
        f"{name} has compute capability {capability[0]}.{capability[1]}, and torch {torch.__version__} is built for "
    )
    found += f"{', '.join(built_for)}."
    raise ConfigError("CFG-182", found, "Install a build of torch for it (download.pytorch.org), or give --device cpu.")


def _first(root: Path, *patterns: str) -> str | None:
    found = (path for pattern in patterns for path in sorted(root.glob(pattern)))
    return next((f"/{path.relative_to(root)}" for path in found), None)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
