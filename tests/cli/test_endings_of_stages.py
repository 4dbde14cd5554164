"""Extraction and generation that are asked to stop: what is finished stays, and the same command goes on with the rest.

As tests/cli/test_endings.py does for training, at the level of the example scripts.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from jobs import EXAMPLES, Job, variables
from store_content import is_finished, listed


class Stage(NamedTuple):
    """A script and where its results appear, one file after the other.

    Attributes:
        command: of the script. environment: its values. results: the finished files. done: all of them are there.
        output: what it said.
    """

    command: list[str]
    environment: dict[str, str]
    results: Callable[[], list[Path]]
    done: Callable[[], bool]
    output: Path


def extraction(demo: Path, home: Path, num_processes: int) -> Stage:
    store, tools = home / "features", json.loads((demo / "configs/tools.json").read_text())
    tools["sorafeature"]["save_path"] = str(store)
    (home / "tools.json").write_text(json.dumps(tools))
    environment = variables(demo, home / "run", num_processes) | {
        "MM_DATA": str(demo / "configs/data.json"),
        "MM_MODEL": str(demo / "configs/model_wan.json"),
        "MM_TOOL": str(home / "tools.json"),
        "LOG_DIR": str(home / "logs"),
    }
    command = ["bash", str(EXAMPLES / "feature_extract/feature_extraction.sh"), "--device", "cpu", "--num-workers", "1"]
    return Stage(
        command,
        environment,
        lambda: list(store.glob("shards/[0-9]*/body.bin")),
        lambda: is_finished(store) and len(listed(store)) == 16,
        home / "out",
    )


def generation(demo: Path, home: Path, num_processes: int) -> Stage:
    clips = home / "clips"
    environment = variables(demo, clips, num_processes) | {
        "MM_MODEL": str(demo / "configs/inference_model.json"),
        "PROMPT": str(demo / "prompts.txt"),
    }
    command = ["bash", str(EXAMPLES / "1.3b/t2v/inference.sh"), "--num-inference-steps", "4", "--device", "cpu"]
    return Stage(
        command,
        environment,
        lambda: list(clips.glob("video_*.mp4")),
        lambda: len(list(clips.glob("video_*.mp4"))) == len(list(clips.glob("video_*.json"))) == 16,
        home / "out",
    )


STAGES = {"extraction": extraction, "generation": generation}
Starter = Callable[[Stage], Job]


@pytest.fixture
def start() -> Iterator[Starter]:
    started: list[Job] = []

    def start(stage: Stage) -> Job:
        with stage.output.open("a") as output:
            started.append(Job(stage.command, stage.environment, stdout=output.fileno()))
        return started[-1]

    yield start
    for job in started:
        job.end()


def rows() -> list[tuple[str, str, int]]:
    return [(stage, name, count) for stage in STAGES for name in ("SIGTERM", "SIGINT", "SIGHUP") for count in (1, 2)]


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "signal_name", "num_processes"), rows())
def test_what_is_finished_stays(
    start: Starter, demo: Path, tmp_path: Path, name: str, signal_name: str, num_processes: int
) -> None:
    """A signal to the whole group, as a terminal and a scheduler send it."""
    stage, number = STAGES[name](demo, tmp_path, num_processes), signal.Signals[signal_name]
    job = start(stage)
    until = time.monotonic() + 120
    while len(stage.results()) < 2:
        assert job.alive() and time.monotonic() < until, stage.output.read_text()
        time.sleep(0.02)
    os.killpg(job.pid, number)
    assert job.exit_code() == 128 + number, stage.output.read_text()
    assert job.left() == {}
    said = stage.output.read_text()
    assert said.count("error ") == 1
    assert said.splitlines()[-1].startswith(f"error RUN-010: Ended by {signal_name}.")
    finished = {path: path.stat().st_mtime_ns for path in stage.results()}
    assert 2 <= len(finished) < 16

    again = start(stage)
    assert again.exit_code(240) == 0, stage.output.read_text()
    assert stage.done()
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
