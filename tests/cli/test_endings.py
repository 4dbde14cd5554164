"""Every way in which a run can end: no process is left, the exit code is documented, what was promised is saved.

A row is a way and a number of processes, at the level of the example scripts. docs/reliability.md has the table.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from jobs import PRETRAIN, ROOT, Job, variables

from mm.stopping import AGAIN_S

Starter = Callable[..., Job]
WORDS = ("--train-iters", "100000", "--log-interval", "1", "--num-workers", "1", "--device", "cpu")
STEPS_BEFORE = 3


@pytest.fixture
def start(demo: Path, tmp_path: Path) -> Iterator[Starter]:
    """Start pretrain.sh; what it started is gone after the test."""
    started = []

    def start(num_processes: int, words: tuple[str, ...] = (), before: tuple[str, ...] = (), **how: Any) -> Job:
        environment = variables(demo, tmp_path / "run", num_processes) | how.pop("environment", {})
        job = Job([*before, "bash", str(how.pop("script", PRETRAIN)), *WORDS, *words], environment, **how)
        started.append(job)
        return job

    yield start
    for job in started:
        job.end()


class Way(NamedTuple):
    """How a run of pretrain.sh that is in its steps ends.

    Attributes:
        end: does it. exit_code: of the script. saves: whether a checkpoint is promised, of the step that it is in.
        how: arguments of `Job`. before: what runs the script.
    """

    end: Callable[[Job], object]
    exit_code: int
    saves: bool = True
    how: Mapping[str, Any] = MappingProxyType({})
    before: tuple[str, ...] = ()


TERMINAL = {"on_terminal": True}


def press(job: Job, key: bytes = b"\x03") -> None:
    assert job.terminal is not None
    os.write(job.terminal, key)


def from_a_container(job: Job) -> None:
    """To the first process of the namespace, which the one that made it sees as its child."""
    (first,) = map(int, Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split())
    os.kill(first, signal.SIGTERM)


def to_all(job: Job) -> None:
    """As a scheduler does that knows the job's processes: to each of them, and once more."""
    for _ in range(2):
        for process in job.family():
            os.kill(process, signal.SIGTERM)


def last_rank(job: Job) -> int:
    return (job.ranks() or [job.pid])[-1]


NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc")
WAYS = {
    "SIGTERM to the script": Way(lambda job: os.kill(job.pid, signal.SIGTERM), 75),
    "SIGUSR1 to the script": Way(lambda job: os.kill(job.pid, signal.SIGUSR1), 75),
    "SIGTERM to its group": Way(lambda job: os.killpg(job.pid, signal.SIGTERM), 75),
    "SIGTERM to all processes, twice": Way(to_all, 75),
    "SIGTERM to the last rank": Way(lambda job: os.kill(last_rank(job), signal.SIGTERM), 75),
    "SIGTERM to the first process of a container": Way(from_a_container, 75, before=NAMESPACE),
    "Ctrl-C": Way(press, 75, how=TERMINAL),
    "the terminal is closed": Way(lambda job: job.close_terminal(), 75, how=TERMINAL),
    "SIGKILL to the script": Way(lambda job: os.kill(job.pid, signal.SIGKILL), 137, saves=False),
    "SIGKILL to the last rank": Way(lambda job: os.kill(last_rank(job), signal.SIGKILL), 74, saves=False),
}  # fmt: skip
EVERY_DAY = {("Ctrl-C", 1)}
"""Two processes are stopped in tests/train/test_signals.py."""


def rows() -> list[Any]:
    return [
        pytest.param(way, count, marks=[] if (way, count) in EVERY_DAY else [pytest.mark.nightly])
        for way in WAYS
        for count in (1, 2)
    ]


@pytest.mark.parametrize(("name", "num_processes"), rows())
def test_way(start: Starter, name: str, num_processes: int) -> None:
    way = WAYS[name]
    if way.before and subprocess.run([*way.before, "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no namespaces of processes")
    job = start(num_processes, before=way.before, **way.how)
    job.wait_for_steps(STEPS_BEFORE)
    way.end(job)
    code = job.exit_code()
    assert job.left() == {}
    # the launcher of one process is that process: nothing survives it, and nothing can be said
    launcher_is_gone = name == "SIGKILL to the script" and num_processes == 2
    expected = 137 if (name, num_processes) == ("SIGKILL to the last rank", 1) else way.exit_code
    assert code == expected, job.log()
    if way.saves or launcher_is_gone:
        assert job.saved_at() == job.steps()
        assert "error RUN-001" in job.log().splitlines()[-1]
        assert job.log().count("error ") == 1
    else:
        assert job.checkpoints() == []
    assert "\r" not in job.log()
    assert "step/s" not in job.log()


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["SIGTERM to the script", "SIGTERM to its group", "SIGTERM to the last rank"])
def test_what_was_asked_to_stop_is_not_started_again(start: Starter, name: str) -> None:
    job = start(2, environment={"MAX_RESTARTS": "2"})
    job.wait_for_steps(STEPS_BEFORE)
    WAYS[name].end(job)
    assert job.exit_code() == 75, job.log()
    assert job.left() == {}
    assert job.saved_at() == job.steps()
    assert job.log().count("error ") == 1


