"""Runs the steps of benchmarks/smoke_accelerator.sh and benchmarks/smoke_two_devices.sh, one after the other.

Each step is a process of its own with a time limit, so that one that fails, hangs or takes its process down stops no
other. The table grows as they end, the JSON file is written anew after each, and what a step printed is in the folder
of logs beside it. The exit code is 1 if a step failed. Steps themselves are in smoke_kernels.py, smoke_runs.py,
smoke_layouts.py.
"""

from __future__ import annotations

import argparse
import contextlib
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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.append(str(ROOT / "benchmarks"))  # behind the folders of whoever imports this: names of theirs are the same

import smoke_kernels as kernels  # noqa: E402  (the path above)
import smoke_layouts as layouts  # noqa: E402
import smoke_runs as runs  # noqa: E402
from smoke_step import FAILED, NOT_RUN, OK, SKIPPED, TIMED_OUT, Found, Place, Step  # noqa: E402

ONE = [
    Step("environment", kernels.environment, 90),
    Step("triton launch", kernels.triton_launch, 40),
    Step("tests of kernels", kernels.device_tests, 60),
    Step("attention, 1.3B at 480p", kernels.attention_480p, 40),
    Step("attention, 14B at 720p on CP 8", kernels.attention_720p, 40),
    Step("elementwise kernels, 14B at 720p", kernels.elementwise, 40),
    Step("waits of a step", kernels.waits, 40),
    Step("data and features", runs.features, 60),
    Step("train, kill, resume", runs.kill_and_resume, 90),
    Step("layer-zero", runs.layer_zero, 40),
    Step("compiled blocks", runs.compiled, 60),
    Step("offload", runs.offload, 40),
    Step("LoRA, bf16", runs.lora_bf16, 40),
    Step("LoRA, int8", runs.lora_int8, 40),
    Step("fp32", runs.fp32, 40),
    Step("i2v", runs.i2v, 60),
    Step("1.3B against the dry run", kernels.predicted_memory, 90),
    Step("extraction against the CPU", runs.extraction_on_cpu, 60),
    Step("generation against the CPU", runs.generation_on_cpu, 60),
]
TWO = [
    Step("two devices", layouts.two_devices, 40),
    Step("ulysses 2", layouts.ulysses, 60),
    Step("ring 2", layouts.ring, 60),
    Step("tp 2 with sequence parallel", layouts.tensor, 60),
    Step("pp 2 with vp 2", layouts.pipeline, 60),
    Step("layer-zero 2", layouts.layer_zero, 60),
]


class Smoke:
    """A run of steps, its table and its file."""

    def __init__(self, steps: Sequence[Step], folder: Path, file: Path, kind: str | None, limit_s: float) -> None:
        """Run steps in a folder and write what they found to a file; none goes on after `limit_s` seconds.

        What they print is in a folder beside the file.
        """
        self._logs = file.with_suffix(".logs")
        self._logs.mkdir(exist_ok=True)
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
        print(f"figures: {self._file}, logs: {self._logs}")
        return 1 if bad else 0

    def _run(self, step: Step) -> Found:
        limit_s = min(step.limit_s, self._ends - time.monotonic())
        if limit_s < 1:
            return Found(NOT_RUN, "", {})
        receiver, sender = self._context.Pipe(duplex=False)
        log = self._logs / f"{step.name.replace(' ', '-').replace(',', '')}.log"
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
        sender.send(step.run(place))
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
    chosen = [
        replace(step, limit_s=options.patience * step.limit_s)
        for step in steps
        if options.only is None or step.name in options.only
    ]
    try:
        return Smoke(chosen, folder, options.json.absolute(), options.device, options.limit_s).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
