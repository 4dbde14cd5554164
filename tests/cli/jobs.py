"""Runs an example script as a user does, on a terminal, a pipe or a file, and looks at what it leaves."""

import json
import os
import pty
import signal
import subprocess
import time
import uuid
from pathlib import Path

import psutil
import pytest
from ranks import ANY_PORT

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "wan2.1"
PRETRAIN = EXAMPLES / "1.3b" / "t2v" / "pretrain.sh"
MARK = "MM_TEST_JOB"


def variables(demo: Path, save: Path, num_processes: int) -> dict[str, str]:
    """What the script is told for the embedded default."""
    return {
        "NPUS_PER_NODE": str(num_processes),
        "MASTER_PORT": ANY_PORT,
        "MASTER_ADDR": "127.0.0.1",
        "PRECISION": "fp32",
        "RECOMPUTE": "",
        "MM_DATA": str(demo / "configs" / "feature_data.json"),
        "MM_MODEL": str(demo / "configs" / "pretrain_model.json"),
        "LOAD_PATH": str(demo / "weights" / "Wan2.1-T2V-Tiny-Diffusers" / "transformer"),
        "SAVE_PATH": str(save),
        "OMP_NUM_THREADS": "1",
    }


class Job:
    """A command in a session of its own, with its standard output on `stdout` or on a terminal.

    Attributes:
        process: what was started; terminal: our end of its terminal, or None.
    """

    def __init__(
        self, command: list[str], environment: dict[str, str], *, on_terminal: bool = False, stdout: int | None = None
    ) -> None:
        self.save = Path(environment["SAVE_PATH"])
        self.mark = uuid.uuid4().hex
        self.terminal: int | None = None
        variables = {**os.environ, **environment, MARK: self.mark}
        if on_terminal:
            # As sshd does: the first process of a session that has this terminal, so that its end is a hang-up.
            pid, self.terminal = pty.fork()
            if pid == 0:
                os.execvpe(command[0], command, variables)
            self.pid = pid
            self._process = None
        else:
            self._process = subprocess.Popen(
                command, env=variables, stdout=stdout, stderr=subprocess.STDOUT, start_new_session=True
            )
            self.pid = self._process.pid
        self.shown = b""

    def log(self) -> str:
        path = self.save / "train.log"
        return path.read_text() if path.is_file() else ""  # /dev/full has no end

    def steps(self) -> int:
        path = self.save / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def wait_for_steps(self, count: int, within_s: float = 240) -> None:
        until = time.monotonic() + within_s
        while self.steps() < count:
            self.look()
            assert self.alive(), self.log() + self.shown.decode(errors="replace")
            assert time.monotonic() < until, self.log()
            time.sleep(0.05)

    def look(self) -> None:
        """Read what the terminal shows; one that nobody reads is full soon."""
        if self.terminal is not None:
            os.set_blocking(self.terminal, False)
            try:
                while text := os.read(self.terminal, 65536):
                    self.shown += text
            except (BlockingIOError, OSError):
                pass

    def alive(self) -> bool:
        try:
            return psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def catches(self, number: signal.Signals) -> bool:
        """Whether what was started has a handler for a signal; Python leaves its default until the program sets one."""
        (mask,) = [
            line for line in Path(f"/proc/{self.pid}/status").read_text().splitlines() if line.startswith("SigCgt")
        ]
        return bool(int(mask.split()[1], 16) >> (number - 1) & 1)

    def family(self) -> dict[int, str]:
        """Process ids and command lines of all that live and come from the job."""
        found = {}
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found[process.pid] = " ".join(process.cmdline())
            except psutil.Error:
                continue
        return found

    def ranks(self) -> list[int]:
        """Process ids by rank, of a job of several processes."""
        found = {}
        for pid in self.family():
            try:
                process = psutil.Process(pid)
                if "mm.cli.train" in process.cmdline() and "mm.cli.launch" not in process.cmdline():
                    found[int(process.environ()["RANK"])] = pid
            except (psutil.Error, KeyError):
                continue
        return [found[rank] for rank in sorted(found)]

    def close_terminal(self) -> None:
        assert self.terminal is not None
        os.close(self.terminal)
        self.terminal = None

    def exit_code(self, within_s: float = 180) -> int:
        """As a shell sees it: 128 and the signal's number for a process that a signal ended.

        The time is what a step, a save and an exit may take on a machine that does much else; only a hang is longer.
        """
        until = time.monotonic() + within_s
        while self.alive():
            self.look()
            if time.monotonic() > until:
                self.show_stacks()
                pytest.fail(f"still there: {self.family()}\n{self.log()}")
            time.sleep(0.05)
        self.look()
        if self._process is not None:
            code = self._process.wait()
        else:
            code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return code if code >= 0 else 128 - code

    def show_stacks(self) -> None:
        """Have Python write what its threads do to the log file."""
        os.kill(self.pid, signal.SIGABRT)
        time.sleep(2)

    def left(self, within_s: float = 30) -> dict[int, str]:
        """What is still there after that time."""
        until = time.monotonic() + within_s
        while (family := self.family()) and time.monotonic() < until:
            time.sleep(0.2)
        return family

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in self.save.glob("iter_*"))

    def saved_at(self) -> int:
        """The step of the newest checkpoint, which is whole."""
        newest = self.save / self.checkpoints()[-1]
        return int(json.loads((newest / "manifest.json").read_text())["step"])

    def end(self) -> None:
        """Leave nothing behind, whatever became of a test."""
        for pid in self.family():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if self.terminal is not None:
            self.close_terminal()
        if self._process is not None:
            self._process.wait()