@pytest.mark.nightly
@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("name", ["SIGTERM to its group", "Ctrl-C"])
def test_adapters(start: Starter, demo: Path, tmp_path: Path, name: str, num_processes: int) -> None:
    """finetune_lora.sh."""
    told = variables(demo, tmp_path / "run", num_processes)
    job = start(
        num_processes,
        environment={"LOAD_BASE_MODEL": told["LOAD_PATH"], "LOAD_PATH": ""},
        script=PRETRAIN.with_name("finetune_lora.sh"),
        **WAYS[name].how,
    )
    job.wait_for_steps(STEPS_BEFORE)
    WAYS[name].end(job)
    assert job.exit_code() == 75, job.log()
    assert job.left() == {}
    assert job.saved_at() == job.steps()
    assert job.log().count("error ") == 1


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("whom", "num_processes", "code", "said"),
    [
        ("script", 1, 131, ""),
        ("script", 2, 131, "error RUN-010: Ended at once by SIGQUIT to the launcher. Nothing was saved since"),
        ("last rank", 2, 74, "was ended by SIGQUIT. Fix: Somebody sent it that signal"),
    ],
)
def test_other_signals_end_at_once(start: Starter, whom: str, num_processes: int, code: int, said: str) -> None:
    """SIGQUIT (Ctrl-\\), which asks for no order."""
    job = start(num_processes)
    job.wait_for_steps(STEPS_BEFORE)
    os.kill(job.pid if whom == "script" else last_rank(job), signal.SIGQUIT)
    assert job.exit_code() == code, job.log()
    assert job.left() == {}
    assert job.checkpoints() == []
    assert said in job.log().splitlines()[-1]
    assert job.log().count("error ") == (said != "")


@pytest.mark.nightly
def test_a_second_ctrl_c_quits(start: Starter) -> None:
    """The first says how; the second ends a step that does not come to its end, because a process stands still."""
    job = start(2, on_terminal=True)
    job.wait_for_steps(STEPS_BEFORE)
    os.kill(job.ranks()[-1], signal.SIGSTOP)
    time.sleep(1)
    press(job)
    time.sleep(AGAIN_S + 1)
    press(job)
    assert job.exit_code() == 130
    assert job.left() == {}
    assert job.checkpoints() == []
    assert b"press Ctrl-C" in job.shown
    assert "error RUN-011" in job.log().splitlines()[-1]


@pytest.mark.nightly
@pytest.mark.parametrize("num_processes", [1, 2])
def test_ctrl_c_without_a_save(demo: Path, tmp_path: Path, num_processes: int) -> None:
    """`mm train` without --save-on-signal."""
    told = variables(demo, tmp_path / "run", num_processes)
    command = [sys.executable, str(ROOT / "mm" / "isolated.py")]
    if num_processes > 1:
        command += ["mm.cli.launch", "--nproc_per_node", "2", "--master_port", told["MASTER_PORT"], "-m"]
    flags = {"mm-data": "MM_DATA", "mm-model": "MM_MODEL", "load": "LOAD_PATH", "save": "SAVE_PATH"}
    command += ["mm.cli.train", *WORDS, "--lr", "1e-4", *(w for f, v in flags.items() for w in (f"--{f}", told[v]))]
    job = Job(command, told, on_terminal=True)
    try:
        job.wait_for_steps(STEPS_BEFORE)
        press(job)
        assert job.exit_code() == 130
        assert job.left() == {}
        assert job.checkpoints() == []
        said = job.shown.decode().strip().splitlines()[-1]
        assert said.startswith("error RUN-010: Ended by SIGINT. Nothing was saved since the newest checkpoint")
    finally:
        job.end()


def broken_output(kind: str, tmp_path: Path) -> tuple[dict[str, Any], Callable[[], None]]:
    """How to start a job, and what then happens to its output."""
    if kind == "a full disk":
        return {"stdout": os.open("/dev/full", os.O_WRONLY)}, lambda: None
    if kind == "a full disk under the log":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "train.log").symlink_to("/dev/full")
        return {}, lambda: None
    reader, writer = os.pipe()
    if kind == "a reader that is gone":
        return {"stdout": writer}, lambda: os.close(reader)
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    return {"stdout": writer}, lambda: None


