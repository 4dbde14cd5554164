"""SIGTERM in each phase of a run: both processes leave with 75, and what is on disk goes on."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from ranks import run_ranks
from test_hangs import Job, no_process_is_left  # noqa: F401  (a fixture)
from training_runs import words

from mm.checkpoint.background import BackgroundSaver
from mm.cli import train as train_command
from mm.data import loader
from mm.errors import EndedElsewhereError, StoppedError
from mm.optim.optimizer import Optimizer
from mm.parallel.stage import WanStage
from mm.train.callbacks import checkpointing, evaluation

PLACES: dict[str, tuple[Any, str, int]] = {
    "data wait": (loader, "read_sample", 5),
    "forward": (WanStage, "forward", 3),
    "backward": (WanStage, "forward", 3),
    "p2p": (P2PCommunicator, "recv_forward", 3),
    "optimizer": (Optimizer, "update", 3),
    "staging": (BackgroundSaver, "_copied", 1),
    "save": (checkpointing, "save", 1),
    "evaluation": (evaluation, "evaluate", 1),
    "exit": (checkpointing.Checkpointing, "finish", 1),
}
"""Whose nth call the signal precedes; in backward it comes with the gradient of what the call returns."""


def signalled(patch: pytest.MonkeyPatch, phase: str) -> None:
    owner, name, nth = PLACES[phase]
    function, calls = getattr(owner, name), []

    def kill(*ignored: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if phase == "backward":
            output = function(*args, **kwargs)
            if len(calls) == nth:
                output.register_hook(kill)
            return output
        if len(calls) == nth:
            kill()
        return function(*args, **kwargs)

    patch.setattr(owner, name, call)


def stop_in(phases: list[str], signalled_rank: int, command: Callable[[str], list[str]]) -> dict[str, str]:
    found = {}
    for phase in phases:
        with pytest.MonkeyPatch.context() as patch:
            if int(os.environ["RANK"]) == signalled_rank:
                signalled(patch, phase)
            try:
                train_command.main(command(phase))
                found[phase] = "done"
            except (StoppedError, EndedElsewhereError) as error:
                found[phase] = str(error.exit_code)
                torch.distributed.destroy_process_group()  # the next phase's run begins in the same process
    return found


class Command:
    """The command line of a phase's run; a class because processes receive it."""

    def __init__(self, demo: Path, home: Path) -> None:
        self.demo, self.home = demo, home

    def __call__(self, phase: str, steps: int = 6) -> list[str]:
        flags: dict[str, Any] = {"train_iters": steps, "pipeline_model_parallel_size": 2, "save_on_signal": True,
                                 "micro_batch_size": 2, "hang_timeout": 60}  # fmt: skip
        if phase == "evaluation":
            flags |= {"eval_interval": 2, "eval_data": self.demo / "configs" / "feature_data.json"}
        if phase in ("save", "staging"):
            flags |= {"save_interval": 2, "async_save": phase == "staging"}
        return words(self.demo, self.home / phase.replace(" ", "_"), **flags)


EVERY_DAY = ["data wait", "backward", "p2p", "save", "exit"]


def check(demo: Path, home: Path, phases: list[str], signalled_rank: int) -> None:
    command = Command(demo, home)
    for found in run_ranks(2, stop_in, phases, signalled_rank, command, timeout_s=100):
        assert found == {phase: "done" if phase == "exit" else "75" for phase in phases}
    for phase in phases:
        saved = sorted(path.name for path in (home / phase.replace(" ", "_")).glob("iter_*"))
        if phase == "exit":
            assert saved[-1] == "iter_0000006"
        elif phase == "evaluation":  # of step 2: minutes of a real run, after which no step more is waited for
            assert saved == ["iter_0000002"]
        else:
            assert saved[-1] in ("iter_0000001", "iter_0000002", "iter_0000003", "iter_0000004")
    for found in run_ranks(2, go_on, phases, command, timeout_s=100):
        assert set(found.values()) == {"done"}


def go_on(phases: list[str], command: Command) -> dict[str, str]:
    for phase in phases:
        train_command.main(command(phase, steps=7))
    return dict.fromkeys(phases, "done")


def test_a_signal_in_a_phase(demo: Path, tmp_path: Path) -> None:
    check(demo, tmp_path, EVERY_DAY, signalled_rank=1)


@pytest.mark.nightly
def test_a_signal_before_the_first_step(demo: Path, tmp_path: Path) -> None:
    """There is nothing to save, and no other process is waited for."""
    job = Job(demo, tmp_path / "run", 2, save_on_signal=True)
    until = time.monotonic() + 60
    while not all(map(catches_sigterm, job.ranks() or [1])):
        assert time.monotonic() < until, job.text()
        time.sleep(0.02)
    os.kill(job.ranks()[1], signal.SIGTERM)
    assert job.wait(60) == 75, job.text()
    assert job.lines[-1][1].startswith("error RUN-001: Stopped by SIGTERM before the first step.")
    assert job.text().count("error ") == 1
    assert not list((tmp_path / "run").glob("iter_*"))


def catches_sigterm(process: int) -> bool:
    """Whether Python's handler is in place: torch and Python leave the signal's default action until then."""
    (mask,) = [line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("SigCgt")]
    return bool(int(mask.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.nightly
@pytest.mark.parametrize("signalled_rank", [0, 1])
def test_a_signal_in_any_phase(demo: Path, tmp_path: Path, signalled_rank: int) -> None:
    check(demo, tmp_path, list(PLACES), signalled_rank)
