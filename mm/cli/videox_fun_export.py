"""Checkpoints as VideoX-Fun's users look for them, beside a run's own: `checkpoint-50/transformer/`, or a LoRA file."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from mm.checkpoint.comm import ProcessGroupComm, SingleProcess, on_rank_zero
from mm.checkpoint.convert import convert_to_native, zero_to_bf16
from mm.checkpoint.directory import candidates, folder_name
from mm.checkpoint.files import remove_drafts
from mm.config.run.training import TrainingRun
from mm.dialects.videox_fun.command import Writes
from mm.errors import CheckpointError
from mm.lora.convert import write_file
from mm.train.callbacks.base import Callback, Every, StepDone
from mm.train.records import Record

log = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint-(\d+)(?:\.safetensors)?")


class Exports(Callback):
    """Writes what VideoX-Fun's tools load, of each checkpoint of the run when that is on the disk.

    `checkpoint-N/transformer/` is a model in native names with its config.json, as VideoX-Fun loads it with
    from_pretrained and diffusers with from_single_file; of a run with an average, `transformer_ema/` has that. Of
    adapters it is the file `checkpoint-N.safetensors`.
    """

    phase = "saving"

    def __init__(self, writes: Writes, run: TrainingRun) -> None:
        """Write beside the run's checkpoints. writes: what. run: whose."""
        self.every = Every(run.checkpoint.save_interval, at_end=True, when_stopping=True)
        self._writes, self._world_size = writes, run.world_size

    def after_step(self, done: StepDone) -> Sequence[Record]:
        """Write, after the run's own checkpoint; the first rank does, and the others wait for it as in any save.

        Raises:
            CheckpointError: what the conversions raise.
        """
        device = done.parallel.backend.device
        comm = SingleProcess() if self._world_size == 1 else ProcessGroupComm(device=device)
        on_rank_zero(comm, lambda: self._write(done.step))
        return ()

    def begin(self) -> None:
        """Write what goes with the newest checkpoint where it is not there, since a run ended between the two, and
        remove drafts; a damaged one is passed over, as a run that goes on does.
        """
        remove_drafts(Path(self._writes.folder), "checkpoint-*.safetensors")
        newest = next(iter(candidates(Path(self._writes.folder))), None)
        if newest is None or all(path.exists() for path in self._targets(newest.step)):
            return
        try:
            self._write(newest.step)
        except CheckpointError as error:
            log.warning("checkpoint-%d is not written: %s", newest.step, error)

    def _targets(self, step: int) -> list[Path]:
        """Paths of what goes with a checkpoint, each of which gets its name when it is whole."""
        name = Path(self._writes.folder) / f"checkpoint-{step}"
        if self._writes.adapters:
            return [name.with_name(f"{name.name}.safetensors")]
        return [name / "transformer", *[name / "transformer_ema"] * self._writes.averaged]

    def _write(self, step: int) -> None:
        """Write what goes with a checkpoint; what stands there of the same step is written anew."""
        source = Path(self._writes.folder) / folder_name(step)
        if not source.exists():  # the disk refused it, of which the run has told
            return
        first, *average = self._targets(step)
        if self._writes.adapters:
            _remove(first)
            write_file(source, first, "kohya")
        else:
            _remove(first.parent)
            self._write_model(source, first, averaged=False)
            for target in average:
                self._write_model(source, target, averaged=True)
        self._keep_newest()

    def _write_model(self, source: Path, target: Path, *, averaged: bool) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        if self._writes.bf16:
            zero_to_bf16(source, target, averaged=averaged)
        else:
            convert_to_native(source, target, averaged=averaged)

    def _keep_newest(self) -> None:
        """Remove the oldest, as many as are too many."""
        if self._writes.most is None:
            return
        found = {path: match for path in Path(self._writes.folder).iterdir() if (match := _NAME.fullmatch(path.name))}
        for path in sorted(found, key=lambda path: int(found[path][1]))[: -self._writes.most]:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
