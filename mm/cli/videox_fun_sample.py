"""Clips between the steps where VideoX-Fun's users look for them: `output_dir/sample`."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from mm.train.records import Record, RenderedClips
from mm.train.sinks.base import Sink

log = logging.getLogger(__name__)


class Samples(Sink):
    """Gives each clip its name there besides: `sample-STEP-rank0-image-NUMBER.mp4`."""

    def __init__(self, folder: Path) -> None:
        """Put names into a folder."""
        self._folder = folder

    def write(self, record: Record) -> None:
        """Name the clips of a step; a name that is there is of the same step, and is given anew."""
        if not isinstance(record, RenderedClips):
            return
        for number, clip in enumerate(record.paths):
            name = self._folder / f"sample-{record.step}-rank0-image-{number}.mp4"
            try:
                _give_name(clip, name)
            except OSError as error:
                log.error("%s cannot be written (%s); the clip is %s", name, error.strerror or error, clip)


def _give_name(clip: Path, name: Path) -> None:
    temporary = name.with_name(f".tmp-{os.getpid()}-{name.name}")
    try:
        try:
            os.link(clip, temporary)
        except OSError:  # a file system without links
            shutil.copyfile(clip, temporary)
        os.replace(temporary, name)
    finally:
        temporary.unlink(missing_ok=True)
