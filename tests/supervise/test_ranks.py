"""The processes that tests start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import multiprocessing.forkserver
import os
import signal
from ranks import run_ranks
from test_ranks import place
if __name__ == "__main__":
    assert run_ranks(2, place) == ["0", "1"]
    server = multiprocessing.forkserver._forkserver
    os.kill(server._forkserver_pid, signal.SIGKILL)
    os.waitid(os.P_PID, server._forkserver_pid, os.WEXITED | os.WNOWAIT)
    multiprocessing.get_context("forkserver").set_forkserver_preload(["json"])
    multiprocessing.forkserver.ensure_running()
    assert run_ranks(2, place) == ["0", "1"]
    print("done")
"""


def place() -> str:
    return os.environ["RANK"]


@pytest.mark.nightly
def test_a_server_that_has_not_imported_what_ranks_need_is_replaced(tmp_path: Path) -> None:
    """In a process of its own, since other tests need pytest's."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    here = Path(__file__)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*here.parents[:3], here.parents[1]]))}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=180)
    assert done.stdout == "done\n", done.stderr
