"""The parity matrix: every layout gives the losses, gradients, norms and weights of one process.

The ids are the layouts. Over two optimizer steps with clipping: the loss within 1e-6 (1e-5 for ring and tensor
parallelism, which add up in another order), every named gradient within 1e-5 of its largest element, the reported
gradient norm equal to the norm of the gathered gradients. Starting processes is what costs, so all rows of one number
of processes share one start.
"""

from typing import Any

import pytest
from matrix import Matrix
from parity import EVEN, MIXED, ODD, Row

from mm.config.layerzero import ZeroConfig
from mm.config.layout import Layout, even_stages
from mm.parallel.apply import DataParallelOptions

PLAIN = DataParallelOptions()
SHARDED = DataParallelOptions(use_distributed_optimizer=True)
OVERLAPPED = DataParallelOptions(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)


def layout(world: int, **degrees: Any) -> Layout:
    if "pp_size" in degrees and "stages" not in degrees:
        stages = degrees["pp_size"] * degrees.get("vp_size", 1)
        degrees["stages"] = even_stages(max(stages, 4), degrees["pp_size"], degrees.get("vp_size", 1))
    return Layout(world_size=world, **degrees)


def sp(size: int) -> dict[str, Any]:
    return {"tp_size": size, "sequence_parallel": True}


def ulysses(size: int) -> dict[str, Any]:
    return {"cp_size": size, "ulysses_size": size}


def ring(size: int, **more: Any) -> dict[str, Any]:
    return {"cp_size": size, **more}


def usp(inside: int, outside: int) -> dict[str, Any]:
    return {"cp_size": inside * outside, "ulysses_size": inside}


def pp(size: int, chunks: int = 1, stages: Any = None) -> dict[str, Any]:
    given = {"stages": stages} if stages else {}
    return {"pp_size": size, "vp_size": chunks, **given}


def zero(world: int, size: int, options: DataParallelOptions = PLAIN, samples: str = ODD, **degrees: Any) -> Row:
    config = ZeroConfig(zero3_size=size, ignored_modules=["time_embedding", "ae"] if size == 4 else None)
    return Row(layout(world, zero3_size=size, **degrees), options, config, samples)


def images(world: int, model_type: str = "i2v", **degrees: Any) -> Row:
    return Row(layout(world, **degrees), model_type=model_type)


def speeds(world: int, options: DataParallelOptions = PLAIN, **degrees: Any) -> Row:
    return Row(layout(world, **degrees), options, model_type="speedcontrol")


ROWS = [
    Row(layout(1)),
    Row(layout(1), SHARDED, micro_batch_size=2),
    zero(1, 1),
    # two processes: every axis alone
    Row(layout(2)),
    Row(layout(2), OVERLAPPED, samples=MIXED),
    Row(layout(2, **ulysses(2))),
    Row(layout(2, **ring(2))),
    Row(layout(2, tp_size=2)),
    Row(layout(2, **sp(2))),
    Row(layout(2, **pp(2))),
    Row(layout(2, **pp(2, 1, ((1, 3),))), samples=MIXED),
    Row(layout(2, **pp(2, 2)), OVERLAPPED),
    Row(layout(2, **pp(2, 2, ((1, 2), (1, 1)))), samples=MIXED),
    zero(2, 2),
    zero(2, 1, SHARDED),
    # two, with a change of the time modulation
    speeds(2, OVERLAPPED),
    speeds(2, **ulysses(2)),
    speeds(2, **ring(2)),
    speeds(2, tp_size=2),
    speeds(2, **sp(2)),
    speeds(2, **pp(2)),
    speeds(2, OVERLAPPED, **pp(2, 2)),
    Row(layout(2, zero3_size=2), PLAIN, ZeroConfig(zero3_size=2), model_type="speedcontrol"),
    # three and six: degrees that are no power of two
    Row(layout(3, **ulysses(3))),
    Row(layout(3, **ring(3)), samples=MIXED),
    Row(layout(3, **sp(3))),
    Row(layout(6, **ulysses(6)), SHARDED),
    Row(layout(6, **ring(6))),
    Row(layout(6, **usp(3, 2)), samples=MIXED),
    Row(layout(6, **sp(2), **ring(3))),
    # four: pairs
    Row(layout(4, **ulysses(2)), OVERLAPPED),
    Row(layout(4, **usp(2, 2))),
    Row(layout(4, **ring(4, window_size=2, send_recv_overlap=True))),
    Row(layout(4, tp_size=2, **ring(2)), samples=MIXED),
    Row(layout(4, **sp(2), **ulysses(2)), samples=MIXED),
    Row(layout(4, **sp(2), **pp(2)), SHARDED),
    Row(layout(4, tp_size=2, **pp(2, 2)), OVERLAPPED),
    Row(layout(4, **pp(2, 2), **ulysses(2)), SHARDED, micro_batch_size=2),
    Row(layout(4, **pp(2, 1, ((3, 1),)), **ring(2)), samples=MIXED),
    Row(layout(4, **pp(4, 2)), SHARDED),
    Row(layout(4, **pp(2, 2)), OVERLAPPED),
    zero(4, 2),
    zero(4, 2, SHARDED, MIXED),
    zero(4, 4, **ulysses(2)),
    zero(4, 2, **sp(2)),
    zero(4, 2, **pp(2, 2)),
    # four, with images: what tensor parallelism cuts, what crosses pipelines, what layer-zero keeps whole
    images(4, tp_size=2, **ulysses(2)),
    images(4, **sp(2), **pp(2, 2)),
    images(4, "flf2v", tp_size=2, **pp(2)),
    Row(layout(4, zero3_size=2), PLAIN, ZeroConfig(zero3_size=2), model_type="flf2v"),
    speeds(4, **sp(2), **pp(2, 2)),
    # eight: everything together
    Row(layout(8, **sp(2), **ulysses(2), **pp(2)), OVERLAPPED),
    Row(layout(8, **sp(2), **usp(2, 2)), SHARDED, samples=EVEN),
    Row(layout(8, **usp(2, 2), **pp(2, 2)), OVERLAPPED, samples=MIXED),
    Row(layout(8, **ring(8, window_size=4)), samples=MIXED),
    Row(layout(8, **pp(4, 2, ((1, 1, 1, 1), (1, 1, 1, 1))), tp_size=2)),
    zero(8, 2, SHARDED, MIXED, **sp(2), **pp(2)),
    zero(8, 4, **usp(2, 2), **pp(2, 2)),
]  # fmt: skip


EVERY_DAY = [row for row in ROWS if row.layout.world_size <= 2] + [
    Row(layout(4, **sp(2), **ulysses(2)), samples=MIXED),
    Row(layout(4, tp_size=2, **pp(2, 2)), OVERLAPPED),
    zero(4, 2, **pp(2, 2)),
    images(4, **sp(2), **pp(2, 2)),
]
"""The others are nightly: pairs of axes are many, and eight processes on two cores take minutes."""

MATRIX = Matrix(ROWS, EVERY_DAY)


@pytest.mark.parametrize("row", MATRIX.cases())
def test_equals_one_process(row: Row) -> None:
    MATRIX.check(row)
