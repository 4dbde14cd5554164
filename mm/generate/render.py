"""Clips from the rows of a configuration with any transformer on the mesh: what generation and validation share.

How a clip is made is said in `mm.generate.sampling`; here are files, batches and ranks. Rows are spread over the
data-parallel replicas. The ranks of a replica work on the same rows: each encodes what it needs, all run the
transformer together, and the first of them decodes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.checkpoint.comm import Comm
from mm.checkpoint.encoder_paths import image_encoder, text_encoder, video_encoder
from mm.config.run.generation import GenerationRun
from mm.device.backend import Backend
from mm.errors import DataError, MMError, Problem, raise_all
from mm.generate.experts import boundary_of
from mm.generate.fit import require_image_encoder_fits, require_text_fits, require_vae_fits
from mm.generate.inputs import load_given
from mm.generate.pipeline import Velocity
from mm.generate.rows import BadRow, GenerationRow, read_rows
from mm.generate.sampling import (
    ClipConditions,
    ClipPlan,
    SamplerSettings,
    SamplingOptions,
    decode,
    encode_prompts,
    sample,
)
from mm.generate.sources import EARLY_SOURCES, EarlyFeatures
from mm.parallel.agree import agreement
from mm.parallel.mesh import Mesh
from mm.wan.encoders import VideoEncoder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Processes:
    """Processes of a generation: this rank's place and device, the ranks for messages, and those on its node."""

    mesh: Mesh
    backend: Backend
    comm: Comm
    of_node: int = 1

    @property
    def writes(self) -> bool:
        """True on the rank that decodes and writes the clips of its replica."""
        return self.mesh.tp_rank == 0 and self.mesh.cp_rank == 0


def usable_rows(run: GenerationRun, processes: Processes) -> tuple[list[GenerationRow], list[BadRow]]:
    """All rows that clips can be made of, the same on every rank, and those that cannot, which are logged.

    Raises:
        DataError: what `mm.generate.rows.read_rows` raises; those that cannot, when no other is left.
    """
    rows, bad = read_rows(run)
    mesh = processes.mesh
    found = list(map(_report, bad))
    for row in rows[mesh.dp_rank :: mesh.layout.dp_size]:
        try:
            load_given(run, row)  # so that hours of work do not end at a damaged file
        except MMError as error:
            found += [[row.index, p.id, f"Row {row.index}: {p.message}", p.remedy] for p in error.problems]
    together = {(report[0], report[1]): report for part in processes.comm.all_gather_object(found) for report in part}
    bad = [BadRow(index, Problem(*texts)) for index, *texts in (together[key] for key in sorted(together))]
    for unusable_row in bad:
        log.warning("%s", unusable_row.problem)
    unusable = {row.index for row in bad}
    good = [row for row in rows if row.index not in unusable]
    if not good:
        raise_all(DataError, [row.problem for row in bad])
    return good, bad


def _report(row: BadRow) -> list[Any]:
    return [row.index, row.problem.id, row.problem.message, row.problem.remedy]


@dataclass(frozen=True)
class Batch:
    """Rows that go through the transformer together; `counts` unless they only keep other replicas company."""

    rows: list[GenerationRow]
    counts: bool


def batches_of_replica(
    rows: Sequence[GenerationRow],
    processes: Processes,
    size: int,
    together: bool,
    finished: Collection[int] = (),
    alike: Callable[[GenerationRow], object] = lambda row: None,
) -> list[Batch]:
    """This replica's rows in batches of `size`.

    Args:
        rows: of all replicas.
        processes: whose.
        size: of a batch, at most.
        together: every replica has as many batches, because weights are gathered over all of them.
        finished: indices of rows that need no clip. A batch of such rows alone is left out; the others stay as they
            are, so that a clip has the neighbours that it would have had.
        alike: what rows of a batch have in common.
    """
    layout, dp_rank = processes.mesh.layout, processes.mesh.dp_rank

    def batches(replica: int) -> list[Batch]:
        mine = list(rows[replica :: layout.dp_size])
        runs = [list(run) for _, run in groupby(mine, alike)]
        cut = [run[start : start + size] for run in runs for start in range(0, len(run), size)]
        return [Batch(batch, True) for batch in cut if any(row.index not in finished for row in batch)]

    found = batches(dp_rank)
    if together:
        most = max(len(batches(replica)) for replica in range(layout.dp_size))
        found += [Batch(list(rows[:1]), False)] * (most - len(found))
    return found


