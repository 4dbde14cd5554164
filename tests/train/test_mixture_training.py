"""Stores mixed by their shares, from feature_data.json to the samples of every step, on one process and on two."""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from ranks import run_ranks
from training_runs import metrics, words

from mm.cli import train as train_command
from mm.errors import ConfigError
from mm.train.callbacks.base import Callback, Every, StepDone
from mm.train.records import Record

STEPS, SAMPLES = 6, 8  # of a step


class SamplesOfSteps(Callback):
    """Notes which samples this rank's replica trains on; all replicas' together are a step's."""

    every = Every(1)

    def __init__(self) -> None:
        self.steps: dict[int, list[str]] = {}

    def after_step(self, done: StepDone) -> Sequence[Record]:
        self.steps[done.step] = [
            f"{name} {draw}" for b in done.batches for name, draw in zip(b["sample"], b["draw"], strict=True)
        ]
        return ()


def train(command: list[str]) -> dict[int, list[str]]:
    seen = SamplesOfSteps()
    train_command.main(command, callbacks=[seen])
    return seen.steps


@pytest.fixture
def stores(demo: Path, tmp_path: Path) -> list[str]:
    """Three stores of the same 16 samples."""
    return [str(shutil.copytree(demo / "features", tmp_path / name)) for name in ("a", "b", "c")]


def command(
    demo: Path, folder: Path, stores: list[str], mixture: object, name: str = "run", **flags: object
) -> list[str]:
    values = json.loads((demo / "configs" / "feature_data.json").read_text())
    (folder / "features.txt").write_text("".join(f"{store}\n" for store in stores))
    values["dataset_param"]["basic_parameters"] = {"data_path": str(folder / "features.txt")}
    values["dataloader_param"] = values.get("dataloader_param", {}) | {"mixture": mixture}
    (folder / "feature_data.json").write_text(json.dumps(values))
    sizes = {
        "micro_batch_size": 2,
        "global_batch_size": SAMPLES,
        "train_iters": STEPS,
        "use_distributed_optimizer": True,
    }
    return words(demo, folder / name, mm_data=folder / "feature_data.json", **{**sizes, **flags})


def of_store(samples: Sequence[str]) -> Counter[str]:
    return Counter({"1": "b", "2": "c"}.get(sample.split(":")[0], "a") if ":" in sample else "a" for sample in samples)


def test_shares_decide_which_samples_come(demo: Path, tmp_path: Path, stores: list[str]) -> None:
    """b has three passes; c comes from the fourth step, with half of its size, and none of its samples before."""
    shares = [
        {"folder": stores[1], "repeats": 3},
        {"folder": stores[2], "weight": 0.5, "begin_step": 3, "end_step": STEPS},
    ]
    mixture = {"shares": shares}
    alone = train(command(demo, tmp_path, stores, mixture))
    assert sorted(alone) == list(range(1, STEPS + 1))
    until, after = ([s for step in steps for s in alone[step]] for steps in (range(1, 4), range(4, 7)))
    assert of_store(until) == {"a": 6, "b": 18}  # 16 : 48 of 24 samples
    assert of_store(after) == {"a": 4, "b": 16, "c": 4}  # 16 : 48 : 8 of 24, to a group of two
    assert len(set(until + after)) == STEPS * SAMPLES, "no draw of a sample comes twice"
    first, second = run_ranks(2, train, command(demo, tmp_path, stores, mixture, "two"))
    assert {step: sorted(first[step] + second[step]) for step in first} == {
        step: sorted(samples) for step, samples in alone.items()
    }
    one, two = (metrics(tmp_path / name) for name in ("run", "two"))
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-5)

    resumed = command(demo, tmp_path, stores, mixture, "resumed", train_iters=4)
    assert train(resumed) == {step: alone[step] for step in range(1, 5)}
    assert train(command(demo, tmp_path, stores, mixture, "resumed")) == {step: alone[step] for step in (5, 6)}
    other = {"shares": [{**shares[0], "repeats": 2}, shares[1]]}
    with pytest.raises(ConfigError, match="CFG-160"):
        train(command(demo, tmp_path, stores, other, "resumed", train_iters=8))


