"""The first batch of a training as files, where VideoX-Fun's users look for it: `output_dir/sanity_check`.

There it is what the data loader gives, here what the first step is given, decoded back from the stored features;
nothing is dropped from it, as a step may do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mm.config.run.training import TrainingRun
from mm.config.tasks.task import Source, Task
from mm.data.dataset import FeatureDataset, checked_sources, open_features
from mm.data.files import TEMPORARY_PREFIX, make_folder, write_error
from mm.data.loader import NOTHING_DROPPED, FeatureBatch
from mm.generate.video import encode_video
from mm.look.collect import matching_eye
from mm.look.facts import Strip
from mm.look.pictures import Eye, strips_of
from mm.look.samples import drawing_of, read_batches

log = logging.getLogger(__name__)

FOLDER = "sanity_check"
_FPS = 16  # of Wan's clips
_LETTERS, _WORDS = 10, 10  # of a caption, in the name of a file
_ALL = 10_000
"""Frames to show of a clip: more than any has."""

Files = Iterator[tuple[str, Callable[[Path], object]]]
"""Name of each file, and what writes it."""


def write_first_batch(run: TrainingRun, vae: Path, folder: Path, step: int, device: torch.device) -> None:
    """Write the first micro-batch of the first replica, and say so.

    Args:
        run: the training, whose features are there. vae: that they were made with.
        folder: gets `CAPTION.mp4` and what goes with it; files of that name are replaced.
        step: the first that will be taken, from 1. device: decodes.

    Raises:
        ConfigError, DataError: what `mm.look.samples.read_batches` and `mm.look.collect.matching_eye` raise; DATA-018,
            DATA-019 where a file cannot be written.
    """
    dataset = open_features(run.data.features, run.wan)
    drawing = replace(drawing_of(run, step), caption_dropout=0.0, condition_dropout=NOTHING_DROPPED)
    eye = matching_eye(vae, checked_sources(run.data.features, run.wan), device)
    make_folder(folder, "--output_dir")
    with closing(read_batches(dataset, drawing, drawing.batches)) as batches:
        batch = next(batches)
    stems: list[str] = []
    names: list[str] = []
    for row in range(len(batch["sample"])):
        stem = _stem(dataset.listed(batch["index"][row]).cap, f"{step - 1}-{row}")
        stems.append(f"{stem}-{row}" if stem in stems else stem)
        for name, write in _files(eye, dataset, batch, row, stems[-1]):
            _write(folder / name, write)
            names.append(name)
    log.info("the batch of step %d, decoded from its features: %s in %s", step, ", ".join(names), folder)


def _stem(caption: str, otherwise: str) -> str:
    """The begin of a caption, with dashes between its words, as VideoX-Fun has it in names."""
    words = caption.replace("/", "").replace("\0", "").split()
    return "-".join(words[:_WORDS])[:_LETTERS] or otherwise


def _files(eye: Eye, dataset: FeatureDataset, batch: FeatureBatch, row: int, stem: str) -> Files:
    """The files of one sample."""
    frames = eye.frames(batch["latents"][row])
    yield f"{stem}.mp4", lambda path: encode_video(path, frames, _FPS)
    task: Task = dataset.model.task
    for feature in task.stored:
        strips = strips_of(eye, feature, batch["features"][feature.name][row], _ALL)
        if feature.source is Source.IMAGE_ENCODER:
            yield f"clip_{stem}.png", _image(strips[0])
        elif feature.source in (Source.KNOWN_PIXELS, Source.KNOWN_FRAMES):
            masked, mask = strips
            yield f"mask_{stem}.mp4", _video(mask)
            yield f"{stem}_masked.mp4", _video(masked)
        else:
            yield from _conditions(strips, stem, feature.source)


def _conditions(strips: list[Strip], stem: str, source: Source) -> Files:
    """A control video as a video, an image as a picture; an image that a sample does not have is left out."""
    for strip in strips:
        if source is Source.CONTROL_VIDEO and strip is strips[0]:
            yield f"{stem}_control.mp4", _video(strip)
        elif source in (Source.CONTROL_VIDEO, Source.START_IMAGE, Source.REFERENCE_IMAGE) and not strip.note:
            yield f"{stem}_ref.gif", _image(strip)


def _video(strip: Strip) -> Callable[[Path], object]:
    frames: Tensor = torch.from_numpy(np.stack([frame.pixels for frame in strip.frames]))
    return lambda path: encode_video(path, frames, _FPS)


def _image(strip: Strip) -> Callable[[Path], object]:
    return lambda path: Image.fromarray(np.ascontiguousarray(strip.frames[0].pixels)).save(path)


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file, whole or not at all."""
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{uuid4().hex[:12]}-{path.name}")
    try:
        write(temporary)
        temporary.replace(path)
    except (OSError, av.FFmpegError) as error:
        raise write_error(path, 0, error if isinstance(error, OSError) else OSError(str(error))) from error
    finally:
        temporary.unlink(missing_ok=True)
