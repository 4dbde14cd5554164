"""What the pipeline's schedule costs, and what a step never does: recorded on four gloo processes.

The bubble and the micro-batches in flight equal their formulas; nothing waits for the whole device; stages exchange
tensors of one shape and nothing else.
"""

from collections import Counter
from fractions import Fraction
from typing import Any

import parity
import pytest
import recorded_schedule as recorded
import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from parity import MIXED, ODD, Row
from ranks import run_ranks
from recorded_schedule import Case, Event, Orders

from mm.config.diffusion import DiffusionConfig
from mm.config.layerzero import ZeroConfig
from mm.config.layout import Layout, even_stages
from mm.config.place import process_place
from mm.device import megatron_on_cpu
from mm.device.backend import Backend, select
from mm.diffusion.flow import FlowMatching
from mm.doctor.parity import SEED, SETTINGS, value_of
from mm.optim.make import make_optimizer
from mm.parallel import schedule
from mm.parallel.apply import DataParallelOptions, apply
from mm.parallel.mesh import build_mesh
from mm.supervise.job import Job
from mm.train.step import train_step

PROCESSES = 4

EVEN_CASES = [
    *(Case(even_stages(4, 2), m) for m in (4, 8)),
    *(Case(even_stages(4, 4), m) for m in (2, 4, 8)),
    *(Case(even_stages(4, 2, 2), m) for m in (2, 4, 8)),
    *(Case(even_stages(8, 4, 2), m) for m in (4, 8)),
]
SLOWEST_LAST = [Case(((3, 5),), 8), Case(((1, 2, 2, 3),), 8)]
SLOWEST_EARLIER = [Case(((5, 3),), 8), Case(((1, 3, 3, 1),), 8)]
UNEVEN_CHUNKS = [Case(((1, 2), (3, 2)), 4)]
CASES = [*EVEN_CASES, *SLOWEST_LAST, *SLOWEST_EARLIER, *UNEVEN_CHUNKS]


def named(case: Case) -> str:
    return case.name


@pytest.fixture(scope="module")
def orders() -> dict[str, Orders]:
    return recorded.record(PROCESSES, CASES)


@pytest.mark.parametrize("case", CASES, ids=named)
def test_every_micro_batch_passes_every_stage_once_there_and_once_back(case: Case, orders: dict[str, Orders]) -> None:
    expected = [
        {
            Event(kind, micro_batch, chunk * case.pp_size + rank)
            for kind in ("F", "B")
            for micro_batch in range(case.num_microbatches)
            for chunk in range(case.vp_size)
        }
        for rank in range(case.pp_size)
    ]
    assert [set(order) for order in orders[case.name]] == expected
    assert [len(order) for order in orders[case.name]] == [len(events) for events in expected]


@pytest.mark.parametrize("case", EVEN_CASES, ids=named)
def test_bubble_of_even_stages(case: Case, orders: dict[str, Orders]) -> None:
    p, v, m = case.pp_size, case.vp_size, case.num_microbatches
    assert recorded.bubble(case, orders[case.name]) == Fraction(p - 1, v * m + p - 1)


@pytest.mark.parametrize("case", SLOWEST_LAST, ids=named)
def test_time_of_uneven_stages_with_the_slowest_last(case: Case, orders: dict[str, Orders]) -> None:
    assert recorded.replay(orders[case.name], case.blocks) == recorded.slowest_stage_time(case)


@pytest.mark.parametrize("case", SLOWEST_EARLIER, ids=named)
def test_time_of_uneven_stages_with_the_slowest_earlier(case: Case, orders: dict[str, Orders]) -> None:
    """No less than the slowest stage's work and the way to it and back, no more than with the slowest one last."""
    slowest = case.blocks.index(max(case.blocks))
    least = 3 * (sum(case.blocks[:slowest]) + case.num_microbatches * case.blocks[slowest])
    assert least <= recorded.replay(orders[case.name], case.blocks) < recorded.slowest_stage_time(case)


@pytest.mark.parametrize("case", CASES, ids=named)
def test_micro_batches_in_flight(case: Case, orders: dict[str, Orders]) -> None:
    p, v, m = case.pp_size, case.vp_size, case.num_microbatches
    warm_up = [(p - rank - 1) if v == 1 else 2 * (p - rank - 1) + (v - 1) * p for rank in range(p)]
    assert [recorded.peak_in_flight(order) for order in orders[case.name]] == [min(w + 1, v * m) for w in warm_up]


def test_replay_names_a_deadlock() -> None:
    with pytest.raises(ValueError, match="wait for each other"):
        recorded.replay([[Event("F", 0, 0), Event("B", 0, 0)], [Event("B", 0, 1), Event("F", 0, 1)]], [1, 1])


# The second start: what a whole step does besides computing.

