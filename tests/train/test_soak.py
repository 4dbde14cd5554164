"""A run that is killed again and again at random moments ends with the bits of one that was never disturbed."""

import json
import multiprocessing
import os
import random
import re
import signal
import statistics
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from training_runs import bits, metrics, words

SEED = 0
KILL_WITHIN_S = 0.05
"""After the step at which a kill is due: long enough to reach any part of the next steps and saves."""


def command(demo: Path, home: Path, save: Path, **flags: Any) -> list[str]:
    """`mm train` on a model of two narrow blocks, whose steps take milliseconds."""
    content = json.loads((demo / "configs" / "pretrain_model.json").read_text())
    content["predictor"] |= {"hidden_size": 32, "ffn_dim": 64, "num_heads": 2, "num_layers": 2, "freq_dim": 32}
    (home / "model.json").write_text(json.dumps(content))
    base = {"mm_model": home / "model.json", "load": None, "init_from_scratch": True, "micro_batch_size": 2}
    return words(demo, save, **base, **flags)


def start(argv: list[str], log: Path) -> BaseProcess:
    """A process of its own; a server imports torch once and forks it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mm.train.loop"])
    process = context.Process(target=_train, args=(argv, log))
    process.start()
    return process


def _train(argv: list[str], log: Path) -> None:
    from mm.cli import train
    from mm.cli.entry import run

    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(run(train.main, argv))


def steps_done(save: Path) -> int:
    path = save / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def rss_kb(process: BaseProcess) -> int:
    """Resident memory; 0 where the process has ended."""
    try:
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) if found else 0


def run_undisturbed(argv: list[str], save: Path, log: Path) -> list[tuple[int, int]]:
    """Train; (steps done, resident memory in kB), many times a second."""
    process, seen = start(argv, log), []
    while process.is_alive():
        seen.append((steps_done(save), rss_kb(process)))
        time.sleep(0.02)
    process.join()
    assert process.exitcode == 0, log.read_text()
    return [(step, memory) for step, memory in seen if memory]


def run_killed(argv: list[str], save: Path, log: Path, steps: int, kills: int) -> None:
    """The same command again and again, killed at `kills` random moments, until it ends by itself."""
    draw = random.Random(SEED)
    for due in sorted(draw.sample(range(1, steps - 20), kills)):
        process = start(argv, log)
        while steps_done(save) < due:  # where the run before got further, this one is killed while it starts
            assert process.is_alive(), log.read_text()
            time.sleep(0.002)
        time.sleep(draw.uniform(0, KILL_WITHIN_S))
        assert process.is_alive(), log.read_text()
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    process = start(argv, log)
    process.join()
    assert process.exitcode == 0, log.read_text()


def final_state(save: Path, steps: int) -> bytes:
    """Masters and moments of all parameters after the last step, with their names and the layout of the file."""
    return (save / f"iter_{steps:07d}" / "shard-00000-of-00001.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("steps", "kills", "flags"),
    [
        (90, 3, {"save_interval": 5}),
        pytest.param(2000, 20, {"save_interval": 20}, marks=pytest.mark.nightly),
        pytest.param(2000, 20, {"save_interval": 20, "async_save": True}, marks=pytest.mark.nightly),
    ],
    ids=["short", "long", "long-async-save"],
)
def test_kills_change_no_bit(demo: Path, tmp_path: Path, steps: int, kills: int, flags: dict[str, Any]) -> None:
    flags = {"train_iters": steps, "keep_latest": 2, "lr_decay_style": "cosine", **flags}
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    seen = run_undisturbed(command(demo, tmp_path, straight, **flags), straight, tmp_path / "straight.log")
    run_killed(command(demo, tmp_path, killed, **flags), killed, tmp_path / "killed.log", steps, kills)
    assert bits(metrics(killed)) == bits(metrics(straight))
    assert len({row["loss_hex"] for row in metrics(straight)}) > 0.99 * steps  # so that equal bits say something
    assert final_state(killed, steps) == final_state(straight, steps)
    assert "going on from" in (tmp_path / "killed.log").read_text()
    if steps >= 2000:
        first, last = (
            statistics.median(memory for step, memory in seen if low <= step < low + 200) for low in (200, steps - 200)
        )
        assert last < 1.01 * first, f"{first} kB after step 200, {last} kB at the end"
