"""`mm doctor parity FLAGS`: whether a run's layout computes what one device does, on the job's own processes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from tabulate import tabulate

from mm.cli.imports import large_imports
from mm.cli.run_file import run_file
from mm.config.diffusion import DiffusionConfig
from mm.config.flags import Flags, parse_flags
from mm.config.layout import Layout, layout_of
from mm.config.place import process_place
from mm.config.recompute import recompute_of
from mm.config.rules.training import check_training
from mm.config.run.file import load_run, of_kind
from mm.config.run.training import TrainingRun
from mm.dialects.mindspeed.reading import Reading
from mm.dialects.mindspeed.train_flags import TrainFlags
from mm.dialects.mindspeed.training import read_files, read_flags, translate
from mm.errors import DifferenceError

if TYPE_CHECKING:
    from mm.doctor.parity import Case, RelativeErrors


class ParityFlags(TrainFlags):
    """Train a small model for two steps on this job's layout and on one device, and compare. Takes mm train's flags.

    The model has the heads and blocks of --mm-model, so that it is cut in the same places; its widths, samples and text
    are small, its weights and samples random, and everything is fp32. `mm doctor parity run.yaml` takes a file's run.
    """


def main(argv: Sequence[str]) -> None:
    """Compare losses, every gradient, their norm and the weights; rank 0 prints a table.

    Raises:
        ConfigError: what `mm train` raises before it starts.
        DifferenceError: NUM-005 where the layout differs from one device by more than rounding.
    """
    where = process_place()
    sections = _read(argv).on(where.world_size)
    check_training(sections)
    layout = layout_of(sections)

    with large_imports():
        from mm.checkpoint.comm import Comm, ProcessGroupComm, SingleProcess
        from mm.device.backend import select
        from mm.doctor import parity
        from mm.parallel.mesh import build_mesh
        from mm.supervise.job import Job

    backend, minutes = (
        select(sections.training.device, where.local_rank, where.world_size),
        sections.supervision.timeout_minutes,
    )
    case = _case(sections, layout)
    with Job(where, backend.collective, backend.device, minutes), build_mesh(layout, minutes, backend.kind) as mesh:
        comm: Comm = SingleProcess() if where.world_size == 1 else ProcessGroupComm(device=backend.device)
        mine = parity.run_on_the_mesh(case, mesh, backend, parity.own_pieces)
        of_case = case.wan, case.sizes, case.samples, backend.device
        one_device = partial(
            parity.run_on_one_device, *of_case, text_lengths=case.text_lengths, objective=case.objective
        )
        whole = one_device()
        errors = parity.compare_pieces(mine, whole, comm)
    rounding = parity.compare_wholes(one_device(value_of=parity.nudged_value_of), whole)
    limits = parity.with_rounding(parity.limits(layout), rounding)
    if where.rank == 0:
        print(_table(sections, case, backend.name(), errors, limits))
    _require_equal(layout, errors, limits)


def _read(argv: Sequence[str]) -> TrainingRun:
    """The run that a command line, or a file on it, describes."""
    given = run_file(argv, Flags)
    if given is not None:
        file, words = given
        parse_flags(Flags, words, program=f"mm doctor parity {file}")
        return of_kind(load_run(file), TrainingRun)
    reading = Reading()
    flags = read_flags(ParityFlags, argv, "mm doctor parity", reading)
    return translate(flags, read_files(flags, reading))


def _case(sections: TrainingRun, layout: Layout) -> Case:
    """More tokens than ranks that share them, and not a multiple; samples of two sizes where the run takes them."""
    from mm.doctor.parity import Case, small_model
    from mm.train.run import data_parallel_options

    sharing = layout.cp_size * (layout.tp_size if layout.sequence_parallel else 1)
    width = 2 * (2 * sharing // 9 + 5)  # of 9 tokens a column
    sizes = [(3, 6, width), (1, 2, 14)]
    micro_batches = min(sections.micro_batches_of_step(layout.dp_size), 2 * layout.pp_size)
    packed = sections.data.pack_tokens is not None
    packs = (tuple(2 - number % 2 for number in range(micro_batches)),) * layout.dp_size if packed else ()
    one_size = sections.data.micro_batch_size > 1 or (layout.pp_size > 1 and not sections.parallel.variable_sizes)
    return Case(
        small_model(sections.wan),
        layout,
        data_parallel_options(sections),
        sections.parallel.layerzero,
        recompute_of(sections.memory),
        tuple(sizes[:1] if one_size and not packed else sizes),
        sections.data.micro_batch_size,
        micro_batches,
        packs,
        DiffusionConfig(motion_loss_ratio=sections.objective.motion_loss_ratio),
    )


def _rows(errors: RelativeErrors, limits: RelativeErrors) -> list[tuple[str, float, float, str]]:
    """Measure, found, limit, parameter."""
    return [
        ("loss", errors.loss, limits.loss, ""),
        ("gradients", errors.gradient, limits.gradient, errors.worst_gradient),
        ("gradient norm", errors.norm, limits.norm, ""),
        ("weights", errors.weight, limits.weight, errors.worst_weight),
    ]


def _table(sections: TrainingRun, case: Case, device: str, errors: RelativeErrors, limits: RelativeErrors) -> str:
    wan, layout = case.wan, case.layout
    sequence = " sequence, of two samples" if case.packs else ""
    left_out = {
        "adapters": sections.adapters is not None,
        sections.origins["training.trainable"].name: sections.training.trainable is not None,
        sections.origins["optimizer.abnormal_clip_start"].name: sections.optimizer.abnormal_clip_start is not None,
        sections.origins["memory.compile_blocks"].with_value(True): sections.memory.compile_blocks,
        sections.origins["model.precision"].with_value("bf16"): sections.model.precision == "bf16",
    }
    facts = [
        ("layout", f"{layout.name()} on {layout.world_size:,} processes, {device}"),
        ("model", f"{wan.task.name}, {wan.num_layers} blocks, {wan.num_heads} heads, {wan.hidden_size} wide, fp32"),
        ("run", f"2 steps of {case.samples} samples, {case.most_tokens} tokens the longest{sequence}"),
    ]
    if any(left_out.values()):
        facts.append(("left out", ", ".join(name for name, given in left_out.items() if given)))
    rows = [
        (measure, f"{found:.1e}", f"{limit:.1e}", parameter, "ok" if found <= limit else "no")
        for measure, found, limit, parameter in _rows(errors, limits)
    ]
    headers = ["against one device", "largest relative error", "limit", "of", ""]
    return f"{tabulate(facts, tablefmt='plain')}\n\n{tabulate(rows, headers=headers, disable_numparse=True)}"


def _require_equal(layout: Layout, errors: RelativeErrors, limits: RelativeErrors) -> None:
    over = [
        f"{measure} by {found:.1e}{f' ({parameter})' if parameter else ''}, limit {limit:.1e}"
        for measure, found, limit, parameter in _rows(errors, limits)
        if not found <= limit
    ]
    if over:
        raise DifferenceError(
            "NUM-005",
            f"The layout {layout.name()} differs from one device: {'; '.join(over)}.",
            "Do not train on it. Take axes away (TP, CP, PP, layer-zero, overlap) until it agrees, and report it.",
        )
