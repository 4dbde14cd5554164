"""A dry run of one rank tells what real processes count and measure."""

import gc
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile, record_function
from traffic_rows import SETTINGS, Row, batches, of, row, with_images

from mm.activation.host_pool import StepShape, make_offloader
from mm.activation.recompute import block_runner
from mm.config.diffusion import DiffusionConfig
from mm.config.place import process_place
from mm.config.recompute import Recompute
from mm.device.backend import select
from mm.diffusion.flow import FlowMatching
from mm.doctor import dry_run
from mm.doctor.traffic import CountTraffic, Traffic, axes_of, totals
from mm.optim.make import make_optimizer
from mm.parallel.apply import DataParallelOptions, apply
from mm.parallel.mesh import Mesh, build_mesh
from mm.supervise.job import Job
from mm.train.step import train_step
from mm.wan.initial import initial_value

KEEP = Recompute(full_layers=0, keep_layers=None)
OVERLAPPED = DataParallelOptions(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)


def deep(row: Row, dtype: torch.dtype = torch.float32) -> Row:
    """More micro-batches than a dry run runs, and blocks enough to outweigh what gloo's threads let go of late."""
    num_layers = max(4 if row.zero else 2, row.layout.pp_size * row.layout.vp_size)
    return replace(row.with_layers(num_layers), micro_batches=3 * row.layout.pp_size, dtype=dtype)


ROWS = [
    deep(row(4, cp_size=4, ulysses_size=2), torch.bfloat16),
    deep(row(4, tp_size=2, sequence_parallel=True, cp_size=2, ulysses_size=2)),
    deep(row(4, tp_size=2, pp_size=2)),
    deep(row(4, pp_size=4)),
    deep(row(4, pp_size=2, vp_size=2, distopt=True)),
    deep(replace(row(4), options=OVERLAPPED), torch.bfloat16),
    deep(row(4, zero=2)),
    deep(row(4, zero=2, cp_size=2, pp_size=2, distopt=True)),
    with_images(deep(row(4, tp_size=2, pp_size=2))),
    replace(deep(row(4, cp_size=4, ulysses_size=2), torch.bfloat16), recompute=KEEP),
    replace(deep(row(4, pp_size=2, vp_size=2, distopt=True)), recompute=replace(KEEP, kept="q,k,v,O", offload=True)),
    replace(deep(row(4, tp_size=2, sequence_parallel=True, pp_size=2)), packed=2, micro_batches=4),
    replace(deep(row(4, cp_size=2, zero=2), torch.bfloat16), packed=2),
    replace(deep(row(4, cp_size=2, pp_size=2)), packed=2, recompute=replace(KEEP, offload=True)),
    of(deep(row(4, tp_size=2, sequence_parallel=True, pp_size=2)), "vace"),
    replace(of(deep(row(4, pp_size=2, vp_size=2, distopt=True)), "vace"), recompute=replace(KEEP, offload=True)),
    of(deep(row(4, zero=2), torch.bfloat16), "vace", side_every=2),
    of(deep(row(4, cp_size=4, ulysses_size=2), torch.bfloat16), "fun_control_ref"),
    of(deep(row(4, pp_size=2, zero=2, cp_size=2)), "fun_control_ref"),
    # Blocks enough to outweigh the workspace of the CPU's convolutions, a copy of a weight, which a device's need not.
    of(deep(row(4, tp_size=2, pp_size=2)).with_layers(6), "fun_camera"),
    replace(of(deep(row(4, cp_size=4)).with_layers(6), "fun_camera"), recompute=Recompute()),
]
SHORT = [ROWS[1], ROWS[14]]
"""With every axis and side blocks between them; the others are nightly."""
RANKS = [
    pytest.param(row, rank, id=f"{row.id}-rank {rank}", marks=[] if row in SHORT else [pytest.mark.nightly])
    for row in ROWS
    for rank in ((0, 3) if row.layout.pp_size > 1 else (3,))
]


