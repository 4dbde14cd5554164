"""The generation command: opens the weights, puts the transformer on the mesh, renders every row, writes the clips."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path

from tqdm import tqdm

from mm.checkpoint.mismatch import Expected
from mm.config.run.generation import GenerationRun
from mm.errors import DataError, raise_all
from mm.generate.describe import describe_row, describe_run, fingerprint_of
from mm.generate.experts import TwoExperts, boundary_of, require_experts_in_place
from mm.generate.finished import finished_clips, require_same_weights
from mm.generate.held import held_velocity, parameter_bytes
from mm.generate.pipeline import Velocity
from mm.generate.render import Processes, Renderer, batches_of_replica, usable_rows
from mm.generate.rows import GenerationRow, row_kind
from mm.generate.video import clip_path, prepare_folder, write_clip
from mm.generate.weights import GenerationWeights, open_generation_weights
from mm.residency.budget import Room
from mm.wan.encoders import DTYPES

log = logging.getLogger(__name__)

Weights = tuple[GenerationWeights, GenerationWeights | None]
"""Of the transformer, or of both experts, the one for much noise first."""


def generate_clips(
    generation: GenerationRun,
    processes: Processes,
) -> list[Path]:
    """Generate one clip for each row and write it as soon as it is done.

    Clips that an earlier start of the same command has finished are kept.

    Args:
        generation: accepted by `mm.config.rules.generation.check_generation`.
        processes: where it runs; every rank of the job calls this.

    Returns:
        The clips' paths that this rank wrote, in the order of the rows.

    Raises:
        ConfigError: CFG-065 and CFG-066 when the parts of the model do not fit each other or the configuration; CFG-294
            and CFG-295 for two experts without a boundary, or in each other's place; CFG-373 and CFG-374 for limits of
            memory that cannot be kept; CFG-324 and CFG-325 for SageAttention where it is not.
        DataError: DATA-001 to DATA-007, DATA-085 to DATA-087, DATA-096 to DATA-099, DATA-110, CFG-250 to CFG-257 and
            CFG-281 for rows that could not be used, after all others are done; DATA-050 when a clip exists that another
            command has made, DATA-051 to DATA-056 and DATA-084 for prompts and clips, DATA-020 to DATA-045 and DATA-090
            to DATA-093 for weights that cannot be used.
        CheckpointError: CKPT-010 to CKPT-021 for weights that cannot be used.
    """
    rows, bad = usable_rows(generation, processes)
    folder = Path(generation.output.path)
    weights = _open_weights(generation, processes)
    prepare_folder(folder)  # after all that may refuse the run
    finished = _finished_by_any(folder, rows, generation, weights, processes)
    together = generation.zero is not None
    alike = partial(row_kind, generation.wan.task)
    size = generation.batch.size
    batches = batches_of_replica(rows, processes, size, together=together, finished=finished, alike=alike)
    paths = _render(generation, processes, weights, Renderer(generation, processes, batches), finished)
    processes.comm.barrier()
    log.info("%d clips are in %s", len(rows), folder)
    raise_all(DataError, [row.problem for row in bad])
    return paths


def _finished_by_any(
    folder: Path,
    rows: Sequence[GenerationRow],
    generation: GenerationRun,
    weights: Weights,
    processes: Processes,
) -> dict[int, str]:
    """`finished_clips` of all ranks together, the same on each; none where clips are to be made anew."""
    finished: dict[int, str] = {}
    if not generation.output.overwrite:
        about = cache(lambda: describe_run(generation, processes.backend.kind, *weights))  # reads the encoders' folders
        finished = finished_clips(folder, rows, lambda row: {**describe_row(row, generation), **about()})
    # nobody writes before everybody has looked; a folder on one node alone is seen by its ranks only
    for part in processes.comm.all_gather_object([list(clip) for clip in finished.items()]):
        finished |= dict(part)
    if finished:
        log.info(
            "%d of %d clips are in %s already, of this very command; they are kept", len(finished), len(rows), folder
        )
    return finished


def _render(
    generation: GenerationRun,
    processes: Processes,
    weights: Weights,
    renderer: Renderer,
    finished: Mapping[int, str],
) -> list[Path]:
    """Read the model, render the clips that are missing, and write each; returns the paths that this rank wrote.

    Raises:
        DataError: DATA-050 for finished clips of other weights than these.
    """
    backend, folder = processes.backend, Path(generation.output.path)
    video = renderer.load_video_encoder()
    velocity = _velocity(generation, processes, weights, parameter_bytes(video.vae))
    if finished:
        read = processes.comm.all_gather_object(fingerprint_of(*weights) if processes.writes else None)
        require_same_weights(folder, finished, [fingerprint for fingerprint in read if fingerprint is not None])
    description = describe_run(generation, backend.kind, *weights)
    paths = []
    shown = generation.logging.progress_bar and processes.comm.rank == 0
    with tqdm(total=renderer.num_steps, desc="generating", unit="step", disable=not shown or None) as bar:
        for row, frames in renderer.clips(velocity, video, bar.update):
            if row.index in finished:
                continue
            path = clip_path(folder, row.index)
            write_clip(path, frames, generation.output.fps, {**describe_row(row, generation), **description})
            paths.append(path)
    return paths


def _open_weights(generation: GenerationRun, processes: Processes) -> Weights:
    expected = Expected(generation.wan, lambda name: generation.origins[f"model.shape.{name}"], "CFG-065")
    model, dtype = generation.model, DTYPES[generation.model.precision]
    # only whoever writes clips tells what made them
    fp8 = generation.residency.fp8
    how = expected, dtype, processes.writes, processes.comm
    weights = open_generation_weights(model.weights or "", model.adapters, *how, fp8=fp8)
    if model.low_noise is None:
        return weights, None
    low = open_generation_weights(model.low_noise.weights, model.low_noise.adapters, *how, fp8=fp8)
    require_experts_in_place(weights.places, low.places, boundary_of(model.low_noise, generation.origins))
    return weights, low


def _velocity(generation: GenerationRun, processes: Processes, weights: Weights, beside: int) -> Velocity:
    """The transformer on the mesh, or both experts, which share it; `beside` bytes of the device are taken."""
    low_noise = generation.model.low_noise
    found = [weight for weight in weights if weight is not None]
    room = Room.now(processes.of_node, beside, len(found))  # before the first of them takes its part
    first, *low = [held_velocity(generation, processes, weight, room) for weight in found]
    if low_noise is None:
        return first
    return TwoExperts(first, low[0], boundary_of(low_noise, generation.origins))
