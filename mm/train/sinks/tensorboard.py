"""TensorBoard: curves of all numbers, and rendered clips."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from mm.train.records import Record, RenderedClips
from mm.train.sinks.base import Sink

logger = logging.getLogger(__name__)


class TensorBoard(Sink):
    """Event files; where the disk refuses them, training goes on without."""

    def __init__(self, folder: Path) -> None:
        """Write into a folder of its own."""
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def begin(self, first_step: int, total_steps: int) -> None:
        """Open a file; what another one has of these steps is hidden."""
        self._writer = SummaryWriter(str(self._folder), purge_step=first_step)

    def write(self, record: Record) -> None:
        """Show a record's numbers that are finite, and its clips."""
        numbers = {name: number for name, number in record.numbers().items() if math.isfinite(number)}
        values = [Summary.Value(tag=f"{record.group}/{name}", simple_value=number) for name, number in numbers.items()]
        if isinstance(record, RenderedClips):
            values += [_shown(f"{record.group}/{name}", clip, record.fps) for name, clip in record.clips.items()]
        with self._errors():
            if self._writer is not None and values:
                self._writer._get_file_writer().add_summary(Summary(value=values), record.step)

    def close(self) -> None:
        """Write what is left."""
        with self._errors():
            if self._writer is not None:
                self._writer.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """TensorBoard's writer cannot go on after an error."""
        try:
            yield
        except OSError as error:
            logger.error("TensorBoard's file cannot be written (%s); training goes on without it", error)
            self._writer = None


def _shown(tag: str, clip: Tensor, fps: int) -> Any:
    """A looping GIF, which is how TensorBoard shows a clip; its own writer needs a further package for it."""
    images, out = [Image.fromarray(frame) for frame in clip.numpy()], io.BytesIO()
    images[0].save(out, "GIF", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
    height, width = clip.shape[1:3]
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=out.getvalue())
    return Summary.Value(tag=tag, image=image)
