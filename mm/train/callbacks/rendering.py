"""Clips rendered from a few prompts during training, with the model as it is, on whatever layout it is trained."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mm.config.run.generation import GenerationRun
from mm.config.run.training import TrainingRun
from mm.data.dataset import FeatureDataset
from mm.data.video import probe, read_frames
from mm.errors import DataError, raise_all
from mm.generate.describe import describe_row
from mm.generate.render import Processes, Renderer, batches_of_replica, usable_rows
from mm.generate.video import clip_path, prepare_folder, write_clip
from mm.train.callbacks.base import Every, ModelCheck
from mm.train.models import Models
from mm.train.other_expert import open_other_expert
from mm.train.records import Record, RenderedClips
from mm.train.stored_texts import stored_texts

logger = logging.getLogger(__name__)


class Rendering(ModelCheck):
    """Renders the rows of a configuration every `--validation-interval` steps, below a folder of the run."""

    def __init__(
        self,
        config: GenerationRun,
        processes: Processes,
        interval: int,
        folder: Path,
        sections: TrainingRun,
        dataset: FeatureDataset,
    ) -> None:
        """Encode the texts and images once, and see that the VAE can be loaded; every rank does so.

        Args:
            config: what to render. processes: where the training runs. interval: in steps.
            folder: gets `step_0000100/video_0000.mp4` and so on; all ranks see it.
            sections: the training, which may name the other one of two experts.
            dataset: the features, whose stores may hold texts of the clips.

        Raises:
            ConfigError, DataError: what `mm.generate.render` and `open_other_expert` raise; also for a single row that
                cannot be used, as nobody would look for it later.
        """
        self.every = Every(interval, at_end=True)
        self._config, self._processes, self._folder, self._sections = config, processes, folder, sections
        self._other = open_other_expert(sections, processes)
        self._rows, bad = usable_rows(config, processes)
        raise_all(DataError, [row.problem for row in bad])
        texts = [*(row.prompt for row in self._rows), *([config.negative_text] if config.guided else [])]
        stored = stored_texts(dataset, config.encoders, texts)
        batches = batches_of_replica(self._rows, processes, 1, together=True)
        self._renderer = Renderer(config, processes, batches, stored)
        self._renderer.load_video_encoder()

    def look(self, models: Models, step: int) -> Sequence[Record]:
        """Render; raises what `render` raises."""
        paths = self.render(models, step)
        if self._processes.comm.rank != 0:
            return ()
        clips = {path.stem: clip for path in paths if (clip := _read(path)) is not None}
        return [RenderedClips(step, paths, clips, self._config.output.fps)]

    def is_missing(self, step: int) -> bool:
        """Notice that a clip of a step is not there."""
        return not all(path.exists() for path in self.paths(step))

    def render(self, models: Models, step: int) -> list[Path]:
        """Render and write all clips; every rank calls it.

        The VAE is on the device only meanwhile, and so is the other expert of one in training.

        Returns:
            The clips of all rows, in their order, when all are written; the same on every rank.

        Raises:
            DataError: DATA-051 and DATA-052 when a clip cannot be written, DATA-055 and DATA-056 as in generation.
        """
        paths = self.paths(step)
        folder = paths[0].parent
        prepare_folder(folder)  # clips of a step that is run again are replaced
        video = self._renderer.load_video_encoder()
        velocity = models.velocity()
        if self._other is not None:
            velocity = self._other.beside(velocity, self._sections, self._processes)
        for row, frames in self._renderer.clips(velocity, video, lambda rows: None):
            about = {**describe_row(row, self._config), "step": step, "seed": self._config.generation.seed}
            write_clip(clip_path(folder, row.index), frames, self._config.output.fps, about)
        self._processes.comm.barrier()
        return paths

    def paths(self, step: int) -> list[Path]:
        """The clips of a step, whether they are there or not."""
        return [clip_path(self._folder / f"step_{step:07d}", row.index) for row in self._rows]


def _read(path: Path) -> Tensor | None:
    """A clip that any rank wrote, uint8 [F, H, W, 3]; None, told, where this node does not see it."""
    try:
        info = probe(path)
        return torch.cat(list(read_frames(path, info, range(info.num_frames)))).permute(0, 2, 3, 1).contiguous()
    except DataError as error:
        logger.warning("not shown in TensorBoard: %s", error)
        return None
