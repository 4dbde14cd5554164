"""What a benchmark hands in: a table to read and, on request, a JSON file with what is needed to repeat it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Target:
    """A bound that was set before the measurement.

    Attributes:
        name: of what was measured, with its unit. found: the figure; None when it could not be measured.
        bound: the target. at_most: whether the figure may not be above it, or not below it.
    """

    name: str
    found: float | None
    bound: float
    at_most: bool = True

    @property
    def met(self) -> bool | None:
        """None when nothing was measured."""
        if self.found is None:
            return None
        return self.found <= self.bound if self.at_most else self.found >= self.bound

    def row(self) -> dict[str, str]:
        """A line of the table of targets."""
        found = "not measured" if self.found is None else f"{self.found:.4g}"
        verdict = {None: "-", True: "met", False: "missed"}[self.met]
        return {"target": self.name, "bound": f"{'<=' if self.at_most else '>='} {self.bound:g}", "found": found,
                "": verdict}  # fmt: skip


@dataclass
class Result:
    """One benchmark's figures.

    Attributes:
        benchmark: its name. device: what it ran on.
        shapes: the sizes of the work, by name.
        flops: how floating-point operations are counted, where they are.
        rows: the table, a dict a line; all lines need not have all columns.
        targets: bounds and whether they were met. notes: what a reader must know about how the figures came about.
    """

    benchmark: str
    device: str
    shapes: dict[str, Any]
    flops: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def show(self) -> None:
        """Print the tables."""
        shapes = ", ".join(f"{name} {value}" for name, value in self.shapes.items())
        lines = [f"\n## {self.benchmark} on {self.device}: {shapes}\n"]
        lines.append(tabulate(self.rows, headers="keys", tablefmt="github", floatfmt=".4g"))
        if self.targets:
            lines += ["", tabulate([target.row() for target in self.targets], headers="keys", tablefmt="github")]
        lines += ["", *self.notes] if self.notes else []
        print("\n".join(lines), flush=True)

    def as_json(self) -> dict[str, Any]:
        """Everything, with where it was measured."""
        targets = [{**asdict(target), "met": target.met} for target in self.targets]
        return {**asdict(self), "targets": targets, "where": provenance()}


def provenance() -> dict[str, Any]:
    """Machine, versions and the commit of the tree."""
    return {
        "machine": platform.machine(),
        "system": platform.platform(terse=True),
        "processors": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }


def commit() -> str:
    """The tree's commit, with `+changes` when files differ from it; `unknown` outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def publish(results: list[Result], path: str | None) -> None:
    """Print the results; write them to `path` as JSON if one is given."""
    for result in results:
        result.show()
    write(results, path)


def write(results: list[Result], path: str | None) -> None:
    """Write results to `path` as a JSON list, whole or not at all."""
    if path is None:
        return
    part = Path(path).with_suffix(".part")
    part.write_text(json.dumps([result.as_json() for result in results], indent=1) + "\n")
    part.replace(path)


def arguments(description: str | None, add: Callable[[argparse.ArgumentParser], None] | None = None) -> Any:
    """Parse a benchmark's command line: `--json FILE` and what `add` adds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    if add is not None:
        add(parser)
    return parser.parse_args(sys.argv[1:])
