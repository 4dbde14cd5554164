"""Samples of raw data, whichever system's metadata lists them (`mm.data.sources` reads it)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field

from mm.config.base import Section
from mm.data.remote.media import RemoteFile
from mm.rng import generator

Kind = Literal["video", "image"]


def _whole(value: Any) -> Any:
    """80 for 80.0: pandas writes a column of whole numbers so when one of its cells is empty."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


PositiveInt = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
FrameNumber = Annotated[int, BeforeValidator(_whole), Field(ge=0)]


class Resolution(Section):
    """Size of a video in pixels."""

    height: PositiveInt
    width: PositiveInt


class Annotation(Section):
    """One row. An empty caption is accepted (it is what classifier-free guidance trains on); a missing one is not.

    Attributes:
        path: the video or image, below the data set's folder.
        cap: its caption, or several of which one is drawn from the seed.
        num_frames, fps, resolution: what the video is said to be.
        cut: first frame to use, and optionally the frame to stop before.
    """

    path: str
    cap: str | list[str] | None = None
    num_frames: PositiveInt | None = None
    fps: float | None = Field(None, gt=0)
    resolution: Resolution | None = None
    cut: list[FrameNumber] | None = Field(None, min_length=1, max_length=2)

    @property
    def captions(self) -> tuple[str, ...]:
        """The captions; none, no caption."""
        return (self.cap,) if isinstance(self.cap, str) else tuple(self.cap or ())

    @property
    def cut_name(self) -> str:
        """`10-50`, or `10-` to the end; `0-` for the whole video."""
        return cut_name(self.cut)


def cut_name(cut: Any) -> str:
    """Name of a cut as a row has it, checked or not: `10-50`, or `10-` to the end; `0-` for the whole video."""
    if not cut:
        return "0-"
    begin, end = [*map(_whole, cut if isinstance(cut, list) else [cut]), None][:2]
    return f"{begin}-{'' if end is None else end}"


@dataclass(frozen=True, slots=True)
class VideoSample:
    """One video, or one cut of it, or an image, which is a video of one frame; and its captions.

    Attributes:
        id: stable name, the key of all its random choices: its path below the data set's folder, with `N:` before it
            for the data sets after the first (N = 1, 2, ...), and `//` and its cut after it where the video was listed
            before; so that adding a data set or a row renames nothing.
        file: the video or image itself.
        captions: at least one.
        annotation: the row as it was given, without the columns.
        columns: what stands in the task's columns, by name.
        kind: of the file.
        roles: files beside the target by what they are: `control`, `reference`, `mask`, `first_frame`, `last_frame`,
            `camera`, `object`, or a column's own name. Whoever uses one looks whether it is there.
        objects: in object storage, of which some of these files are copies, read by `mm.data.remote.media.reading`.
    """

    id: str
    file: Path
    captions: tuple[str, ...]
    annotation: Annotation
    columns: Mapping[str, float] = field(default_factory=dict)
    kind: Kind = "video"
    roles: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    objects: tuple[RemoteFile, ...] = ()

    @property
    def where(self) -> str:
        """The video or image in words: its path, or its address."""
        remote = self.object_of(self.file)
        return str(self.file if remote is None else remote.place)

    def object_of(self, file: Path) -> RemoteFile | None:
        """The object that one of its files is a copy of, if it is."""
        return next((one for one in self.objects if one.copy == file), None)

    def caption(self, seed: int, draw: int = 0) -> str:
        """The caption that a draw uses: the only one, or one of several drawn from the seed."""
        if len(self.captions) == 1:
            return self.captions[0]
        chance = generator(seed, "caption_choice", self.id, draw)
        return self.captions[int(torch.randint(len(self.captions), (), generator=chance))]
