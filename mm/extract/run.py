"""Feature extraction: every video and caption through its encoder once, to files that training reads.

Each process encodes its share of the samples and skips what is complete, so an interrupted run goes on where it was.
The first process writes the list of samples when all are on disk; where the list is, the store is complete.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mm.config.data import TEMPORAL_STRIDE, ExtractData, data_sources
from mm.config.extract import ExtractAutoencoder, ExtractModel, ExtractTools, extraction_task
from mm.config.model import CLIP_TOKEN_LEN, IMAGES, ModelType
from mm.data.clips import Clip, check_announced_lengths, read_clips
from mm.data.features import (
    EMPTY_PROMPT,
    EMPTY_PROMPT_ID,
    FEATURES,
    LISTING,
    Feature,
    FeatureRow,
    Origin,
    feature_name,
    is_complete,
    read_header,
    text_hash,
    video_fingerprint,
    write_feature,
    write_listing,
)
from mm.data.files import raise_limited, read_rows, remove_temporaries
from mm.data.metadata import VideoSample, load_samples
from mm.data.recipe import RECIPE_FILE, Recipe, check_recipe, extraction_recipe, load_recipe, save_recipe
from mm.errors import DataError, Problem
from mm.wan.condition import condition_latents
from mm.wan.encoders import TextEncoder, VideoEncoder
from mm.wan.image_encoder import ImageEncoder

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ExtractReport:
    """What one process did.

    Attributes:
        listed: samples of all processes, now in data.jsonl.
        encoded: samples this process encoded. reused: samples of its share that were complete before.
    """

    listed: int
    encoded: int
    reused: int


@dataclass(frozen=True, slots=True)
class Task:
    """One sample of the plan: its video, the caption chosen for it, its file and what that is made from."""

    sample: VideoSample
    caption: str
    file: Path
    origin: Origin


def _alone() -> None:
    """The barrier of a single process."""


def extract(
    data: ExtractData,
    model: ExtractModel,
    tools: ExtractTools,
    *,
    seed: int,
    device: torch.device,
    overwrite: bool = False,
    num_workers: int = 2,
    decode_timeout: float = 120.0,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = _alone,
) -> ExtractReport:
    """Run one process's part of the extraction.

    Args:
        data: which clips. model: the encoders. tools: where to write.
        seed: decides starts of clips and choices between captions.
        device: where the encoders run.
        overwrite: replace features of another recipe instead of refusing.
        num_workers: processes that read clips ahead. decode_timeout: seconds for one clip.
        rank, world_size: this process and how many there are; they take every `world_size`-th sample.
        barrier: returns when all processes have called it.

    Raises:
        ConfigError: CFG-054 for the list of data sets. What `mm.config.extract.check_extraction` refuses must not
            come here.
        DataError: for annotations (all problems at once, before any work), a video, the weights, or a store made with
            another recipe (DATA-014). The store keeps what is complete and has no data.jsonl.
    """
    samples = load_samples(data_sources(data.dataset_param.basic_parameters))
    check_announced_lengths(samples, data.dataset_param.preprocess_parameters)
    task = extraction_task(model, tools)
    recipe = extraction_recipe(data, model, task, seed)
    store = Path(tools.sorafeature.save_path)
    _check_store(store, recipe, overwrite)
    mine = [_task(sample, store, recipe, seed) for sample in samples[rank::world_size]]
    empty = Origin(EMPTY_PROMPT_ID, recipe.key, text_hash(""), "")
    everything = [_task(sample, store, recipe, seed) for sample in samples] if rank == 0 else []
    if rank == 0:
        _prepare(store, recipe, everything, empty)
    barrier()
    todo = [task for task in mine if not is_complete(task.file, task.origin)]
    empty_file = store / FEATURES / EMPTY_PROMPT
    empty_is_missing = rank == 0 and not is_complete(empty_file, empty)
    if todo or empty_is_missing:
        encoders = _Encoders(data, model, task, device)
        if empty_is_missing:
            write_feature(empty_file, encoders.text_only(""), empty, recipe.max_text_tokens)
        _encode_all(todo, encoders, data, seed, num_workers, decode_timeout, len(mine), show_progress=rank == 0)
    barrier()
    if rank == 0:
        _commit(store, everything, empty, recipe)
        done = f"this process encoded {len(todo)} of its {len(mine)}" if todo else "nothing was left to encode"
        log.info("%d samples are listed in %s; %s", len(samples), store / LISTING, done)
    barrier()
    return ExtractReport(len(samples), len(todo), len(mine) - len(todo))


class _Encoders:
    """All encoders of one extraction."""

    def __init__(self, data: ExtractData, model: ExtractModel, task: ModelType, device: torch.device) -> None:
        tokenizer = data.dataset_param.tokenizer_config
        self._video = VideoEncoder.from_pretrained(
            Path(model.ae.from_pretrained), model.ae.dtype, device, model.ae.tiling()
        )
        self._text = TextEncoder.from_pretrained(
            Path(model.text_encoder.from_pretrained),
            Path(tokenizer.from_pretrained),
            model.text_encoder.dtype,
            device,
            tokenizer.model_max_length,
        )
        self._images: _ImageEncoders | None = None
        if IMAGES[task]:
            self._images = _ImageEncoders(model.ae, self._video, task, device)

    def text_only(self, caption: str) -> Feature:
        return Feature(None, self._text.encode([caption])[0])

    def encode(self, clip: Clip, caption: str) -> Feature:
        latents = self._video.encode(clip.pixels.unsqueeze(0))[0]
        images = self._images.encode(clip) if self._images else (None, None)
        return Feature(latents, self._text.encode([caption])[0], clip.start, *images)


class _ImageEncoders:
    """What i2v and flf2v need of a clip's known frames.

    They are frames of the very clip that is encoded, so that what a model is shown and what it is to make agree.
    """

    def __init__(self, ae: ExtractAutoencoder, video: VideoEncoder, task: ModelType, device: torch.device) -> None:
        assert ae.i2v_processor is not None  # noqa: S101  check_extraction refuses such a task without it
        folder = Path(ae.i2v_processor.image_encoder)
        self._clip = ImageEncoder.from_pretrained(folder, ae.dtype, device)
        if self._clip.num_tokens != CLIP_TOKEN_LEN:
            message = f"{folder} makes {self._clip.num_tokens} tokens of an image, Wan2.1 takes {CLIP_TOKEN_LEN}."
            raise DataError("DATA-045", message, "Use the image_encoder of a Wan2.1 I2V or FLF2V model.")
        self._vae = VideoEncoder(video.vae, ae.condition_tiling())
        self._last_too = IMAGES[task] > 1

    def encode(self, clip: Clip) -> tuple[Tensor, Tensor]:
        """Image features [I, D], the first frame's before the last one's, and the condition [4 + C, F, H, W]."""
        first, last = clip.pixels[None, :, 0], clip.pixels[None, :, -1]
        features = self._clip.encode(torch.cat((first, last)) if self._last_too else first)
        condition = condition_latents(self._vae, first, last if self._last_too else None, clip.num_frames)
        return features.flatten(0, 1), condition[0]


def _task(sample: VideoSample, store: Path, recipe: Recipe, seed: int) -> Task:
    caption = sample.caption(seed)
    origin = Origin(sample.id, recipe.key, text_hash(caption), video_fingerprint(sample.file))
    return Task(sample, caption, store / FEATURES / feature_name(sample.id), origin)


def _check_store(store: Path, recipe: Recipe, overwrite: bool) -> None:
    """Refuse a store of another recipe. Every process looks, so that all stop with the same error."""
    if (store / RECIPE_FILE).exists() and not overwrite:
        remedy = "Give another save_path, the values and weights it was made with, or --overwrite to make it anew."
        check_recipe(store, load_recipe(store), recipe.model_dump(), remedy)


def _prepare(store: Path, recipe: Recipe, tasks: Sequence[Task], empty: Origin) -> None:
    """Make the store ready to write to: its folder, its recipe, no leftovers, and no list unless it still holds."""
    features = store / FEATURES
    try:
        features.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            "DATA-018", f"{features} cannot be made: {error}.", "Correct save_path in tools.json."
        ) from None
    for folder in (store, features):
        remove_temporaries(folder)
    listing = store / LISTING
    if listing.exists() and not (_lists(listing, tasks) and not _incomplete(store, tasks, empty)):
        listing.unlink()
    if not (listing.exists() and (store / RECIPE_FILE).exists()):
        save_recipe(store, recipe)


def _lists(listing: Path, tasks: Sequence[Task]) -> bool:
    """Whether data.jsonl names exactly these samples' files."""
    try:
        named = [row.get("file") for row in read_rows(listing, "DATA-010")]
    except (DataError, AttributeError):
        return False
    return named == [f"{FEATURES}/{task.file.name}" for task in tasks]


