"""Recomputation and offload change no bit of losses, gradients, norms and weights, on every kind of layout.

A kept attention runs forward once, and the host pool is as large as what waits in it.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from parity import MIXED, Row, WholeTrace, parallel_run
from ranks import run_ranks

from mm.activation import host_pool
from mm.activation.offload import Offloader
from mm.config.layerzero import ZeroConfig
from mm.config.layout import Layout, even_stages
from mm.config.place import process_place
from mm.config.recompute import Recompute
from mm.device.backend import select
from mm.doctor import parity
from mm.doctor.traffic import CountTraffic, axes_of, totals
from mm.ops.attention import api as attention
from mm.parallel.apply import DataParallelOptions, ParallelModel
from mm.parallel.mesh import build_mesh
from mm.supervise.job import Job
from mm.wan.block import WanBlock

PLANS = {
    "none": None,
    "each": Recompute(),
    "pairs": Recompute(group_size=2),
    "first": Recompute(full_layers=1),
    "keep": Recompute(full_layers=0, keep_layers=None, offload=True),
    "mixed": Recompute(full_layers=1, keep_layers=1, kept="q,k,v,O"),
    "keep pairs": Recompute(2, 0, None, "q,k,v,O", offload=True),
}
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


def identical(run: WholeTrace, other: WholeTrace) -> bool:
    return (
        run.losses == other.losses
        and run.norms == other.norms
        and all(a.keys() == b.keys() for a, b in zip(run.gradients, other.gradients, strict=True))
        and all(torch.equal(a[n], b[n]) for a, b in zip(run.gradients, other.gradients, strict=True) for n in a)
        and all(torch.equal(value, other.weights[name]) for name, value in run.weights.items())
    )


def compare_here(rows: list[Row], plans: list[str]) -> list[dict[str, Any]]:
    """Of every layout: which plans gave other bits, how often blocks and attention ran, slots never used at once."""
    backend, found = select("cpu"), []
    runs = {"blocks": 0, "attention": 0}
    pools: list[Offloader] = []
    bytes_sent: Counter[str] = Counter()
    compute_gradients = parity.compute_gradients

    class Watched(Offloader):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            pools.append(self)

    def counting(name: str, function: Any) -> Any:
        def counted(*args: Any) -> Any:
            runs[name] += 1
            return function(*args)

        return counted

    def counting_bytes(parallel: ParallelModel, *args: Any) -> Any:
        with CountTraffic(axes_of(parallel.mesh)) as traffic:
            losses = compute_gradients(parallel, *args)
        for (axis, _), sent in totals(traffic.calls).items():
            bytes_sent[axis] += sent.bytes
        return losses

    with Job(process_place(), backend.collective, backend.device, 5), pytest.MonkeyPatch.context() as patch:
        patch.setattr(WanBlock, "forward", counting("blocks", WanBlock.forward))
        patch.setattr(attention, "attention_with_lse", counting("attention", attention.attention_with_lse))
        patch.setattr(host_pool, "Offloader", Watched)
        patch.setattr(parity, "compute_gradients", counting_bytes)
        for row in rows:
            with build_mesh(row.layout, 2, "cpu") as mesh:
                result: dict[str, Any] = {
                    "different": [],
                    "blocks": {},
                    "attention": {},
                    "unused slots": [],
                    "sent": {},
                }
                traces = {}
                for name in plans:
                    runs.update(blocks=0, attention=0)
                    pools.clear()
                    bytes_sent.clear()
                    traces[name] = parallel_run(replace(row, recompute=PLANS[name]), mesh, backend)
                    result["sent"][name] = {axis: bytes_sent[axis] for axis in ("ulysses", "ring")}
                    for what in runs:
                        result[what][name] = runs[what]
                    result["unused slots"] += [pool.fewest_free for pool in pools]
                    if not identical(traces[name], traces["none"]):
                        result["different"].append(name)
                found.append(result)
    return found


SOME = [LAYOUTS[2], replace(LAYOUTS[6], micro_batch_size=2)], ["none", "pairs", "mixed", "keep pairs"]
ALL = LAYOUTS, list(PLANS)


@dataclass(frozen=True)
class Results:
    """What `compare_here` found: of every rank, for every row."""

    rows: list[Row]
    ranks: list[list[dict[str, Any]]]


@pytest.fixture(scope="module", params=[SOME, pytest.param(ALL, marks=pytest.mark.nightly)], ids=["some", "all"])
def results(request: pytest.FixtureRequest) -> Results:
    rows, plans = request.param
    return Results(rows, run_ranks(4, compare_here, rows, plans, timeout_s=400))


def only(expected: dict[str, float], found: dict[str, Any]) -> dict[str, float]:
    """What is expected of the plans that ran."""
    return {name: expected[name] for name in found}


def test_no_bit_changes_and_blocks_run_as_often_as_planned(results: Results) -> None:
    for index, row in enumerate(results.rows):
        chunks, blocks = row.layout.vp_size, row.wan.num_layers // row.layout.pp_size
        for rank in results.ranks:
            found = rank[index]
            assert found["different"] == [], row.id
            once, share = found["blocks"]["none"], chunks / blocks
            runs = {
                "none": once, "each": 2 * once, "pairs": 2 * once, "first": once * (1 + share),
                "keep": 2 * once, "mixed": once * (1 + 2 * share), "keep pairs": 2 * once,
            }  # fmt: skip
            assert found["blocks"] == only(runs, found["blocks"]), row.id
            # In each block self attention (of a ring: once for each visit that has tokens), and cross attention once.
            self_once, cross_once = found["attention"]["none"] - once, once
            runs = {
                "none": self_once + cross_once,
                "each": 2 * (self_once + cross_once),
                "pairs": 2 * (self_once + cross_once),
                "first": (self_once + cross_once) * (1 + share),
                "keep": self_once + 2 * cross_once,
                "mixed": self_once * (1 + share) + cross_once * (1 + 2 * share),
                "keep pairs": self_once + 2 * cross_once,
            }
            assert found["attention"] == only(runs, found["attention"]), row.id
            assert found["unused slots"], row.id
            assert all(unused == 0 for unused in found["unused slots"]), row.id


def test_what_is_kept_is_not_sent_again(results: Results) -> None:
    """Of Ulysses' 8 units of a block in forward and backward, three are q, k and v of a forward and one the output."""
    assert any(row.layout.ulysses_size > 1 for row in results.rows)
    for index, row in enumerate(results.rows):
        sent = results.ranks[0][index]["sent"]
        if row.layout.ulysses_size > 1:
            share = row.layout.vp_size / row.wan.num_layers * row.layout.pp_size
            more = {name: bytes_sent["ulysses"] / sent["none"]["ulysses"] - 1 for name, bytes_sent in sent.items()}
            expected = {
                "none": 0, "each": 4 / 8, "pairs": 4 / 8, "first": 4 / 8 * share,
                "keep": 4 / 8, "mixed": (4 + 1) / 8 * share, "keep pairs": 1 / 8,
            }  # fmt: skip
            assert more == pytest.approx(only(expected, more)), row.id
        if row.layout.ring_size > 1:
            assert sent["keep pairs"]["ring"] == sent["none"]["ring"], row.id
            assert sent["pairs"]["ring"] > sent["none"]["ring"], row.id


@pytest.mark.parametrize(
    ("plan", "groups"),
    [
        (Recompute(), "F0 F1 F2 F3 F4"),
        (Recompute(group_size=2), "F0-1 F2-3 F4"),
        (Recompute(full_layers=2), "F0 F1 n2 n3 n4"),
        (Recompute(full_layers=0), "n0 n1 n2 n3 n4"),
        (Recompute(full_layers=0, keep_layers=None), "k0 k1 k2 k3 k4"),
        (Recompute(full_layers=1, keep_layers=2), "F0 k1 k2 n3 n4"),
        (Recompute(full_layers=4, keep_layers=9), "F0 F1 F2 F3 k4"),
        (Recompute(2, 0, None), "k0-1 k2-3 k4"),
    ],
)
def test_groups_of_five_blocks(plan: Recompute, groups: str) -> None:
    letters = {"full": "F", "keep attention": "k", "none": "n"}
    found = [
        f"{letters[mode]}{blocks.start}" + (f"-{blocks.stop - 1}" if len(blocks) > 1 else "")
        for blocks, mode in plan.groups(5)
    ]
    assert " ".join(found) == groups