class Renderer:
    """One rank's part of rendering some rows; making it encodes their texts and images."""

    def __init__(
        self,
        run: GenerationRun,
        processes: Processes,
        batches: Sequence[Batch],
        stored: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Encode what does not change, one encoder on the device after the other.

        Args:
            run: what to render. processes: where. batches: this replica's, from `batches_of_replica`.
            stored: features [L, text_dim] of texts that need not be encoded.

        Raises:
            ConfigError: CFG-066 for a text or image encoder of another model.
            DataError: DATA-040 to DATA-043 for encoders that cannot be loaded.
        """
        self._run, self._processes, self._batches = run, processes, batches
        self._plan = clip_plan(run, processes.backend.device)
        rows = list({row.index: row for batch in batches for row in batch.rows}.values())
        self._text, self._negative = _encode_text(run, rows, processes.backend.device, stored or {})
        self._early = _encode_early(run, rows, processes.backend.device)

    @property
    def num_steps(self) -> int:
        """Steps of all this replica's rows together."""
        return self._plan.settings.num_evaluated * sum(len(batch.rows) for batch in self._batches if batch.counts)

    def load_video_encoder(self) -> VideoEncoder:
        """The VAE, on the device.

        Raises:
            ConfigError: CFG-066 for one of another model.
            CheckpointError, DataError: what `mm.checkpoint.encoder_paths.video_encoder` raises.
        """
        vae = self._run.encoders.vae
        place = Path(vae.from_pretrained), vae.precision, self._processes.backend.device
        video = video_encoder(*place, vae.tiles_of_clips(), vae.tile_blend or "neighbours")
        require_vae_fits(vae.from_pretrained, video, self._plan.wan)
        return video

    def clips(
        self, model: Velocity, video: VideoEncoder, on_step: Callable[[int], object]
    ) -> Iterator[tuple[GenerationRow, Tensor]]:
        """Every row of this replica with its clip, uint8 [F, H, W, 3], on the rank that writes; nothing on the others.

        Every rank of the job runs through it to its end.

        Args:
            model: the transformer. video: from `load_video_encoder`.
            on_step: called after every step with the number of rows that took it.

        Raises:
            DataError: DATA-055 for a VAE of another stride, DATA-056 when the transformer's output is not finite.
        """
        vae = self._run.encoders.vae
        conditions = VideoEncoder(video.vae, vae.tiles_of_conditions(), vae.tile_blend or "neighbours")
        agree = agreement(self._processes.mesh, self._processes.backend.device)
        for batch in self._batches:
            count = len(batch.rows) if batch.counts else 0
            clips = [self._conditions(row) for row in batch.rows]
            done = partial(_told, on_step, count)
            given = model, video, self._plan, clips, self._negative
            latents = sample(*given, conditions=conditions, agree=agree, on_step=done)
            if batch.counts and self._processes.writes:
                frames = decode(video, latents, self._plan.size, vae.from_pretrained)
                yield from zip(batch.rows, frames, strict=True)

    def _conditions(self, row: GenerationRow) -> ClipConditions:
        """Conditions of a row's clip; its files are read again, so that they need not stay in memory."""
        given = load_given(self._run, row)
        return ClipConditions(row.index, self._text[row.index], self._early[row.index], given)


def clip_plan(run: GenerationRun, device: torch.device) -> ClipPlan:
    """Plan that all clips of a generation share."""
    sampling, low = run.sampling, run.model.low_noise
    settings = SamplerSettings(
        solver=sampling.solver,
        num_steps=sampling.steps,
        shift=sampling.shift,
        guidance_scale=sampling.guidance_scale,
        batched_guidance=sampling.batched_guidance,
        solver_order=sampling.solver_order or 2,
        solver_type=sampling.solver_type or "bh2",
        strength=run.inputs.strength or 1.0,
        options=SamplingOptions(sampling.tea_cache, sampling.windows, run.inputs.strength_steps or "last"),
        boundary=None if low is None else boundary_of(low, run.origins),
        low_guidance_scale=None if low is None else low.guidance_scale,
    )
    return ClipPlan(run.wan, device, run.row_task.frames, run.output.size, run.generation.seed, settings)


def _encode_text(
    run: GenerationRun, rows: Sequence[GenerationRow], device: torch.device, stored: Mapping[str, Tensor]
) -> tuple[dict[int, Tensor], Tensor | None]:
    """Text features of each row's prompt by its index, and, where guidance uses it, of the negative prompt.

    The encoder is loaded for texts that are not stored, and dropped afterwards: the transformer gets the device.
    """
    named = run.encoders
    texts = dict(stored)
    negative = [run.negative_text] if run.guided else []
    missing = [text for text in dict.fromkeys([*negative, *(row.prompt for row in rows)]) if text not in texts]
    if missing:
        paths = Path(named.text.from_pretrained), Path(named.tokenizer.from_pretrained)
        encoder = text_encoder(*paths, named.text.precision, device, named.tokenizer.model_max_length)
        texts |= zip(missing, encode_prompts(encoder, missing, None)[0], strict=True)
    if rows:
        require_text_fits(named.text.from_pretrained, texts[rows[0].prompt], run.wan)
    return {row.index: texts[row.prompt] for row in rows}, texts[negative[0]] if negative else None


def _encode_early(
    run: GenerationRun, rows: Sequence[GenerationRow], device: torch.device
) -> dict[int, dict[str, Tensor]]:
    """The features of each row that need no VAE, by its index; the image encoder is dropped afterwards."""
    section, encoder = run.encoders.image, None
    if not any(feature.source in EARLY_SOURCES for feature in run.wan.task.features):
        return {row.index: {} for row in rows}
    if run.sees_images and section is not None:
        encoder = image_encoder(Path(section.from_pretrained), run.encoders.image_precision, device)
        require_image_encoder_fits(section.from_pretrained, encoder, run.wan)
    early = EarlyFeatures(run.wan, encoder)
    return {row.index: early.of(load_given(run, row)) for row in rows}


def _told(on_step: Callable[[int], object], count: int, clean: Tensor) -> None:
    """Tell how many rows took a step; what it predicts is not asked for."""
    del clean
    on_step(count)
