"""Checkpoints of a run in the MM format (`--ckpt-format torch`): weights and progress in MindSpeed-MM's files.

Each pipeline rank's file holds its parameters in the model's own dtypes, under MM names; how far the run has come is in
mm_record.json beside the first of them. Such a checkpoint has no optimizer: going on from it starts that anew at
rounded weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import mm
from mm.checkpoint import fault
from mm.checkpoint.comm import Comm, on_every_rank
from mm.checkpoint.files import sync_folder
from mm.checkpoint.formats.mindspeed import write_stage
from mm.checkpoint.formats.mindspeed_split import split_names
from mm.checkpoint.lock import Lock
from mm.checkpoint.manifest import FileRecord
from mm.checkpoint.record import WeightsRecord, write_record
from mm.checkpoint.safetensor_file import hash_file
from mm.checkpoint.transaction import require_visible, write_checkpoint
from mm.config.step import StepSettings
from mm.optim.optimizer import Optimizer
from mm.parallel.apply import ParallelModel
from mm.parallel.placement import whole_shapes
from mm.train.state import Progress
from mm.wan.names import native_to_mindspeed


def save_weights(
    root: Path,
    progress: Progress,
    parallel: ParallelModel,
    optimizer: Optimizer,
    comm: Comm,
    *,
    seed: int,
    steps: StepSettings,
    keep_latest: int | None,
    lock: Lock | None,
) -> Path:
    """Write the weights below `root` and commit them as every checkpoint is; every rank calls it.

    Args:
        root, comm, keep_latest, lock: as for `mm.checkpoint.store.save`.
        progress: how far the run has come.
        parallel: the model, without tensor parallelism and layer-zero. optimizer: its masters are rounded into it.
        seed: of the run. steps: what its steps mean.

    Raises:
        CheckpointError: CKPT-016 for a weight that is not finite, CKPT-032, and what `write_checkpoint` raises.
    """
    optimizer.masters_to_model()  # with --overlap-param-gather the next forward would have gathered them
    writes = parallel.mesh.dp_cp_rank == 0
    num_bytes = sum(p.numel() * p.element_size() for p in parallel.all_parameters().values()) if writes else 0

    def complete(folder: Path, reports: Sequence[Any]) -> None:
        files = {report["file"]: FileRecord.model_validate(report["record"]) for report in reports if report}
        require_visible(folder, files)
        versions = {"mm": mm.__version__, "torch": torch.__version__}
        record = WeightsRecord(
            step=progress.step,
            consumed_samples=progress.consumed_samples,
            skipped_steps=progress.skipped_steps,
            replaced_samples=progress.replaced_samples,
            trained_samples=progress.recorded().get("trained_samples"),
            seed=seed,
            steps=steps.model_dump(mode="json"),
            versions=versions,
            files=files,
            wan_config=parallel.wan,
        )
        write_record(folder, record)

    return write_checkpoint(
        root,
        progress.step,
        sum(on_every_rank(comm, lambda: num_bytes)),
        lambda folder: _write(folder, parallel, _state(parallel, progress.step)) if writes else None,
        complete,
        comm,
        keep_latest=keep_latest,
        lock=lock,
    )


def _state(parallel: ParallelModel, step: int) -> dict[str, Any]:
    """The content of this pipeline rank's file."""
    layout, parameters = parallel.mesh.layout, parallel.all_parameters()
    native = {native_to_mindspeed(name): name for name in whole_shapes(parallel.wan)}
    chunks = split_names(native, layout.stages)
    state: dict[str, Any] = {}
    for index in range(layout.vp_size):
        local = chunks[index * layout.pp_size + parallel.mesh.pp_rank]
        state["model" if layout.vp_size == 1 else f"model{index}"] = {
            # a copy: what a parameter is a view of would be saved whole
            name: parameters[native[whole]].detach().cpu().clone()
            for name, whole in local.items()
        }
    return {**state, "iteration": step}


def _write(folder: Path, parallel: ParallelModel, state: dict[str, Any]) -> dict[str, Any]:
    file = write_stage(folder, parallel.mesh.pp_rank, parallel.mesh.layout.pp_size, state)
    sync_folder(file.parent)
    sync_folder(folder)
    fault.point("save.shard_durable")
    record = FileRecord(num_bytes=file.stat().st_size, sha256=hash_file(file))
    return {"file": str(file.relative_to(folder)), "record": record.model_dump()}
