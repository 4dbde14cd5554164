"""The parity matrix can fail: every class of silent defects, made on purpose, is seen by its comparison.

Mutations of one layout run before its unbroken run, which then also proves that every replacement was taken back. A
small model and one step are enough: what is wrong shows in the first gradients.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

import family_mutations
import parity
import pytest
from mutations import Mutation
from packed_mutations import MUTATIONS
from parity import ANY, EVEN, Row, WholeTrace, compare, over_limits, parallel_run, plain_run
from ranks import run_ranks

from mm.config.layerzero import ZeroConfig
from mm.config.layout import Layout
from mm.config.place import process_place
from mm.device.backend import select
from mm.doctor import parity as comparison
from mm.parallel.mesh import build_mesh
from mm.supervise.job import Job

pytestmark = pytest.mark.nightly  # of the tests, not of the engine

SAMPLES = 2


def packed_rows() -> dict[str, Row]:
    """Three samples of different shapes in a sequence, and another one alone."""
    layouts = {
        "dp2": Layout(2),
        "ulysses2": Layout(2, cp_size=2, ulysses_size=2),
        "ring2": Layout(2, cp_size=2),
        "tp2sp": Layout(2, tp_size=2, sequence_parallel=True),
        "pp2": Layout(2, pp_size=2, stages=((2, 3),)),
    }
    of_replicas = {"dp2": ((3,), (1,))}
    return {name: Row(of, samples=ANY, packs=of_replicas.get(name, ((3, 1),))) for name, of in layouts.items()}


def family_rows() -> dict[str, Row]:
    """Models with side blocks, with a reference image in front of the video, and with a camera."""
    layouts: dict[str, Any] = {
        "ulysses2": Layout(2, cp_size=2, ulysses_size=2),
        "ring2": Layout(2, cp_size=2),
        "tp2sp": Layout(2, tp_size=2, sequence_parallel=True),
        "pp2": Layout(2, pp_size=2, stages=((2, 3),)),
    }
    tasks = {"vace": "vace", "ref": "fun_control_ref", "camera": "fun_camera"}
    asked = {*family_mutations.VACE, *family_mutations.REFERENCE, *family_mutations.CAMERA}
    return {
        f"{word}-{name}": Row(layout, model_type=task)
        for word, task in tasks.items()
        for name, layout in layouts.items()
        if f"{word}-{name}" in asked
    }


# Pipelines of five blocks: a number that none of them divides.
ROWS = {
    "tp2": Row(Layout(2, tp_size=2)),
    "tp2sp": Row(Layout(2, tp_size=2, sequence_parallel=True)),
    "ulysses2": Row(Layout(2, cp_size=2, ulysses_size=2)),
    "ulysses2-even": Row(Layout(2, cp_size=2, ulysses_size=2), samples=EVEN),
    "ring2": Row(Layout(2, cp_size=2)),
    "pp2": Row(Layout(2, pp_size=2, stages=((2, 3),))),
    "pp2vp2": Row(Layout(2, pp_size=2, vp_size=2, stages=((1, 1), (1, 2)))),
    "zero2": Row(Layout(2, zero3_size=2), zero=ZeroConfig(zero3_size=2)),
    "tp2sp-ulysses2": Row(Layout(4, tp_size=2, sequence_parallel=True, cp_size=2, ulysses_size=2)),
    "usp2x2": Row(Layout(4, cp_size=4, ulysses_size=2)),
    **{f"packed-{name}": row for name, row in packed_rows().items()},
    **family_rows(),
    "pp4": Row(Layout(4, pp_size=4, stages=((1, 1, 1, 2),))),
}

Findings = dict[str, str]
"""Measure -> what it found, for the measures that are over their limit."""


def run_mutations(world_size: int) -> dict[str, Findings]:
    """Findings of every mutation, by its id, and of every unbroken row, by its name; rank 0 has them."""
    parity.GLOBAL_BATCH = SAMPLES
    comparison.STEPS = 1
    backend, findings = select("cpu"), {}
    with Job(process_place(), backend.collective, backend.device, 2) as job:
        references: dict[tuple[Any, ...], WholeTrace] = {}
        for name, row in ROWS.items():
            if row.layout.world_size != world_size:
                continue
            with build_mesh(row.layout, 2, "cpu") as mesh:
                for case in [*(m for m in MUTATIONS if m.row == name), None]:
                    with pytest.MonkeyPatch.context() as patch:
                        if case is not None:
                            case.break_it(patch)
                        trace = parallel_run(row, mesh, backend)
                    if job.rank == 0:
                        if row.reference not in references:
                            references[row.reference] = plain_run(row)
                        findings[case.id if case else name] = judge(row, trace, references[row.reference])
    return findings


def judge(row: Row, trace: WholeTrace, reference: WholeTrace) -> Findings:
    """The comparison of the matrix with its limits."""
    found: Findings = {}
    held, expected = trace.gradients[0].keys(), reference.gradients[0].keys()
    if held != expected:
        with pytest.raises(AssertionError):
            compare(trace, reference)
        found["names"] = ", ".join(sorted(held ^ expected))
        trace, reference = only(trace, held & expected), only(reference, held & expected)
    return found | over_limits(row, compare(trace, reference))


def only(trace: WholeTrace, names: Collection[str]) -> WholeTrace:
    """The trace of these parameters."""
    gradients = [{name: step[name] for name in names} for step in trace.gradients]
    return dataclasses.replace(trace, gradients=gradients, weights={name: trace.weights[name] for name in names})


@pytest.fixture(scope="module")
def findings() -> dict[str, Findings]:
    both = [run_ranks(world_size, run_mutations, world_size, timeout_s=300)[0] for world_size in (2, 4)]
    return both[0] | both[1]


def test_every_class_of_defects_has_a_mutation() -> None:
    assert {case.kind for case in MUTATIONS} == {f"N{number}" for number in range(1, 18)}


@pytest.mark.parametrize("name", ROWS)
def test_the_unbroken_row_passes(name: str, findings: dict[str, Findings]) -> None:
    assert findings[name] == {}


@pytest.mark.parametrize("case", MUTATIONS, ids=lambda case: case.id)
def test_the_comparison_sees(case: Mutation, findings: dict[str, Findings]) -> None:
    assert case.caught_by <= findings[case.id].keys(), findings[case.id]


def test_the_loss_alone_would_miss_half_of_the_classes(findings: dict[str, Findings]) -> None:
    """What a loss curve cannot show in its first step: the reason for comparing gradients by name."""
    missed = {case.kind for case in MUTATIONS if "loss" not in findings[case.id]}
    assert missed >= {"N1", "N2", "N3", "N5", "N6"}
