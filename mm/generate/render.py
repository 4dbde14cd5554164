"""Clips from the rows of a configuration with any transformer on the mesh: what generation and validation share.

Rows are spread over the data-parallel replicas. The ranks of a replica work on the same rows: each encodes what it
needs, all run the transformer together, and the first of them decodes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mm.checkpoint.comm import Comm
from mm.config.inference import InferenceModel
from mm.device.backend import Backend
from mm.diffusion.samplers import Sampler, make_sampler
from mm.errors import DataError, Problem, raise_all
from mm.generate.inputs import check_given, encode_text, require_equal, video_latents
from mm.generate.pipeline import Velocity, denoise, initial_latents, noisy_latents, pad_text, to_frames
from mm.generate.rows import BadRow, GenerationRow, read_rows
from mm.generate.sources import encode_early, row_features
from mm.parallel.mesh import Mesh
from mm.wan.encoders import VideoEncoder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Processes:
    """Where a generation runs: this rank's place and device, and the ranks for messages."""

    mesh: Mesh
    backend: Backend
    comm: Comm

    @property
    def writes(self) -> bool:
        """Whether this rank decodes and writes the clips of its replica."""
        return self.mesh.tp_rank == 0 and self.mesh.cp_rank == 0


def usable_rows(config: InferenceModel, processes: Processes) -> tuple[list[GenerationRow], list[BadRow]]:
    """All rows that clips can be made of, the same on every rank, and those that cannot, which are logged.

    Raises:
        DataError: what `mm.generate.rows.read_rows` raises; those that cannot, when no other is left.
    """
    rows, bad = read_rows(config)
    mesh = processes.mesh
    found = list(map(_report, bad))
    for row in rows[mesh.dp_rank :: mesh.layout.dp_size]:
        try:
            check_given(config, row)
        except DataError as error:
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
    rows: Sequence[GenerationRow], processes: Processes, size: int, together: bool, finished: Collection[int] = ()
) -> list[Batch]:
    """This replica's rows in batches of `size`.

    Args:
        rows: of all replicas.
        processes: whose.
        size: of a batch, at most.
        together: every replica has as many batches, because weights are gathered over all of them.
        finished: indices of rows that need no clip. A batch of such rows alone is left out; the others stay as they
            are, so that a clip has the neighbours that it would have had.
    """
    layout, dp_rank = processes.mesh.layout, processes.mesh.dp_rank

    def batches(replica: int) -> list[Batch]:
        mine = list(rows[replica :: layout.dp_size])
        cut = [mine[start : start + size] for start in range(0, len(mine), size)]
        return [Batch(batch, True) for batch in cut if any(row.index not in finished for row in batch)]

    found = batches(dp_rank)
    if together:
        most = max(len(batches(replica)) for replica in range(layout.dp_size))
        found += [Batch(list(rows[:1]), False)] * (most - len(found))
    return found


class Renderer:
    """One rank's part of rendering some rows; making it encodes their texts and images."""

    def __init__(self, config: InferenceModel, processes: Processes, batches: Sequence[Batch]) -> None:
        """Encode what does not change, one encoder on the device after the other.

        Args:
            config: what to render. processes: where. batches: this replica's, from `batches_of_replica`.

        Raises:
            ConfigError: CFG-066 for a text or image encoder of another model.
            DataError: DATA-040 to DATA-043 for encoders that cannot be loaded.
        """
        self._config, self._processes, self._batches = config, processes, batches
        rows = list({row.index: row for batch in batches for row in batch.rows}.values())
        device = processes.backend.device
        self._text, self._negative = encode_text(config, rows, device)
        if self._text:
            name = f"The width of {config.text_encoder.from_pretrained}"
            width = next(iter(self._text.values())).shape[-1]
            require_equal([(name, width, "text_dim", config.predictor.text_dim)])
        self._early = encode_early(config, rows, device)

    @property
    def num_steps(self) -> int:
        """Steps of all this replica's rows together."""
        return len(self._sampler().timesteps) * sum(len(batch.rows) for batch in self._batches if batch.counts)

    def load_video_encoder(self) -> VideoEncoder:
        """The VAE, on the device.

        Raises:
            ConfigError: CFG-066 for one of another model.
            DataError: DATA-040 to DATA-042 when it cannot be loaded.
        """
        ae = self._config.ae
        video = VideoEncoder.from_pretrained(
            Path(ae.from_pretrained), ae.dtype, self._processes.backend.device, ae.tiling()
        )
        channels, name = len(video.vae.config.latents_mean), f"The number of channels of {ae.from_pretrained}"
        require_equal([(name, channels, "out_dim", self._config.predictor.out_dim)])
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
        for batch in self._batches:
            latents = self._sample(model, video, batch, on_step)
            if batch.counts and self._processes.writes:
                frames = to_frames(video.decode(latents))
                self._require_size(frames)
                yield from zip(batch.rows, frames, strict=True)

    def _sampler(self) -> Sampler:
        diffusion = self._config.diffusion
        return make_sampler(
            diffusion.solver,
            diffusion.num_inference_steps,
            diffusion.flow_shift,
            device=self._processes.backend.device,
            solver_order=diffusion.solver_order,
            solver_type=diffusion.solver_type,
            strength=self._config.pipeline_config.strength or 1.0,
        )

    def _sample(self, model: Velocity, video: VideoEncoder, batch: Batch, on_step: Callable[[int], object]) -> Tensor:
        """Latents [B, C, F, H, W] of the clips of some rows."""
        config, rows, device = self._config, batch.rows, self._processes.backend.device
        predictor, sampler = config.predictor, self._sampler()
        shape = (predictor.noise_channels, *config.latent_size())
        latents = initial_latents(config.seed, [row.index for row in rows], shape).to(device)
        if config.video is not None:
            latents = noisy_latents(video_latents(config, video, rows), latents, sampler.first_sigma)
        negative = None if self._negative is None else [self._negative] * len(rows)
        return denoise(
            model,
            latents,
            pad_text([self._text[row.index] for row in rows], predictor.text_len).to(device),
            None if negative is None else pad_text(negative, predictor.text_len).to(device),
            sampler,
            config.diffusion.guidance_scale,
            row_features(config, self._early, video, rows, device),
            config.diffusion.batched_guidance,
            on_step=lambda: on_step(len(rows) if batch.counts else 0),
        )

    def _require_size(self, frames: Tensor) -> None:
        """The VAE's stride is the one that the latents' size was computed with."""
        expected = self._config.pipeline_config.input_size
        if tuple(frames.shape[1:4]) != expected:
            raise DataError(
                "DATA-055",
                f"{self._config.ae.from_pretrained} made clips of {tuple(frames.shape[1:4])} where (frames, height, "
                f"width) {expected} were expected.",
                "Use the VAE of a Wan2.1 model (stride 4x8x8).",
            )