@pytest.mark.parametrize(
    "layout",
    [
        {"use_distributed_optimizer": True},
        pytest.param({"pipeline_model_parallel_size": 2, "variable_seq_lengths": True}, marks=pytest.mark.nightly),
    ],
)
def test_a_store_has_micro_batches_of_its_own_size(
    layout: dict[str, object], demo: Path, tmp_path: Path, stores: list[str]
) -> None:
    """Two processes compute what one does, step by step; a step's mean is over its samples, however many they are."""
    mixture = {"shares": [{"folder": stores[1], "micro_batch_size": 4, "weight": 2.0}]}
    small = {"micro_batch_size": 1, "use_distributed_optimizer": False, "save_interval": STEPS}
    alone = train(command(demo, tmp_path, stores[:2], mixture, "one", **small))
    sizes = [Counter(of_store(samples)) for samples in alone.values()]
    assert all(found["a"] + found["b"] // 4 == SAMPLES and found["b"] % 4 == 0 for found in sizes)
    assert sum((found["b"] for found in sizes), 0) > 0 < sum(found["a"] for found in sizes)
    one = metrics(tmp_path / "one")
    assert [row["tokens"] for row in one] == [len(samples) * 3 * 4 * 4 for samples in alone.values()]
    run_ranks(2, train, command(demo, tmp_path, stores[:2], mixture, "two", **{**small, **layout}))
    two = metrics(tmp_path / "two")
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-5)
    assert [row["grad_norm"] for row in two] == pytest.approx([row["grad_norm"] for row in one], rel=1e-4)
    assert [row["lr"] for row in two] == [row["lr"] for row in one]


def test_shares_may_end_with_the_run_and_not_before(demo: Path, tmp_path: Path, stores: list[str]) -> None:
    mixture = {"shares": [{"folder": store, "end_step": STEPS} for store in stores]}
    assert len(train(command(demo, tmp_path, stores, mixture))) == STEPS
    with pytest.raises(ConfigError, match=f"CFG-204: .* no store is open at step {STEPS}"):
        train(command(demo, tmp_path, stores, mixture, "longer", train_iters=STEPS + 1))


@pytest.mark.parametrize(("weight", "few", "many"), [(1e-9, "b", "a"), (1e9, "a", "b")])
def test_a_share_may_be_as_small_or_large_as_one_likes(
    demo: Path, tmp_path: Path, stores: list[str], weight: float, few: str, many: str
) -> None:
    """A billionth of the groups: none of the first 24, but for the one that a share begins or ends with."""
    mixture = {"shares": [{"folder": stores[1], "weight": weight}]}
    steps = train(command(demo, tmp_path, stores[:2], mixture))
    came = of_store([sample for samples in steps.values() for sample in samples])
    assert came[many] >= (STEPS * SAMPLES) - 2 and came[few] <= 2, came


def test_a_weight_alone_has_no_effect(demo: Path, tmp_path: Path, stores: list[str]) -> None:
    shares = [{"folder": stores[0], "weight": 1e-12}]
    assert len(train(command(demo, tmp_path, stores[:1], {"shares": shares}))) == STEPS


@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_a_share_that_no_step_has_is_refused(unit: str, demo: Path, tmp_path: Path, stores: list[str]) -> None:
    mixture = {"shares": [{"folder": stores[1], f"begin_{unit}": 5, f"end_{unit}": 5}]}
    with pytest.raises(ConfigError, match=rf"CFG-203: .*end with {unit} 5, and begin after {unit} 5"):
        train(command(demo, tmp_path, stores, mixture))


@pytest.mark.nightly
def test_a_share_begins_with_an_epoch(demo: Path, tmp_path: Path, stores: list[str]) -> None:
    """Epochs of a alone are 16 samples, 2 steps; b joins after the first, for one epoch of both, 4 steps. A run that
    goes on within it sees the same samples.
    """
    mixture = {"shares": [{"folder": stores[1], "begin_epoch": 1, "end_epoch": 2}]}
    whole = train(command(demo, tmp_path, stores[:2], mixture, "whole", train_iters=7))
    assert of_store([sample for step in (1, 2) for sample in whole[step]]) == {"a": 16}
    both = [sample for step in range(3, 7) for sample in whole[step]]
    assert of_store(both) == {"a": 16, "b": 16} and len({sample.split()[0] for sample in both}) == 32
    assert of_store(whole[7]) == {"a": SAMPLES}
    parts = [train(command(demo, tmp_path, stores[:2], mixture, "parts", train_iters=steps)) for steps in (4, 7)]
    assert parts[0] | parts[1] == whole and min(parts[1]) == 5


