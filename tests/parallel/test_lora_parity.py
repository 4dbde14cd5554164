"""LoRA on every axis gives the losses, gradients, norms and adapters of one process, and this those of PEFT.

The limits of layouts are those of test_parity.py; every row also finds the base unchanged bit by bit. The limit beside
PEFT on diffusers' model is that of gradients in tests/wan/test_wan_parity.py.
"""

import pytest
from lora_parity import ALL, FIRST, IMAGES, LAST, LoRARow, against_peft, run_rows
from parity import ANY, EVEN, MIXED, Row, over_limits
from ranks import run_ranks
from test_parity import OVERLAPPED, SHARDED, images, layout, pp, ring, sp, speeds, ulysses, usp, zero

from mm.config.place import process_place
from mm.config.recompute import Recompute
from mm.device.backend import select
from mm.doctor.parity import RelativeErrors
from mm.lora.low_bit import LowBit
from mm.supervise.job import Job

FULL = Recompute()
PAIRS = Recompute(2)
KEEP = Recompute(full_layers=0, keep_layers=None)
MIX = Recompute(full_layers=1, keep_layers=1)
OFFLOAD = Recompute(full_layers=0, keep_layers=None, kept="q,k,v,O", offload=True)

ROWS = [
    LoRARow(Row(layout(1))),
    LoRARow(Row(layout(1), SHARDED, micro_batch_size=2, recompute=FULL), FIRST),
    LoRARow(Row(layout(1), recompute=OFFLOAD), LAST),
    LoRARow(Row(layout(1), recompute=PAIRS), LAST),
    LoRARow(zero(1, 1)),
    LoRARow(Row(layout(1)), ALL, "int8"),
    LoRARow(Row(layout(1), recompute=MIX), ALL, "fp8"),
    LoRARow(Row(layout(1), recompute=FULL, compiled=True), ALL, "int8"),
    # two processes: every axis alone, and stages without adapters
    LoRARow(Row(layout(2), OVERLAPPED, samples=MIXED, recompute=KEEP)),
    LoRARow(Row(layout(2), OVERLAPPED, samples=EVEN), FIRST),
    LoRARow(Row(layout(2, **ulysses(2)))),
    LoRARow(Row(layout(2, **ulysses(2))), FIRST),
    LoRARow(Row(layout(2, **ring(2)), recompute=FULL)),
    LoRARow(Row(layout(2, **ring(2))), FIRST),
    LoRARow(Row(layout(2, tp_size=2), recompute=FULL)),
    LoRARow(Row(layout(2, **sp(2)))),
    LoRARow(Row(layout(2, **sp(2)), recompute=KEEP), FIRST),
    LoRARow(Row(layout(2, **sp(2)), recompute=FULL), ALL, "fp8"),
    LoRARow(Row(layout(2, **pp(2)))),
    LoRARow(Row(layout(2, **pp(2)), SHARDED, recompute=FULL), FIRST),
    LoRARow(Row(layout(2, **pp(2)), recompute=KEEP), LAST),
    LoRARow(Row(layout(2, **pp(2, 2)), OVERLAPPED, recompute=OFFLOAD)),
    LoRARow(Row(layout(2, **pp(2, 2)), OVERLAPPED), LAST),
    LoRARow(Row(layout(2, **pp(2, 2))), FIRST),
    LoRARow(zero(2, 2)),
    LoRARow(zero(2, 1, SHARDED), LAST),
    LoRARow(speeds(2, **pp(2)), LAST),
    LoRARow(speeds(2, **sp(2))),
    # four: pairs
    LoRARow(Row(layout(4, **usp(2, 2)), samples=MIXED)),
    LoRARow(Row(layout(4, **sp(2), **pp(2)), SHARDED, recompute=FULL)),
    LoRARow(Row(layout(4, tp_size=2, **ring(2)), samples=MIXED), ALL, "int8"),
    LoRARow(Row(layout(4, **pp(2, 2), **ulysses(2)), SHARDED, micro_batch_size=2), ALL, "int8"),
    LoRARow(Row(layout(4, **pp(4)), OVERLAPPED), LAST),
    LoRARow(zero(4, 2, SHARDED, MIXED)),
    LoRARow(zero(4, 2, **sp(2))),
    LoRARow(zero(4, 2, **pp(2, 2)), FIRST),
    LoRARow(images(4, **sp(2), **pp(2, 2)), IMAGES),
    # side blocks, which have adapters as blocks do, and a reference image in front of the video
    LoRARow(Row(layout(1), model_type="vace", recompute=OFFLOAD)),
    LoRARow(Row(layout(2, **sp(2)), model_type="vace"), ALL, "int8"),
    LoRARow(Row(layout(2, tp_size=2), model_type="vace")),
    LoRARow(Row(layout(2, **pp(2)), samples=MIXED, model_type="vace", recompute=FULL)),
    LoRARow(Row(layout(4, **usp(2, 2)), samples=MIXED, model_type="vace")),
    LoRARow(Row(layout(4, **pp(2, 2), **sp(2)), SHARDED, model_type="vace", recompute=KEEP)),
    LoRARow(Row(layout(2, **ulysses(2)), samples=MIXED, model_type="fun_control_ref")),
    LoRARow(Row(layout(2, **pp(2)), model_type="fun_control_ref"), IMAGES),
    LoRARow(Row(layout(4, **sp(2), **ring(2)), model_type="fun_control_ref", recompute=FULL), IMAGES),
    # samples that share a sequence
    LoRARow(Row(layout(1), samples=ANY, packs=((3, 1),), recompute=OFFLOAD)),
    LoRARow(Row(layout(2, **sp(2)), samples=ANY, packs=((4,),)), ALL, "int8"),
    LoRARow(Row(layout(4, **usp(2, 2)), samples=ANY, packs=((3, 1),))),
    LoRARow(Row(layout(4, **pp(2, 2), **ring(2)), SHARDED, samples=ANY, packs=((3, 1),), recompute=OFFLOAD), FIRST),
    # eight: everything together
    LoRARow(Row(layout(8, **sp(2), **ulysses(2), **pp(2)), OVERLAPPED, recompute=KEEP)),
    LoRARow(Row(layout(8, **usp(2, 2), **pp(2, 2)), OVERLAPPED, samples=MIXED), LAST),
    LoRARow(zero(8, 2, SHARDED, MIXED, **sp(2), **pp(2))),
]  # fmt: skip