def _incomplete(store: Path, tasks: Sequence[Task], empty: Origin) -> list[Path]:
    """Files of the store that are missing, cut off, or made from something else."""
    found = [task.file for task in tasks if not is_complete(task.file, task.origin)]
    empty_file = store / FEATURES / EMPTY_PROMPT
    return found if is_complete(empty_file, empty) else [*found, empty_file]


def _encode_all(
    todo: Sequence[Task],
    encoders: _Encoders,
    data: ExtractData,
    seed: int,
    num_workers: int,
    decode_timeout: float,
    num_mine: int,
    show_progress: bool,
) -> None:
    bar = tqdm(total=num_mine, initial=num_mine - len(todo), desc="features", unit="sample", disable=not show_progress)
    text_len = data.dataset_param.tokenizer_config.model_max_length
    with bar:
        clips = read_clips(
            [task.sample for task in todo],
            data.dataset_param.preprocess_parameters,
            seed,
            num_workers=num_workers,
            time_limit=decode_timeout,
        )
        with closing(clips):
            for task, clip in zip(todo, clips, strict=True):
                if isinstance(clip, DataError):
                    raise clip
                write_feature(task.file, encoders.encode(clip, task.caption), task.origin, text_len)
                bar.update()


def _commit(store: Path, tasks: Sequence[Task], empty: Origin, recipe: Recipe) -> None:
    """List all samples, having seen every one of them whole on disk; a list that is there still holds."""
    if (store / LISTING).exists():
        return
    remedy = "Start the extraction again with all its processes; what is complete is kept."
    missing = _incomplete(store, tasks, empty)
    raise_limited([Problem("DATA-011", f"{file} is missing or incomplete.", remedy) for file in missing])
    write_listing(store, [_row(task, recipe) for task in tasks])


def _row(task: Task, recipe: Recipe) -> FeatureRow:
    header = read_header(task.file)
    shape = header.tensors["latents"][1]
    num_frames = (shape[1] - 1) * TEMPORAL_STRIDE + 1
    return FeatureRow(
        sample=task.sample.id,
        file=f"{FEATURES}/{task.file.name}",
        path=task.sample.annotation.path,
        cap=task.caption,
        start_frame_idx=header.start_frame,
        sample_num_frames=num_frames,
        sample_size=f"{num_frames}x{recipe.height}x{recipe.width}",
        latent_shape=(shape[0], shape[1], shape[2], shape[3]),
        text_tokens=header.tensors["prompt"][1][0],
        task=recipe.task,
    )
