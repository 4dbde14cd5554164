"""A whole generation: rows in, clips out, one part of the model on the device after the other.

Rows are spread over the data-parallel replicas. The ranks of a replica work on the same rows: each encodes what it
needs, all run the transformer together, and the first of them decodes and writes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mm.checkpoint.comm import Comm
from mm.config.generate import Generation
from mm.config.inference import InferenceModel
from mm.device.backend import Backend
from mm.diffusion.samplers import make_sampler
from mm.errors import ConfigError, DataError, Problem, raise_all
from mm.generate.describe import describe_row, describe_run
from mm.generate.inputs import check_given, encode_images, encode_text, frame_condition, video_latents
from mm.generate.pipeline import denoise, initial_latents, noisy_latents, pad_text, to_frames
from mm.generate.rows import BadRow, Row, read_rows
from mm.generate.video import clip_path, prepare_folder, write_clip
from mm.generate.weights import open_generation_weights
from mm.parallel.apply import apply_frozen
from mm.parallel.mesh import Mesh
from mm.parallel.velocity import ParallelVelocity
from mm.wan.encoders import DTYPES, VideoEncoder
from mm.wan.image_encoder import ImageEncoder

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


def generate_clips(
    generation: Generation,
    processes: Processes,
    *,
    micro_batch_size: int = 1,
    overwrite: bool = False,
    show_progress: bool = True,
) -> list[Path]:
    """Generate one clip for each row and write it as soon as it is done.

    Args:
        generation: checked by `mm.config.generate.load_generation`.
        processes: where it runs; every rank of the job calls this.
        micro_batch_size: rows in one forward.
        overwrite: replace clips that exist.
        show_progress: draw a progress bar over this replica's rows times steps, on rank 0.

    Returns:
        The clips' paths that this rank wrote, in the order of the rows.

    Raises:
        ConfigError: CFG-065 and CFG-066 when the parts of the model do not fit each other or the configuration.
        DataError: DATA-001 to DATA-007, DATA-085 to DATA-087 for rows that could not be used, after all others are
            done; DATA-050 to DATA-056 and DATA-084 for prompts and clips, DATA-020 to DATA-045 and DATA-090 to DATA-093
            for weights that cannot be used.
        CheckpointError: CKPT-010 to CKPT-021 for weights that cannot be used.
    """
    config = generation.config
    rows, bad = _usable_rows(config, processes)
    if not rows:
        raise_all(DataError, [row.problem for row in bad])
    folder = Path(config.save_path)
    prepare_folder(folder, [row.index for row in rows], overwrite=overwrite)
    processes.comm.barrier()  # nobody writes before everybody has looked
    worker = _Worker(generation, processes, _rows_of_replica(rows, processes, micro_batch_size))
    paths = worker.run(folder, micro_batch_size, show_progress)
    processes.comm.barrier()
    log.info("%d clips are in %s", len(rows), folder)
    raise_all(DataError, [row.problem for row in bad])
    return paths


def _usable_rows(config: InferenceModel, processes: Processes) -> tuple[list[Row], list[BadRow]]:
    """All rows that clips can be made of, the same on every rank, and those that cannot, which are logged."""
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
    return [row for row in rows if row.index not in unusable], bad


def _report(row: BadRow) -> list[Any]:
    return [row.index, row.problem.id, row.problem.message, row.problem.remedy]


@dataclass(frozen=True)
class _Batch:
    """Rows that go through the transformer together; `counts` unless they only keep other replicas company."""

    rows: list[Row]
    counts: bool


def _rows_of_replica(rows: Sequence[Row], processes: Processes, size: int) -> list[_Batch]:
    """This replica's batches. With layer-zero every replica has as many: gathering weights takes all of them."""
    layout, dp_rank = processes.mesh.layout, processes.mesh.dp_rank
    mine = list(rows[dp_rank :: layout.dp_size])
    batches = [_Batch(mine[start : start + size], True) for start in range(0, len(mine), size)]
    if layout.zero3_size is not None:
        most = -(-len(rows[:: layout.dp_size]) // size)
        batches += [_Batch(list(rows[:1]), False)] * (most - len(batches))
    return batches


class _Worker:
    """One rank's part of a generation; making it encodes the texts and images and loads the models."""

    def __init__(self, generation: Generation, processes: Processes, batches: Sequence[_Batch]) -> None:
        self._config = config = generation.config
        self._processes, self._batches = processes, batches
        device = processes.backend.device
        dtype = DTYPES[config.predictor.dtype]
        weights = open_generation_weights(
            config.predictor.from_pretrained or "", config.lora, config.predictor.wan(), dtype, processes.writes
        )
        rows = list({row.index: row for batch in batches for row in batch.rows}.values())
        self._text, self._negative = encode_text(config, rows, device)
        self._video = VideoEncoder.from_pretrained(
            Path(config.ae.from_pretrained), config.ae.dtype, device, config.ae.tiling()
        )
        _require_fitting_parts(config, next(iter(self._text.values()), None), self._video)
        self._images = self._encode_images(rows, device)
        parallel = apply_frozen(
            config.predictor.wan(), processes.mesh, processes.backend, dtype, weights.value_of, generation.zero
        )
        self._model = ParallelVelocity(parallel)
        # only of whoever writes; the others have no fingerprint
        self._description = describe_run(generation, weights.source, weights.fingerprint(), device.type)

    def _encode_images(self, rows: Sequence[Row], device: torch.device) -> dict[int, Tensor]:
        section = self._config.image_encoder
        if section is None:
            return {}
        encoder = ImageEncoder.from_pretrained(Path(section.from_pretrained), section.dtype, device)
        _require_fitting_images(self._config, encoder)
        return encode_images(self._config, encoder, rows)

    def run(self, folder: Path, micro_batch_size: int, show_progress: bool) -> list[Path]:
        """Generate and write this replica's clips."""
        config, paths = self._config, []
        steps = len(self._sampler().timesteps)
        total = steps * sum(len(batch.rows) for batch in self._batches if batch.counts)
        shown = show_progress and self._processes.comm.rank == 0
        with tqdm(total=total, desc="generating", unit="step", disable=not shown) as bar:
            for batch in self._batches:
                latents = self._sample(batch.rows, bar)
                if not (batch.counts and self._processes.writes):
                    continue
                frames = to_frames(self._video.decode(latents))
                _require_size(frames, config)
                for row, clip in zip(batch.rows, frames, strict=True):
                    path = clip_path(folder, row.index)
                    write_clip(path, clip, config.fps, {**describe_row(row, config), **self._description})
                    paths.append(path)
        return paths

    def _sampler(self) -> Any:
        config = self._config
        diffusion = config.diffusion
        return make_sampler(
            diffusion.solver,
            diffusion.num_inference_steps,
            diffusion.flow_shift,
            device=self._processes.backend.device,
            solver_order=diffusion.solver_order,
            solver_type=diffusion.solver_type,
            strength=config.pipeline_config.strength or 1.0,
        )

    def _sample(self, rows: Sequence[Row], bar: tqdm[None]) -> Tensor:
        """Latents [B, C, F, H, W] of the clips of some rows."""
        config, device = self._config, self._processes.backend.device
        predictor, sampler = config.predictor, self._sampler()
        shape = (predictor.noise_channels, *config.latent_size())
        latents = initial_latents(config.seed, [row.index for row in rows], shape).to(device)
        images = {}
        if config.task == "v2v":
            latents = noisy_latents(video_latents(config, self._video, rows), latents, sampler.first_sigma)
        elif config.task != "t2v":
            images["image_features"] = torch.stack([self._images[row.index] for row in rows]).to(device)
            images["condition"] = frame_condition(config, self._video, rows)
        negative = None if self._negative is None else [self._negative] * len(rows)
        return denoise(
            self._model,
            latents,
            pad_text([self._text[row.index] for row in rows], predictor.text_len).to(device),
            None if negative is None else pad_text(negative, predictor.text_len).to(device),
            sampler,
            config.diffusion.guidance_scale,
            images,
            config.diffusion.batched_guidance,
            on_step=lambda: bar.update(len(rows)),
        )


def _require_fitting_parts(config: InferenceModel, text: Tensor | None, video: VideoEncoder) -> None:
    """CFG-066 for a text encoder or a VAE of another model."""
    channels = len(video.vae.config.latents_mean)
    predictor = config.predictor
    widths = [(f"The number of channels of {config.ae.from_pretrained}", channels, "out_dim", predictor.out_dim)]
    if text is not None:
        name = f"The width of {config.text_encoder.from_pretrained}"
        widths.append((name, text.shape[-1], "text_dim", predictor.text_dim))
    _require_equal(widths)


def _require_fitting_images(config: InferenceModel, encoder: ImageEncoder) -> None:
    """CFG-066 for an image encoder of another model."""
    predictor, folder = config.predictor, config.image_encoder.from_pretrained if config.image_encoder else ""
    tokens = encoder.num_tokens
    _require_equal(
        [
            (f"The width of {folder}", encoder.width, "img_dim", predictor.img_dim),
            (f"The number of tokens of {folder}", tokens, "clip_token_len", predictor.clip_token_len),
        ]
    )


def _require_equal(parts: Sequence[tuple[str, int, str, int | None]]) -> None:
    problems = [
        Problem("CFG-066", f"{what} is {found}, and predictor.{name} is {expected}.", "Use the parts of one model.")
        for what, found, name, expected in parts
        if found != expected
    ]
    raise_all(ConfigError, problems)


def _require_size(frames: Tensor, config: InferenceModel) -> None:
    """The VAE's stride is the one that the latents' size was computed with."""
    if tuple(frames.shape[1:4]) != config.pipeline_config.input_size:
        raise DataError(
            "DATA-055",
            f"{config.ae.from_pretrained} made clips of {tuple(frames.shape[1:4])} where (frames, height, width) "
            f"{config.pipeline_config.input_size} were expected.",
            "Use the VAE of a Wan2.1 model (stride 4x8x8).",
        )