OUTPUTS = ("a full disk", "a full disk under the log", "a reader that is gone", "a reader that takes nothing")


@pytest.mark.parametrize(
    ("kind", "num_processes"),
    [pytest.param(kind, count, marks=pytest.mark.nightly) for kind in OUTPUTS for count in (1, 2)],
)
def test_output_that_breaks(start: Starter, tmp_path: Path, kind: str, num_processes: int) -> None:
    """The run goes on, and stops as it is asked to."""
    how, happens = broken_output(kind, tmp_path)
    job = start(num_processes, **how)
    job.wait_for_steps(2)
    happens()
    job.wait_for_steps(job.steps() + 40)
    os.kill(job.pid, signal.SIGTERM)
    assert job.exit_code() == 75
    assert job.left() == {}
    assert job.saved_at() == job.steps()
    if kind != "a full disk under the log":
        lines = job.log().splitlines()
        assert sum("| loss" in line for line in lines) == job.steps()
        assert lines[-1].startswith("error RUN-001")


@pytest.mark.nightly
@pytest.mark.parametrize("num_processes", [1, 2])
def test_under_nohup_a_terminal_may_go(start: Starter, num_processes: int) -> None:
    job = start(num_processes, before=("nohup",), on_terminal=True)
    job.wait_for_steps(2)
    job.close_terminal()
    job.wait_for_steps(job.steps() + 10)
    os.kill(job.pid, signal.SIGTERM)
    assert job.exit_code() == 75
    assert job.left() == {}


@pytest.mark.nightly
@pytest.mark.parametrize("num_processes", [1, 2])
def test_closed_streams(start: Starter, num_processes: int) -> None:
    """A daemon that closes everything: what would be said there is in the log, and in no other file."""
    job = start(num_processes, before=("bash", "-c", 'exec "$@" <&- >&- 2>&-', "closed"))
    job.wait_for_steps(STEPS_BEFORE)
    for process in job.family():
        assert os.readlink(f"/proc/{process}/fd/2") == os.devnull
    os.kill(job.pid, signal.SIGTERM)
    assert job.exit_code() == 75
    assert job.left() == {}
    assert job.saved_at() == job.steps()
    assert job.log().splitlines()[-1].startswith("error RUN-001")


class Fault(NamedTuple):
    """A run that ends by an error. words, environment: which make it. exit_code, id: of its end."""

    words: tuple[str, ...]
    environment: dict[str, str]
    exit_code: int
    id: str


SAVE = ("--save-interval", "2")
FAULTS = {
    "the command line": Fault(("--train-itres", "5"), {}, 64, "CFG-007"),
    "the configuration": Fault(("--min-lr", "1"), {}, 64, "CFG-025"),
    "the weights": Fault(("--load", "nowhere"), {}, 65, "DATA-020"),
    "a save on a full disk": Fault(SAVE, {"MM_FAULT": "save.shard_half_written:1:enospc"}, 74, "CKPT-031"),
    "a defect in a save": Fault(SAVE, {"MM_FAULT": "save.manifest_written:1:raise"}, 70, "RUN-005"),
    "a kill in a save": Fault(SAVE, {"MM_FAULT": "save.shard_written:1:kill9"}, 137, ""),
    "a background save": Fault((*SAVE, "--async-save"), {"MM_FAULT": "save.shard_written:1:enospc"}, 74, "CKPT-031"),
}


@pytest.mark.nightly
@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("name", FAULTS)
def test_error(start: Starter, name: str, num_processes: int) -> None:
    fault = FAULTS[name]
    job = start(num_processes, fault.words, environment=fault.environment)
    code = job.exit_code(240)
    assert job.left() == {}
    if name == "a kill in a save" and num_processes == 2:
        assert (code, "error RUN-004" in job.log().splitlines()[-1]) == (74, True)
        return
    assert code == fault.exit_code, job.log()
    if fault.id:
        assert job.log().splitlines()[-1].startswith(f"error {fault.id}"), job.log()
        assert job.log().count("\nerror ") + job.log().startswith("error ") == 1


@pytest.mark.nightly
@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("seconds", [0.02, 0.2, 0.5, 1, 2, 3, 4, 6, 8])
def test_a_signal_while_it_starts(start: Starter, seconds: float, num_processes: int) -> None:
    """Nothing is there to save. Before the program has read its flags it cannot know what they promise: 143."""
    job = start(num_processes)
    time.sleep(seconds)
    knows = job.catches(signal.SIGTERM)
    os.kill(job.pid, signal.SIGTERM)
    assert job.exit_code() in ((75,) if knows else (75, 143))
    assert job.left() == {}
    assert job.checkpoints() == [] or job.saved_at() == job.steps()
    assert "RUN-004" not in job.log()
