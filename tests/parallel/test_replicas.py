"""Replicas whose weights have parted by one bit are found, on every rank and beside every axis."""

import pytest
import torch
from parity import Row
from ranks import run_ranks

from mm.config.layerzero import ZeroConfig
from mm.config.layout import Layout
from mm.config.place import process_place
from mm.device.backend import select
from mm.doctor.parity import value_of
from mm.errors import ReplicaError
from mm.optim.replica_hash import require_equal_replicas
from mm.parallel.apply import DataParallelOptions, apply
from mm.parallel.mesh import build_mesh
from mm.supervise.job import Job

TWO_AXES = {
    "tp2-dp2": Row(Layout(4, tp_size=2)),
    "zero2-replicate2": Row(Layout(4, zero3_size=2), zero=ZeroConfig(zero3_size=2)),
}


def compare(row: Row, flipped: int) -> str:
    """Flip the lowest bit of one weight on one rank, and say what comparing finds before and after."""
    with build_mesh(row.layout, 1, "cpu") as mesh:
        backend = select("cpu")
        parallel = apply(row.wan, mesh, backend, row.options, torch.float32, value_of, zero=row.zero)
        require_equal_replicas(parallel, 1)
        if torch.distributed.get_rank() == flipped:
            parameter = list(parallel.all_parameters().values())[7]
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            local.detach().view(-1)[:1].view(torch.int32).bitwise_xor_(1)
        try:
            require_equal_replicas(parallel, 2)
        except ReplicaError as error:
            assert error.exit_code == 18
            return str(error)
        return "equal"


def compare_all(rows: list[Row], flipped: int) -> list[str]:
    backend = select("cpu")
    with Job(process_place(), backend.collective, backend.device, 1):
        return [compare(row, flipped) for row in rows]


def test_one_bit_on_one_of_three_replicas_is_found() -> None:
    rows = [Row(Layout(3)), Row(Layout(3), DataParallelOptions(use_distributed_optimizer=True))]
    for told in run_ranks(3, compare_all, rows, 2):
        for text in told:
            assert text.startswith("NUM-003: After step 2 the weights of rank 2 differ from")


@pytest.mark.nightly
def test_one_bit_is_found_beside_other_axes() -> None:
    """With two copies of each part nobody can say which is right; the run stops all the same."""
    for told in run_ranks(4, compare_all, list(TWO_AXES.values()), 3):
        assert all(text.startswith("NUM-003: After step 2 the weights of rank") for text in told)