def step_for_real(row: Row) -> tuple[Traffic, int]:
    """What a rank sends in a step, and the most bytes it held in one, as torch's profiler saw its allocator."""
    gc.collect()  # what the row before left must not be released while this one is measured
    with (
        Job(process_place(), "gloo", torch.device("cpu"), 2),
        build_mesh(row.layout, 2, "cpu") as mesh,
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        sent, kept = steps(row, mesh)
    return sent, most_allocated(profiler.profiler.kineto_results.experimental_event_tree(), kept)


def steps(row: Row, mesh: Mesh) -> tuple[Traffic, dict[str, set[int]]]:
    """The traffic of the last step, and by step the addresses of what was kept from the one before."""
    flow = FlowMatching(DiffusionConfig())
    with CountTraffic(axes_of(mesh)) as traffic:
        packed = row.packed or 1
        places = mesh.tokens.places([row.tokens] * packed) * row.layout.token_parts
        shape = StepShape(1, places, row.micro_batches, row.dtype)
        offloader = make_offloader(row.recompute, row.wan, mesh, select("cpu"), shape)
        parallel = apply(
            row.wan, mesh, select("cpu"), row.options, row.dtype,
            lambda name, shape: initial_value(name, shape, 1), zero=row.zero,
            run_blocks=block_runner(row.recompute, offloader),
        )  # fmt: skip
        optimizer = make_optimizer(parallel, SETTINGS)
        kept = {}
        for index in range(4):
            first = len(traffic.calls)
            kept[f"step {index}"] = tensors_alive()
            with record_function(f"step {index}"):
                train_step(parallel, optimizer, flow, batches(row), samples=row.micro_batches * packed, seed=0)
        return totals(traffic.calls[first:]), kept


def tensors_alive() -> set[int]:
    """The addresses of all storages on the host that Python reaches."""
    tensors = [value for value in gc.get_objects() if issubclass(type(value), torch.Tensor)]
    tensors += [value.grad for value in tensors if value.is_leaf and value.grad is not None]
    local = [value.to_local() if isinstance(value, DTensor) else value for value in tensors]
    return {value.untyped_storage().data_ptr() for value in local if value.device.type == "cpu"}


def most_allocated(roots: list[Any], kept: dict[str, set[int]]) -> int:
    """The peak of a step after the first, without what gloo allocates inside a collective and NCCL does not.

    gloo clones what it reduces and lays out flat what it gathers, in the calling thread below the collective's event
    and in threads of its own. These let go of messages late, at times that differ, and unseen by the profiler: what is
    not in `kept` at the begin of a step is gone by then, and of the steps the lowest peak counts.
    """
    changes, ranges = [], {}
    stack = [(root, False) for root in roots]
    main_thread = roots[0].start_tid
    while stack:
        event, in_collective = stack.pop()
        in_collective = in_collective or event.name.startswith("c10d::")
        if event.name.startswith("step "):
            ranges[event.name] = event.start_time_ns, event.end_time_ns
        if event.name == "[memory]":
            size = event.typed[1].alloc_size
            foreign = in_collective or event.start_tid != main_thread
            changes.append((event.start_time_ns, event.typed[1].ptr, size, foreign))
        stack += [(child, in_collective) for child in event.children]
    total, peaks = 0, Counter()
    held: dict[int, int] = {}
    begins = sorted((start, step) for step, (start, _) in ranges.items())
    for time, pointer, size, foreign in sorted(changes, key=lambda change: change[0]):
        while begins and begins[0][0] <= time:
            step = begins.pop(0)[1]
            held = {address: bytes_ for address, bytes_ in held.items() if address in kept[step]}
            total = sum(held.values())
        total -= held.pop(pointer, 0)  # also where memory is given out again whose release was not seen
        if size > 0 and not foreign:
            held[pointer] = size
            total += size
        for step, (start, end) in ranges.items():
            if start <= time <= end:
                peaks[step] = max(peaks[step], total)
    return min(peaks[step] for step in ("step 1", "step 2", "step 3"))


def steps_for_real(rows: list[Row]) -> list[tuple[Traffic, int]]:
    gc.freeze()  # a million objects of imported modules, which `gc.collect` and `gc.get_objects` need not visit
    return [step_for_real(row) for row in rows]


@cache
def measured(short: bool) -> dict[str, list[tuple[Traffic, int]]]:
    """What every rank counted and measured, by row; of the short rows or of the others."""
    rows = [row for row in ROWS if (row in SHORT) == short]
    ranks = run_ranks(4, steps_for_real, rows, timeout_s=300)
    return {row.id: [rank[index] for rank in ranks] for index, row in enumerate(rows)}


def predicted(row: Row, rank: int) -> dry_run.Report:
    job = dry_run.DryRunJob(
        row.wan,
        row.layout,
        row.options,
        row.zero,
        row.dtype,
        row.latent,
        1,
        row.micro_batches,
        row.recompute,
        packed=row.packed,
    )
    return dry_run.dry_run(job, rank)


@pytest.mark.parametrize(("row", "rank"), RANKS)
def test_dry_run_equals_the_real_one(row: Row, rank: int) -> None:
    """Bytes and calls exactly; memory within 10%. On the CPU the host pool of offload counts as well."""
    sent, most = measured(row in SHORT)[row.id][rank]
    report = predicted(row, rank)
    assert report.traffic == sent
    assert report.peak_bytes + report.host_bytes == pytest.approx(most, rel=0.1)
