"""A run whose folder another job has taken over, as seen by its user."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_runs import words

from mm.errors import EXIT_CHECKPOINT

ROOT = Path(__file__).parents[2]


@pytest.mark.nightly
@pytest.mark.parametrize("flags", [{}, {"async_save": True}])
def test_it_ends_with_an_id_and_writes_nothing_more(flags: dict[str, bool], demo: Path, tmp_path: Path) -> None:
    save = tmp_path / "save"
    command = [sys.executable, "-m", "mm.cli.train", *words(demo, save, train_iters=100_000, save_interval=5, **flags)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        until = time.monotonic() + 90
        while not list(save.glob("iter_*")):
            assert run.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        taken = json.loads((save / ".lock").read_text()) | {"id": "another", "pid": 1, "host": "nodeB"}
        (tmp_path / "lock").write_text(json.dumps(taken))
        os.replace(tmp_path / "lock", save / ".lock")
        _, said = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == EXIT_CHECKPOINT, said
    last = said.strip().splitlines()[-1]
    assert last.startswith("error CKPT-100: ") and "process 1 on nodeB has taken over" in last
    assert json.loads((save / ".lock").read_text()) == taken
    assert not list(save.glob(".tmp-*"))
