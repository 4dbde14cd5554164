"""`mm --version`: this program, the commit of its checkout, and the libraries that its numbers depend on."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import mm

_LIBRARIES = ("torch", "megatron-core", "diffusers", "transformers")


def version_text() -> str:
    """One line, of what is installed; no library is imported for it."""
    commit = commit_of(Path(mm.__file__).resolve().parents[1])
    parts = [f"mm {mm.__version__}" + (f" ({commit})" if commit else "")]
    parts += [f"{name} {_installed(name)}" for name in _LIBRARIES]
    return ", ".join([*parts, f"python {platform.python_version()}"])


def commit_of(checkout: Path) -> str:
    """`commit 5b12e4c`, with a remark where tracked files differ from it; empty where the folder is no checkout.

    Args:
        checkout: the folder that holds the package.
    """
    if not (checkout / ".git").exists():
        return ""
    command = [
        "git",
        "-C",
        str(checkout),
        "describe",
        "--always",
        "--dirty= with changes",
        "--exclude=*",
        "--abbrev=10",
    ]
    try:
        return "commit " + subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "commit unknown: git cannot read this checkout"


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
