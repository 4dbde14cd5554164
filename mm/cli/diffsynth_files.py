"""epoch-N.safetensors: a checkpoint's trained weights in the names of DiffSynth-Studio's pipeline."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mm.checkpoint.comm import Comm, ProcessGroupComm, SingleProcess, on_rank_zero
from mm.checkpoint.directory import candidates
from mm.checkpoint.files import remove_drafts, sync_folder, temporary_name, writing_errors
from mm.checkpoint.finite import rounded
from mm.checkpoint.formats.training import STEPS_KEY
from mm.checkpoint.identify import identify
from mm.checkpoint.manifest import read_manifest
from mm.checkpoint.safetensor_file import Entry, entry_of, write_safetensors
from mm.checkpoint.weights import open_weights
from mm.config.place import ProcessPlace
from mm.config.trainable import names_by_pattern, patterns_of
from mm.dialects.diffsynth.pipeline_names import name_in_file
from mm.dialects.diffsynth.translation import DiffSynthRun
from mm.errors import CheckpointError
from mm.lora.record import adapter_of, record_of
from mm.train.callbacks.base import Callback, Every, StepDone
from mm.train.records import Record

log = logging.getLogger(__name__)


class EpochFiles(Callback):
    """Writes the file of an epoch, or of so many steps, from the checkpoint of that step; after `Checkpointing`."""

    phase = "saving"

    def __init__(self, run: DiffSynthRun, where: ProcessPlace) -> None:
        """Write into the run's folder.

        Args:
            run: whose files. where: this process's place.
        """
        self.every = Every(run.steps_of_file, at_end=True)
        self._run, self._where = run, where

    def after_step(self, done: StepDone) -> Sequence[Record]:
        """Write the file on rank 0, while the others wait.

        Raises:
            CheckpointError: CKPT-016 for a value that is not finite, CKPT-031 where it cannot be written.
        """
        comm: Comm = SingleProcess()
        if self._where.world_size > 1:
            comm = ProcessGroupComm(device=done.parallel.backend.device)
        on_rank_zero(comm, partial(self._write, done.step))
        return ()

    def begin(self) -> None:
        """Write the files of checkpoints that have none, since a run ended between the two, and remove drafts; damaged
        ones are passed over, as a run that goes on does.
        """
        remove_drafts(self._run.places.output, "*.safetensors")
        total = self._run.training.training.steps
        for found in candidates(self._run.places.checkpoints):
            is_due = self.every.is_due(found.step, last=found.step == total)
            if is_due and not self._target(found.step).exists():
                try:
                    self._write(found.step)
                except CheckpointError as error:
                    log.warning("%s is not written: %s", self._target(found.step), error)

    def _write(self, step: int) -> None:
        root = self._run.places.checkpoints
        folder = next((found.path for found in candidates(root) if found.step == step), None)
        if folder is None:  # refused by the disk, which the run was told to pass over
            return
        write_pipeline_file(folder, self._target(step), self._run.prefix)

    def _target(self, step: int) -> Path:
        """File of a step; epochs are counted from 0, steps from 1."""
        name = f"epoch-{-(-step // self._run.steps_of_file) - 1}" if self._run.by_epoch else f"step-{step}"
        return self._run.places.output / f"{name}.safetensors"


def write_pipeline_file(checkpoint: Path, target: Path, prefix: str) -> None:
    """Write what a checkpoint has trained as one file, in one step: models in bf16, a LoRA in fp32.

    Args:
        checkpoint: a training checkpoint. target: replaced where it exists.
        prefix: taken off the pipeline's names.

    Raises:
        CheckpointError: CKPT-016 for a value that is not finite, CKPT-031 where it cannot be written.
    """
    record = record_of(read_manifest(checkpoint), checkpoint)
    entries = _of_adapter(checkpoint, prefix) if record is not None else _of_model(checkpoint, prefix)
    draft = target.with_name(temporary_name(target.name))
    with writing_errors():
        try:
            write_safetensors(draft, entries, {"format": "pt"})
            os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)
        sync_folder(target.parent)
    log.info("%s: %d tensors of %s", target, len(entries), checkpoint.name)


def _of_model(checkpoint: Path, prefix: str) -> list[Entry]:
    """Parameters that were trained; what a run has frozen is in the checkpoint too."""
    source = open_weights(identify(checkpoint))
    shapes = source.shapes()
    trainable = (read_manifest(checkpoint).scalars.get(STEPS_KEY) or {}).get("trainable")
    named = [list(shapes)] if trainable is None else names_by_pattern(patterns_of(trainable), shapes)
    trained = {name for names in named for name in names}
    return [
        Entry(name_in_file(name, prefix), torch.bfloat16, shape, partial(_in_bf16, source.read, name))
        for name, shape in shapes.items()
        if name in trained
    ]


def _of_adapter(checkpoint: Path, prefix: str) -> list[Entry]:
    """Halves of adapters, and what was trained beside them. Alpha is the rank, as DiffSynth-Studio takes it to be."""
    adapter = adapter_of(checkpoint)
    halves = [
        entry_of(name_in_file(f"{linear}.{half}.default.weight", prefix), value.contiguous())
        for linear, update in adapter.updates.items()
        for half, value in (("lora_A", update.a), ("lora_B", update.b))
    ]
    read = adapter.parts.__getitem__
    return halves + [
        Entry(name_in_file(name, prefix), torch.bfloat16, tuple(value.shape), partial(_in_bf16, read, name))
        for name, value in adapter.parts.items()
    ]


def _in_bf16(read: Callable[[str], Tensor], name: str) -> Tensor:
    return rounded(name, read(name), torch.bfloat16)