EVERY_DAY = [
    *(row for row in ROWS if row.row.layout.world_size == 1 and not row.row.compiled),
    LoRARow(Row(layout(2, **ulysses(2)))),
    LoRARow(Row(layout(2, **sp(2)), recompute=FULL), ALL, "fp8"),
    LoRARow(Row(layout(2, **pp(2)), SHARDED, recompute=FULL), FIRST),
    LoRARow(Row(layout(2, **pp(2, 2)), OVERLAPPED, recompute=OFFLOAD)),
    LoRARow(zero(2, 1, SHARDED), LAST),
    LoRARow(speeds(2, **pp(2)), LAST),
    LoRARow(Row(layout(2, **sp(2)), model_type="vace"), ALL, "int8"),
]
"""The others are nightly."""


def rows_of(world_size: int, every_day: bool) -> list[LoRARow]:
    return [row for row in ROWS if row.row.layout.world_size == world_size and (row in EVERY_DAY) == every_day]


def work(world_size: int, every_day: bool) -> dict[str, RelativeErrors]:
    backend = select("cpu")
    with Job(process_place(), backend.collective, backend.device, 2):
        return run_rows(rows_of(world_size, every_day), backend)


@pytest.fixture(scope="module")
def results() -> dict[tuple[int, bool], dict[str, RelativeErrors]]:
    return {}


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(
            row,
            id=f"{row.row.layout.world_size}-{row.id}",
            marks=[] if row in EVERY_DAY else [pytest.mark.nightly],
        )
        for row in ROWS
    ],
)
def test_equals_one_process(row: LoRARow, results: dict[tuple[int, bool], dict[str, RelativeErrors]]) -> None:
    world, every_day = row.row.layout.world_size, row in EVERY_DAY
    if (world, every_day) not in results:
        results[world, every_day] = run_ranks(world, work, world, every_day, timeout_s=400)[0]
    assert over_limits(row.row, results[world, every_day][row.id]) == {}


@pytest.mark.parametrize(
    ("words", "base_dtype"),
    [(ALL, None), (FIRST, None), (LAST, None), (ALL, "int8"), (ALL, "fp8")],
    ids=["all", "first", "last", "all-int8", "all-fp8"],
)
def test_one_process_equals_peft_on_diffusers(words: tuple[str, ...], base_dtype: LowBit | None) -> None:
    errors = against_peft(LoRARow(Row(layout(1)), words, base_dtype))
    assert errors.loss <= 2e-6
    assert errors.gradient <= 1e-4, errors.worst_gradient
    assert errors.norm <= 1e-5
    assert errors.weight <= 1e-5, errors.worst_weight
