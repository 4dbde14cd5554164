"""Recomputation changes no bit: losses, gradients, norms and weights over two steps, on every kind of layout."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from parity import MIXED, Row, Trace, parallel_run
from ranks import run_ranks

from mm.config.layerzero import ZeroConfig
from mm.config.layout import Layout, even_stages
from mm.config.place import place
from mm.config.recompute import Recompute
from mm.device.backend import select
from mm.parallel.apply import DataParallelOptions
from mm.parallel.launch import Job
from mm.parallel.mesh import build_mesh
from mm.wan.block import WanBlock

EACH, PAIRS, FIRST = Recompute("uniform", 1), Recompute("uniform", 2), Recompute("block", 1)
OVERLAPPED = DataParallelOptions(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
LAYOUTS = [
    Row(Layout(4), OVERLAPPED),
    Row(Layout(4, cp_size=4, ulysses_size=2), samples=MIXED),
    Row(Layout(4, tp_size=2, sequence_parallel=True, cp_size=2, ulysses_size=2), samples=MIXED),
    Row(Layout(4, tp_size=2, pp_size=2, stages=even_stages(6, 2))),
    Row(Layout(4, pp_size=2, vp_size=2, stages=even_stages(8, 2, 2)), OVERLAPPED, samples=MIXED),
    Row(Layout(4, zero3_size=2), DataParallelOptions(use_distributed_optimizer=True), ZeroConfig(zero3_size=2)),
    Row(Layout(4, zero3_size=2, cp_size=2, pp_size=2, stages=even_stages(6, 2)), zero=ZeroConfig(zero3_size=2)),
]


def identical(run: Trace, other: Trace) -> bool:
    return (
        run.losses == other.losses
        and run.norms == other.norms
        and all(a.keys() == b.keys() for a, b in zip(run.gradients, other.gradients, strict=True))
        and all(torch.equal(a[n], b[n]) for a, b in zip(run.gradients, other.gradients, strict=True) for n in a)
        and all(torch.equal(value, other.weights[name]) for name, value in run.weights.items())
    )


def compare_here() -> list[dict[str, Any]]:
    """Of every layout: which plans gave other bits, and how often blocks ran with each."""
    backend, found = select("cpu"), []
    with Job(place(), backend.collective, backend.device, 2), pytest.MonkeyPatch.context() as patch:
        runs, forward = [0], WanBlock.forward

        def counting(*args: Any) -> Any:
            runs[0] += 1
            return forward(*args)

        patch.setattr(WanBlock, "forward", counting)
        for row in LAYOUTS:
            with build_mesh(row.layout, 2, "cpu") as mesh:
                result: dict[str, Any] = {"different": [], "runs": {}}
                traces = {}
                for name, plan in {"none": None, "each": EACH, "pairs": PAIRS, "first": FIRST}.items():
                    runs[0] = 0
                    traces[name] = parallel_run(replace(row, recompute=plan), mesh, backend)
                    result["runs"][name] = runs[0]
                    if not identical(traces[name], traces["none"]):
                        result["different"].append(name)
                found.append(result)
    return found


@pytest.fixture(scope="module")
def results() -> list[list[dict[str, Any]]]:
    return run_ranks(4, compare_here, timeout_s=240)


@pytest.mark.parametrize("index", range(len(LAYOUTS)), ids=[row.id for row in LAYOUTS])
def test_no_bit_changes_and_blocks_run_as_often_as_planned(index: int, results: list[list[dict[str, Any]]]) -> None:
    row = LAYOUTS[index]
    chunks, blocks = row.layout.vp_size, row.wan.num_layers // row.layout.pp_size
    for rank in results:
        found = rank[index]
        assert found["different"] == []
        once = found["runs"]["none"]
        assert found["runs"] == {
            "none": once, "each": 2 * once, "pairs": 2 * once, "first": once + once * chunks // blocks,
        }  # fmt: skip


@pytest.mark.parametrize(
    ("plan", "groups"),
    [
        (Recompute("uniform", None), [(0, 1, True), (1, 2, True), (2, 3, True), (3, 4, True), (4, 5, True)]),
        (Recompute("uniform", 2), [(0, 2, True), (2, 4, True), (4, 5, True)]),
        (Recompute("block", 2), [(0, 1, True), (1, 2, True), (2, 3, False), (3, 4, False), (4, 5, False)]),
        (Recompute("block", None), [(index, index + 1, True) for index in range(5)]),
    ],
)
def test_groups_of_five_blocks(plan: Recompute, groups: list[tuple[int, int, bool]]) -> None:
    assert [(blocks.start, blocks.stop, again) for blocks, again in plan.groups(5)] == groups
