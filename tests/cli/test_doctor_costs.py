"""Costs of tokens from the step times of a run: known ones come back, and what tells nothing is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mm.cli import doctor as doctor_command
from mm.config.model import WAN_1_3B
from mm.data.balance import SequenceCost, sequence_cost
from mm.errors import DataError, MMError
from mm.train.records import StepMetrics

STEP = StepMetrics(1, 0.5, "0x1p-1", 1.0, "0x1p0", 1e-3, 1, 1.0, 1.0, 1.0, 1.0)
LENGTHS = [(1560,) * 3, (1560, 6240), (32760,), (1560, 32760), (6240, 6240, 6240), (14040, 3120)]


def write(folder: Path, rows: list[StepMetrics]) -> Path:
    (folder / "metrics.jsonl").write_text("".join(f"{row.as_json()}\n" for row in rows))
    return folder


def steps(count: int, *, constant: float, alpha: float, beta: float, noise: float = 0.0) -> list[StepMetrics]:
    """Steps whose times follow the formula, but for the first five, which warm up."""
    rows = []
    for number in range(count):
        lengths = LENGTHS[number % len(LENGTHS)]
        tokens, pairs = sum(lengths), sum(length**2 for length in lengths)
        seconds = constant + alpha * tokens + beta * pairs + (9.0 if number < 5 else noise * (-1) ** number)
        rows.append(replace(STEP, step=number + 1, step_time_s=seconds, tokens=tokens, token_pairs=pairs))
    return rows


def test_known_costs_come_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path, steps(60, constant=0.05, alpha=2e-5, beta=5e-10))
    doctor_command.main(["costs", str(run)])
    told = capsys.readouterr().out
    assert "step times of 55 steps" in told and "a token           2e-05 s" in told
    assert (
        "a pair of tokens  5e-10 s" in told
        and "a step by itself  0.05 s" in told
        and "explained         100.0%" in told
    )
    assert "--pair-cost 2.5e-05)" in told


def test_a_part_that_would_be_below_zero_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path, steps(60, constant=0.0, alpha=2e-5, beta=-1e-12))
    doctor_command.main(["costs", str(run / "metrics.jsonl")])
    told = capsys.readouterr().out
    assert (
        "a pair of tokens  0 s" in told and "take no data.pair_cost from this run" in told and "--pair-cost" not in told
    )


def test_times_that_tokens_explain_badly_recommend_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path, steps(60, constant=0.05, alpha=2e-5, beta=5e-10, noise=2.0))
    doctor_command.main(["costs", str(run)])
    told = capsys.readouterr().out
    assert "take no data.pair_cost from this run" in told and "--pair-cost" not in told


def alike() -> list[StepMetrics]:
    return [replace(STEP, step=number + 1, tokens=1560, token_pairs=1560**2) for number in range(60)]


@pytest.mark.parametrize(
    ("rows", "id", "told"),
    [
        (steps(24, constant=0, alpha=1e-5, beta=0), "DATA-230", "has 19 steps to fit"),
        (alike(), "DATA-230", "as many tokens each"),
        (steps(60, constant=9, alpha=-1e-5, beta=-1e-9), "DATA-230", "do not grow with tokens"),
        ([STEP] * 0, "DATA-230", "has 0 steps to fit"),
        ([replace(STEP, step=number + 1) for number in range(60)], "DATA-230", "has 0 steps to fit"),
    ],
)
def test_what_tells_nothing(rows: list[StepMetrics], id: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{id}: No costs can be told: .*{told}"):
        doctor_command.main(["costs", str(write(tmp_path, rows))])


@pytest.mark.parametrize(("words", "id"), [([], "CFG-006"), (["a", "b"], "CFG-006"), (["nowhere"], "CKPT-070")])
def test_words_and_files_that_are_none(words: list[str], id: str) -> None:
    with pytest.raises(MMError, match=id):
        doctor_command.main(["costs", *words])


def test_a_line_of_an_earlier_version_has_no_tokens() -> None:
    values = json.loads(STEP.as_json())
    del values["tokens"], values["token_pairs"]
    assert StepMetrics.from_json(json.dumps(values)).tokens == 0


def test_the_measured_ratio_takes_the_place_of_the_models() -> None:
    assert sequence_cost(WAN_1_3B, 0.25) == SequenceCost(1.0, 0.25)
    of_model = sequence_cost(WAN_1_3B, None)
    # a block of 1536: six D x D linears a token twice, a feed-forward of 8960, cross attention with 512 tokens of text
    assert of_model.beta / of_model.alpha == 4 * 1536 / (2 * (6 * 1536**2 + 2 * 1536 * 8960 + 2 * 512 * 1536))