SHARDED = DataParallelOptions(use_distributed_optimizer=True)
OVERLAPPED = DataParallelOptions(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
STEP_ROWS = [
    Row(Layout(4, pp_size=4, stages=even_stages(4, 4))),
    Row(Layout(4, pp_size=2, vp_size=2, stages=even_stages(4, 2, 2)), OVERLAPPED),
    Row(Layout(4, cp_size=4)),
    Row(Layout(4, cp_size=4, window_size=2, send_recv_overlap=True)),
    Row(Layout(4, cp_size=4, ulysses_size=4)),
    Row(Layout(4, cp_size=4, ulysses_size=2)),
    Row(Layout(4, tp_size=2, sequence_parallel=True), SHARDED),
    Row(Layout(4, tp_size=4)),
    Row(Layout(4, zero3_size=2), SHARDED, ZeroConfig(zero3_size=2)),
    Row(Layout(4), OVERLAPPED),
]
MIXED_CASES = [
    Case(even_stages(4, 2), 8),
    Case(even_stages(4, 4), 8),
    Case(even_stages(4, 2, 2), 8),
    Case(even_stages(8, 4, 2), 8),
]
BATCHED = "pp4 with batched messages"


def observe_steps() -> dict[str, Any]:
    """Device-wide waits of every row's step, and the messages between the stages of every mixed case."""
    backend = select("cpu")
    with Job(process_place(), backend.collective, backend.device, 2):
        waits = {row.id: count_waits(row, backend) for row in STEP_ROWS}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(schedule, "PipelineMessages", lambda forward, _, config, __: P2PCommunicator(forward, config))
            waits[BATCHED] = count_waits(STEP_ROWS[0], backend, batch_p2p_comm=True)
        messages = {case.name: count_messages(case, backend) for case in MIXED_CASES}
    return {"waits": waits, "messages": messages}


def count_waits(row: Row, backend: Backend, **changed: Any) -> int:
    """Calls that would wait for all work on the device, in two optimizer steps."""
    calls: list[str] = []
    replacements = megatron_on_cpu._replacements

    def counting() -> list[tuple[Any, str, Any]]:
        others = [item for item in replacements() if item[1] != "synchronize"]
        return [*others, (torch.cuda, "synchronize", lambda *args: calls.append("megatron-core's"))]

    with build_mesh(row.layout, 2, "cpu") as mesh, pytest.MonkeyPatch.context() as patch:
        parallel = apply(row.wan, mesh, backend, row.options, torch.float32, value_of, zero=row.zero)
        optimizer = make_optimizer(parallel, SETTINGS)
        for name, value in changed.items():
            setattr(parallel.config, name, value)
        patch.setattr(megatron_on_cpu, "_replacements", counting)
        patch.setattr(Backend, "synchronize", lambda self: calls.append("ours"))
        patch.setattr(torch.cpu, "synchronize", lambda *args: calls.append("torch's"))  # what FSDP2 would call
        patch.setattr(torch.accelerator, "synchronize", lambda *args: calls.append("torch's"))
        flow = FlowMatching(DiffusionConfig())
        for step in range(2):
            batches = parity.micro_batches(row, parity.global_batch(ODD, step), mesh)
            train_step(parallel, optimizer, flow, batches, samples=parity.GLOBAL_BATCH, seed=SEED)
    return len(calls)


def count_messages(case: Case, backend: Backend) -> Counter[tuple[str, tuple[int, ...]]]:
    """The point-to-point messages that this rank sends in a step of micro-batches of two sizes: dtype and shape."""
    sent: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def counting(send: Any) -> Any:
        def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            sent[str(tensor.dtype), tuple(tensor.shape)] += 1
            return send(tensor, *args, **kwargs)

        return call

    with build_mesh(case.layout(PROCESSES), 2, "cpu") as mesh, pytest.MonkeyPatch.context() as patch:
        parallel = recorded.new_model(mesh, backend)
        for name in ("isend", "send"):
            patch.setattr(torch.distributed, name, counting(getattr(torch.distributed, name)))
        recorded.one_step(parallel, MIXED, case.num_microbatches)
    return sent


@pytest.fixture(scope="module")
def observed() -> list[dict[str, Any]]:
    return run_ranks(PROCESSES, observe_steps, timeout_s=240)


@pytest.mark.nightly
@pytest.mark.parametrize("row", STEP_ROWS, ids=lambda row: row.id)
def test_no_step_waits_for_the_whole_device(row: Row, observed: list[dict[str, Any]]) -> None:
    assert [rank["waits"][row.id] for rank in observed] == [0] * PROCESSES


@pytest.mark.nightly
def test_waiting_for_the_whole_device_would_be_seen(observed: list[dict[str, Any]]) -> None:
    """megatron-core's batched messages, which are not used here, wait for the device after each."""
    assert all(rank["waits"][BATCHED] > 0 for rank in observed)


@pytest.mark.nightly
@pytest.mark.parametrize("case", MIXED_CASES, ids=named)
def test_stages_exchange_one_shape_and_no_shapes(case: Case, observed: list[dict[str, Any]]) -> None:
    """Micro-batches of 45 and 7 tokens with 8 of text and 7 rows of time: all cross in 60 rows of the model's width.

    There and back over each of the p v - 1 boundaries between virtual stages, for each of m micro-batches.
    """
    total = sum((rank["messages"][case.name] for rank in observed), Counter())
    replicas = PROCESSES // case.pp_size
    crossings = 2 * (len(case.blocks) - 1) * case.num_microbatches * replicas
    assert total == {("torch.float32", (45 + 8 + 7, 1, parity.WAN.hidden_size)): crossings}
