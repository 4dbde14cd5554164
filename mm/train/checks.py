"""What is looked at between the steps: the loss on held-out features, and clips rendered with the model as it is."""

from __future__ import annotations

import logging
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from mm.checkpoint.comm import Comm
from mm.config.inference import InferenceModel
from mm.config.run.around import validation_folder
from mm.config.run.training import TrainingRun
from mm.data.dataset import FeatureDataset
from mm.data.video import probe, read_frames
from mm.device.backend import Backend
from mm.errors import DataError
from mm.parallel.apply import ParallelModel
from mm.parallel.mesh import Mesh
from mm.train.evaluation import evaluate
from mm.train.metrics import EVALUATION_FILE, MetricsLog, read_evaluations

if TYPE_CHECKING:
    from mm.train.validation import Validation

logger = logging.getLogger(__name__)

Check = Literal["evaluation", "validation"]


@dataclass(frozen=True)
class Checks:
    """The checks of a run, each with its interval.

    Attributes:
        sections: of the run. comm: all ranks.
        held_out: the features of `--eval-data`, or None. validation: what renders clips, or None.
        fps: of the clips.
    """

    sections: TrainingRun
    comm: Comm
    held_out: FeatureDataset | None
    validation: Validation | None
    fps: int

    @classmethod
    def prepare(
        cls,
        sections: TrainingRun,
        held_out: FeatureDataset | None,
        validation: InferenceModel | None,
        mesh: Mesh,
        backend: Backend,
        comm: Comm,
    ) -> Checks:
        """Encode what validation needs, before the model takes the device's memory; every rank calls it.

        Raises:
            ConfigError, DataError: what `mm.train.validation.Validation` raises.
        """
        if validation is None or sections.checkpoint.save is None:
            return cls(sections, comm, held_out, None, 0)
        # Only here: the encoders' libraries take a third of the time in which a training process starts.
        from mm.generate.render import Processes
        from mm.train.validation import Validation

        renders = Validation(validation, Processes(mesh, backend, comm), validation_folder(sections.checkpoint.save))
        return cls(sections, comm, held_out, renders, validation.fps)

    def due(self, step: int) -> frozenset[Check]:
        """What is to be done after a step."""
        due: set[Check] = set()
        evaluation, validation = self.sections.evaluation, self.sections.validation
        if self.held_out is not None and evaluation is not None and self._is_due(step, evaluation.interval):
            due.add("evaluation")
        if self.validation is not None and validation is not None and self._is_due(step, validation.interval):
            due.add("validation")
        return frozenset(due)

    def missed(self, step: int) -> frozenset[Check]:
        """What was due after a step, and is not there: the run was stopped between saving and looking.

        Every rank calls it, and all are told what rank 0 sees.

        Raises:
            CheckpointError: CKPT-070 for a damaged evaluation.jsonl.
        """
        return frozenset(self.comm.broadcast_object(sorted(self.due(step) - self._done(step))))

    def _done(self, step: int) -> set[Check]:
        done: set[Check] = set()
        if self.comm.rank == 0 and self.sections.checkpoint.save is not None:
            file = Path(self.sections.checkpoint.save) / EVALUATION_FILE
            if file.exists() and any(row.step == step for row in read_evaluations(file)):
                done.add("evaluation")
        if self.validation is not None and all(path.exists() for path in self.validation.paths(step)):
            done.add("validation")
        return done

    def run(self, due: Set[Check], step: int, parallel: ParallelModel, log: MetricsLog) -> None:
        """Do what is due after a step; every rank calls it.

        Raises:
            DataError: what reading held-out features and writing clips raise.
        """
        if self.held_out is not None and "evaluation" in due:
            log.write_evaluation(step, evaluate(parallel, self.held_out, self.comm))
        if self.validation is not None and "validation" in due:
            paths = self.validation.render(parallel, step)
            if self.comm.rank == 0:
                log.write_clips(
                    step, {path.stem: clip for path in paths if (clip := _read(path)) is not None}, self.fps
                )
                logger.info("step %d | %d clips in %s", step, len(paths), paths[0].parent)

    def _is_due(self, step: int, interval: int) -> bool:
        return step % interval == 0 or step == self.sections.training.steps


def _read(path: Path) -> Tensor | None:
    """A clip that any rank wrote, uint8 [F, H, W, 3]; None, told, where this node does not see it."""
    try:
        info = probe(path)
        return torch.cat(list(read_frames(path, info, range(info.num_frames)))).permute(0, 2, 3, 1).contiguous()
    except DataError as error:
        logger.warning("not shown in TensorBoard: %s", error)
        return None
