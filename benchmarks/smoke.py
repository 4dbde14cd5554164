"""Runs the steps of benchmarks/smoke_accelerator.sh and benchmarks/smoke_two_devices.sh, one after the other.

Each step is a process of its own with a time limit, so that one that fails, hangs or takes its process down stops no
other. The table grows as they end, the JSON file is written anew after each, and what a step printed is in the folder
of logs. The exit code is 1 if a step failed. Steps themselves are in smoke_kernels.py, smoke_runs.py, smoke_layouts.py.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OK, FAILED, TIMED_OUT, NOT_RUN = "ok", "failed", "timed out", "not run: no time left"
SKIPPED = "skipped: "
"""What the result of a step begins with that has nothing to do here; the reason follows."""


@dataclass(frozen=True)
class Step:
    """One row of the table.

    Attributes:
        name: what it is called. module, function: where it is; it takes a `Place` and returns a `Found`.
        limit_s: seconds after which it is ended.
    """

    name: str
    module: str
    function: str
    limit_s: float


@dataclass(frozen=True)
class Place:
    """Where a step runs.

    Attributes:
        folder: of the run, shared by its steps, for what they make.
        kind: of device; None asks for the best there is.
        limit_s: seconds that the step has.
    """

    folder: Path
    kind: str | None
    limit_s: float


@dataclass(frozen=True)
class Found:
    """What a step has to say.

    Attributes:
        result: `OK`, `FAILED`, or `SKIPPED` and why.
        text: one line. figures: the same as values.
    """

    result: str
    text: str
    figures: dict[str, Any]


def found(text: str, **figures: Any) -> Found:
    """All is well."""
    return Found(OK, text, figures)


def skipped(why: str) -> Found:
    """There is nothing to do here."""
    return Found(SKIPPED + why, "", {})


def require(truth: bool, text: str) -> None:
    """End a step that has found something wrong."""
    if not truth:
        raise AssertionError(text)


KERNELS, RUNS, LAYOUTS = "smoke_kernels", "smoke_runs", "smoke_layouts"
ONE = [
    Step("environment", KERNELS, "environment", 90),
    Step("triton launch", KERNELS, "triton_launch", 40),
    Step("tests of kernels", KERNELS, "device_tests", 60),
    Step("attention, 1.3B at 480p", KERNELS, "attention_480p", 40),
    Step("attention, 14B at 720p on CP 8", KERNELS, "attention_720p", 40),
    Step("elementwise kernels, 14B at 720p", KERNELS, "elementwise", 40),
    Step("waits of a step", KERNELS, "waits", 40),
    Step("data and features", RUNS, "features", 60),
    Step("train, kill, resume", RUNS, "kill_and_resume", 90),
    Step("layer-zero", RUNS, "layer_zero", 40),
    Step("compiled blocks", RUNS, "compiled", 60),
    Step("offload", RUNS, "offload", 40),
    Step("LoRA, bf16", RUNS, "lora_bf16", 40),
    Step("LoRA, int8", RUNS, "lora_int8", 40),
    Step("fp32", RUNS, "fp32", 40),
    Step("i2v", RUNS, "i2v", 60),
    Step("1.3B against the dry run", KERNELS, "predicted_memory", 90),
    Step("extraction against the CPU", RUNS, "extraction_on_cpu", 60),
    Step("generation against the CPU", RUNS, "generation_on_cpu", 60),
]
TWO = [
    Step("two devices", LAYOUTS, "two_devices", 40),
    Step("ulysses 2", LAYOUTS, "ulysses", 60),
    Step("ring 2", LAYOUTS, "ring", 60),
    Step("tp 2 with sequence parallel", LAYOUTS, "tensor", 60),
    Step("pp 2 with vp 2", LAYOUTS, "pipeline", 60),
    Step("layer-zero 2", LAYOUTS, "layer_zero", 60),
]


class Smoke:
    """A run of steps, its table and its file."""

    def __init__(self, steps: Sequence[Step], folder: Path, file: Path, kind: str | None, limit_s: float) -> None:
        """Run steps in a folder and write what they found to a file; none goes on after `limit_s` seconds."""
        self._steps, self._folder, self._file, self._kind = steps, folder, file, kind
        self._ends = time.monotonic() + limit_s
        self._rows: list[dict[str, Any]] = []
        self._context: Any = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["smoke_preload"])  # torch and the engine once, not for each step

    def run(self) -> int:
        """All of them; the exit code."""
        width = max(len(step.name) for step in self._steps)
        for step in self._steps:
            started = time.monotonic()
            what = self._run(step)
            if what.result == FAILED and "fork" in what.text:  # CUDA's words where the server has used the device
                self._context = multiprocessing.get_context("spawn")
                what = self._run(step)
            seconds = round(time.monotonic() - started, 1)
            self._rows.append({"step": step.name, "seconds": seconds, **asdict(what)})
            self._write()
            print(f"{step.name:<{width}}  {seconds:6.1f} s  {what.result}{': ' if what.text else ''}{what.text}",
                  flush=True)  # fmt: skip
        bad = [row["step"] for row in self._rows if not (row["result"] == OK or row["result"].startswith(SKIPPED))]
        print(f"\n{len(bad)} of {len(self._rows)} steps failed{': ' if bad else ''}{', '.join(bad)}")
        print(f"figures: {self._file}, logs: {self._folder / 'logs'}")
        return 1 if bad else 0

    def _run(self, step: Step) -> Found:
        limit_s = min(step.limit_s, self._ends - time.monotonic())
        if limit_s < 1:
            return Found(NOT_RUN, "", {})
        receiver, sender = self._context.Pipe(duplex=False)
        log = self._folder / "logs" / f"{step.name.replace(' ', '-').replace(',', '')}.log"
        place = Place(self._folder, self._kind, limit_s)
        process = self._context.Process(target=_step, args=(step, place, log, sender))
        process.start()
        sender.close()
        what: Found | None = None
        with contextlib.suppress(EOFError):  # its process is gone
            what = receiver.recv() if receiver.poll(limit_s) else Found(TIMED_OUT, f"after {limit_s:.0f} s", {})
        process.join(0 if what is not None and what.result == TIMED_OUT else 10)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid or 0, signal.SIGKILL)  # with all that it has started
        process.join()
        return what or Found(FAILED, f"its process ended with {process.exitcode}; see {log}", {})

    def _write(self) -> None:
        part = self._file.with_suffix(".part")
        part.write_text(json.dumps({"steps": self._rows}, indent=1) + "\n")
        part.replace(self._file)


def _step(step: Step, place: Place, log: Path, sender: Any) -> None:
    os.setsid()
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        sender.send(getattr(importlib.import_module(step.module), step.function)(place))
    except BaseException as error:  # an exit code is a failure here as well
        traceback.print_exc()
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        sender.send(Found(FAILED, f"{type(error).__name__}: {reason}"[:300], {}))


def main(words: Sequence[str]) -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("devices", choices=["one", "two"])
    parser.add_argument("--json", type=Path, default=Path("smoke.json"), help="the file of figures")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="steps to run, by name")
    parser.add_argument("--device", choices=["cpu", "cuda", "npu"], help="kind of device; default: the best there is")
    parser.add_argument("--limit-s", type=float, default=235, help="seconds after which no step is begun or goes on")
    parser.add_argument("--patience", type=float, default=1, help="times each step's own limit, for slow machines")
    options = parser.parse_args(words)
    steps = ONE if options.devices == "one" else TWO
    unknown = sorted(set(options.only or ()) - {step.name for step in steps})
    if unknown:
        parser.error(f"no such step: {', '.join(unknown)}; there are {', '.join(step.name for step in steps)}")
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # for the server, and for commands of steps
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # looking for devices leaves the server able to fork
    folder = Path(tempfile.mkdtemp(prefix="smoke-"))
    (folder / "logs").mkdir()
    os.environ["TMPDIR"] = str(folder / "tmp")  # of steps
    (folder / "tmp").mkdir()
    chosen = [
        replace(step, limit_s=options.patience * step.limit_s)
        for step in steps
        if options.only is None or step.name in options.only
    ]
    try:
        return Smoke(chosen, folder, options.json.absolute(), options.device, options.limit_s).run()
    finally:
        for path in folder.iterdir():
            if path.is_file():
                path.unlink()
            elif path.name != "logs":
                shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    sys.exit(main(sys.argv[1:]))