def test_a_share_that_is_over_before_its_epoch_is_refused(demo: Path, tmp_path: Path, stores: list[str]) -> None:
    mixture = {"shares": [{"folder": stores[1], "begin_epoch": 1, "end_step": 2}]}
    with pytest.raises(ConfigError, match=r"CFG-203: .*b end before it begins: a step and an epoch contradict"):
        train(command(demo, tmp_path, stores[:2], mixture))


def test_a_store_that_is_listed_twice_has_no_share(demo: Path, tmp_path: Path, stores: list[str]) -> None:
    mixture = {"shares": [{"folder": stores[0], "weight": 2}]}
    with pytest.raises(ConfigError, match=r"CFG-203: The features name \S+/a twice"):
        train(command(demo, tmp_path, [stores[0], f"{stores[0]}/"], mixture))


def test_a_share_that_begins_after_the_run_is_told(
    demo: Path, tmp_path: Path, stores: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    mixture = {"shares": [{"folder": stores[1], "begin_step": STEPS}]}
    steps = train(command(demo, tmp_path, stores[:2], mixture))
    assert set(of_store([sample for samples in steps.values() for sample in samples])) == {"a"}
    assert f"comes after step {STEPS}, and the run ends with step {STEPS}: none of its samples" in caplog.text


def test_steps_of_a_share_are_those_of_the_batch_that_the_run_began_with(
    demo: Path, tmp_path: Path, stores: list[str]
) -> None:
    """Another global batch would move the group at which b begins, in the past too, so that it is another plan."""
    mixture = {"shares": [{"folder": stores[1], "begin_step": 3}]}
    train(command(demo, tmp_path, stores[:2], mixture, train_iters=2))
    larger = command(demo, tmp_path, stores[:2], mixture, global_batch_size=2 * SAMPLES, resume_changed="batch")
    with pytest.raises(ConfigError, match=r"CFG-160: .* steps of 4; .* steps of 8"):
        train(larger)
    both = command(demo, tmp_path, stores[:2], mixture, global_batch_size=2 * SAMPLES)
    assert list(train([*both, "--resume-changed", "batch", "data"])) == [3, 4, 5, 6]


def test_a_store_that_is_named_twice_is_refused(demo: Path, tmp_path: Path, stores: list[str]) -> None:
    """Without shares too, where all are drawn from as one; a link is the same store."""
    (tmp_path / "link").symlink_to(stores[0])
    for again in (stores[0], f"{stores[0]}/", str(tmp_path / "link")):
        with pytest.raises(ConfigError, match=r"CFG-203: The features name \S+/a twice"):
            train(command(demo, tmp_path, [stores[0], stores[1], again], {}))
    assert not (tmp_path / "run").exists()


def test_samples_are_counted_one_by_one(demo: Path, tmp_path: Path, stores: list[str]) -> None:
    """Micro-batches of one store have twice the samples of the other's; a run that goes on counts on."""
    mixture = {"shares": [{"folder": stores[1], "micro_batch_size": 4}]}

    def run(name: str, **flags: object) -> dict[int, list[str]]:
        return train(command(demo, tmp_path, stores[:2], mixture, name, **flags))

    whole, counted = run("whole"), 0
    rows = metrics(tmp_path / "whole")
    for row in rows:
        counted += len(whole[row["step"]])
        assert row["consumed_samples"] == counted != row["step"] * SAMPLES
    run("parts", train_iters=3)
    assert {**run("parts")} == {step: whole[step] for step in (4, 5, 6)}
    assert [row["consumed_samples"] for row in metrics(tmp_path / "parts")] == [r["consumed_samples"] for r in rows]
    assert [row["lr"] for row in metrics(tmp_path / "parts")] == [row["lr"] for row in rows]
