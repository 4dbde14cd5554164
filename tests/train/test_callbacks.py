"""A callback and a sink from outside: those of docs/extending.md, as written there, and what the protocol promises."""

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from programs import Forked, as_script
from ranks import run_ranks
from training_runs import bits, metrics, run, words

from mm.cli import train as train_command
from mm.errors import DataError
from mm.train.callbacks.base import Callback, Every, StepDone
from mm.train.records import Record

ROOT = Path(__file__).parents[2]
STEPS = 3


def script(folder: Path) -> Path:
    """The script of the page."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
    (folder / "my_train.py").write_text(code)
    return folder / "my_train.py"


def start(folder: Path, words: list[str]) -> str:
    """Run it, and return what it says; in its own process, which finds what it leaves where it stands."""
    process = Forked(as_script, str(script(folder)), *words, at=folder, folder=folder)
    assert process.wait() == 0, process.said()
    return process.said()


def test_the_script_of_the_page(demo: Path, tmp_path: Path) -> None:
    """It measures what metrics.jsonl says too, changes no bit of the steps, and goes on after a resume."""
    save = tmp_path / "run"
    start(tmp_path, words(demo, save, train_iters=1))
    (line,) = (save / "worst.jsonl").read_text().splitlines()
    with (save / "worst.jsonl").open("a") as file:  # as a run leaves it that is killed before it saves its second step
        file.write(json.dumps(json.loads(line) | {"step": 2, "loss": 9.0}) + "\n" + line[:20])
    with (tmp_path / "table.csv").open("a") as file:
        file.write("2,worst/loss,9.0\n")
    told = start(tmp_path, words(demo, save, train_iters=STEPS))
    expected = [max(row["sample_losses"]) for row in metrics(save)]
    rows = [json.loads(line) for line in (save / "worst.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["loss"] for row in rows] == expected
    table = [row for row in csv.reader((tmp_path / "table.csv").open()) if row[1] == "worst/loss"]
    assert [(int(step), float(loss)) for step, _, loss in table] == list(enumerate(expected, start=1))
    names = {row[1] for row in csv.reader((tmp_path / "table.csv").open())}
    assert {"train/loss", "train/grad_norm", "train/lr"} <= names  # of the project's own records
    assert f"step 3 | worst sample {rows[-1]['sample']}: {expected[-1]:.4f}" in told
    assert bits(run(demo, tmp_path / "plain", train_iters=STEPS)) == bits(metrics(save))


@dataclass(frozen=True)
class Seen(Record):
    group = "seen"
    file = "seen.jsonl"

    ranks: float

    def line(self) -> None:
        pass


class Together(Callback):
    """Every second step and at the end, all ranks add up one each."""

    every = Every(2, at_end=True)
    phase = "evaluation and validation"

    def __init__(self) -> None:
        self.finished = False

    def after_step(self, done: StepDone) -> Sequence[Record]:
        total = torch.ones(())
        dist.all_reduce(total)
        return [Seen(done.step, float(total))]

    def finish(self) -> None:
        self.finished = True


class Alone(Callback):
    every = Every(1)
    collective = False

    def __init__(self) -> None:
        self.steps: list[int] = []

    def after_step(self, done: StepDone) -> Sequence[Record]:
        self.steps.append(done.step)
        return ()


def train_with_both(command: list[str]) -> tuple[bool, list[int]]:
    together, alone = Together(), Alone()
    train_command.main(command, callbacks=[together, alone])
    return together.finished, alone.steps


def test_a_collective_one_is_called_on_every_rank_and_another_on_rank_zero(demo: Path, tmp_path: Path) -> None:
    command = words(demo, tmp_path / "run", train_iters=STEPS, use_distributed_optimizer=True)
    assert run_ranks(2, train_with_both, command) == [(True, [1, 2, 3]), (True, [])]
    lines = (tmp_path / "run" / "seen.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 2, "ranks": 2.0}, {"step": 3, "ranks": 2.0}]


class Refuse(Callback):
    every = Every(2)

    def after_step(self, done: StepDone) -> Sequence[Record]:
        raise DataError("DATA-001", "enough", "Stop.")


def test_its_error_ends_the_run(demo: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="enough"):
        train_command.main(words(demo, tmp_path / "run", train_iters=STEPS), callbacks=[Refuse()])
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize(
    ("every", "called"),
    [
        (Every(2), [2, 4]),
        (Every(2, at_end=True), [2, 4, 5]),
        (Every(at_end=True), [5]),
        (Every(when_stopping=True), [3]),
        (Every(), []),
    ],
)
def test_how_often(every: Every, called: list[int]) -> None:
    """Of five steps, with a signal in the third."""
    assert [step for step in range(1, 6) if every.is_due(step, last=step == 5, stopping=step == 3)] == called


def test_every_file_of_the_two_folders_is_in_its_list() -> None:
    """A callback or sink that nobody makes would be dead."""
    for room in ("callbacks", "sinks"):
        folder = ROOT / "mm" / "train" / room
        listed: Any = (folder / "make.py").read_text()
        files = {path.stem for path in folder.glob("*.py")} - {"__init__", "base", "make"}
        assert {name for name in files if f"from mm.train.{room}.{name} import" not in listed} == set()
