"""Samples in one sequence send what one sample with as many places sends, in as many messages."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from parity import ANY, SIZES, WAN, Row
from ranks import run_ranks
from test_parity import layout, ring, sp, ulysses

from mm.config.diffusion import DiffusionConfig
from mm.config.place import process_place
from mm.data.packed import MicroBatch
from mm.device.backend import select
from mm.diffusion.flow import FlowMatching
from mm.doctor import parity
from mm.doctor.parity import SEED, value_of
from mm.doctor.traffic import CountTraffic, axes_of, totals
from mm.parallel.apply import ParallelModel, apply
from mm.parallel.mesh import build_mesh
from mm.supervise.job import Job
from mm.train.step import compute_gradients

ROWS = {
    name: Row(layout(2, **degrees), samples=ANY, packs=((4,),))
    for name, degrees in {"ulysses": ulysses(2), "ring": ring(2), "tensor and sequence": sp(2)}.items()
}
AS_LONG = (17, 4, 4)
"""Latents of 68 tokens: 45, 2, 7 and 12, each made even. Captions of 1, 4, 7 and 1 are one of 13."""


def sent() -> dict[str, list[Any]]:
    """Bytes and calls of each axis, of the samples packed and of the long one."""
    backend, found = select("cpu"), {}
    with Job(process_place(), backend.collective, backend.device, 2):
        for name, row in ROWS.items():
            with build_mesh(row.layout, 2, "cpu") as mesh:
                parallel = apply(WAN, mesh, backend, row.options, torch.float32, value_of)
                packed = row.case.micro_batches_of(0, row.case.global_batch(0))
                long = parity.global_batch(WAN, [AS_LONG], 1, 0, [sum(row.case.text_lengths) + 1])
                found[name] = [sent_by(parallel, batches) for batches in (packed, long)]
    return found


def sent_by(parallel: ParallelModel, batches: Sequence[MicroBatch]) -> dict[str, tuple[int, float]]:
    with CountTraffic(axes_of(parallel.mesh)) as counted:
        compute_gradients(parallel, FlowMatching(DiffusionConfig()), batches, SEED)
    return {f"{axis} {kind}": (sent.calls, sent.bytes) for (axis, kind), sent in totals(counted.calls).items()}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, list[Any]]]:
    return run_ranks(2, sent, timeout_s=120)


@pytest.mark.parametrize("name", ROWS)
def test_a_sequence_sends_what_one_sample_would(name: str, ranks: list[dict[str, list[Any]]]) -> None:
    assert SIZES[ANY] == [(3, 6, 10), (1, 2, 4), (1, 2, 14), (2, 4, 6)]
    for rank in ranks:
        packed, long = rank[name]
        assert packed and packed == long
