"""An extraction: which clips of which videos become features, by which encoders, and where these go."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from mm.config.base import Section
from mm.config.data import SourceFormat
from mm.config.run.base import Run
from mm.config.run.data import Clip
from mm.config.run.encoders import EncodersSection
from mm.config.run.shapes import FrameRule
from mm.config.storage import Storage
from mm.config.tasks.registry import DEFAULT, FEATURE_TASKS, FeatureTaskName
from mm.config.tasks.task import Task


class ExtractionSection(Section):
    """Extraction: the task of the features, the chance, and the device.

    Attributes:
        task: of the models that are to be trained.
        seed: of a clip's start in a longer video, and of the choice between captions.
        device: kind of device; None takes the best there is.
        draws: clips with their captions that are made of each sample, each with its own chance.
        shard_rows: rows of a shard; None takes what predicted sizes say.
        shard_of: `37/200`, the 37th of 200 parts of the shards, which alone are made; None, any that nobody makes.
        negative_caption: text that guidance leads away from in clips that a training renders; its embedding is stored,
            so that the training need not make it. `release` is the Wan2.1 release's for the task.
        clip_prompts: text file, one prompt a line, of such clips, whose embeddings are stored as well.
    """

    task: FeatureTaskName = DEFAULT.name
    seed: int = Field(1234, ge=0)
    device: Literal["cpu", "cuda", "npu"] | None = None
    draws: int = Field(1, ge=1)
    shard_rows: int | None = Field(None, ge=1)
    shard_of: str | None = None
    negative_caption: str | None = None
    clip_prompts: str | None = Field(None, min_length=1)

    @property
    def share(self) -> tuple[int, int]:
        """The part of the shards to make: every n-th from number i on, as (i, n).

        Raises:
            ValueError: `shard_of` is not of the form `i/n` with i from 1 to n.
        """
        if self.shard_of is None:
            return 0, 1
        part, slash, parts = self.shard_of.partition("/")
        if not (slash and part.isascii() and part.isdigit() and parts.isascii() and parts.isdigit()):
            raise ValueError("is not of the form i/n")
        if not 1 <= int(part) <= int(parts):
            raise ValueError(f"asks for part {int(part)} of {int(parts)}, which are counted from 1")
        return int(part) - 1, int(parts)


class SourceClip(Clip):
    """The clip that is taken of a video. A longer video gives one contiguous clip at a start drawn from the seed.

    Attributes:
        min_num_frames: the fewest frames to accept from a short video, which is then cut to the largest 4k + 1;
            None: a video shorter than `num_frames` is an error.
        frames: which frames a video gives, beyond how many.
        reader: `auto` and `pyav` read with PyAV; `decord` reads with decord those videos of which a check proves that
            it gives the same frames, and the others with PyAV, which is told.
    """

    min_num_frames: int | None = Field(None, ge=1)
    frames: FrameRule = FrameRule()
    reader: Literal["auto", "decord", "pyav"] = "auto"


class SourceSection(Section):
    """The videos and captions.

    Attributes:
        path: a `.txt` list of data sets, or one annotation file (`.json`, `.jsonl`, `.csv`).
        folder: folder that the annotation's paths start from; only with an annotation file.
        format: dialect of the annotations; None where the columns of each file tell.
        file_keys: further columns of a `diffsynth` table whose cells are paths. left_out: columns of it that are not
            looked at.
        entry: the entry of a `simpletuner` file whose samples are taken; None for all.
        storage: how media in object storage are read, of a `simpletuner` file's entries of the type aws.
        clip: what is taken of each.
        workers: videos that each process reads ahead, in processes of their own. read_timeout: seconds for one clip.
        on_bad_sample: `fail`, or `skip:max=0.1%` of all clips, which are left out.
    """

    path: str = Field(min_length=1)
    folder: str | None = Field(None, min_length=1)
    format: SourceFormat | None = None
    file_keys: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    entry: str | None = Field(None, min_length=1)
    storage: Storage = Storage()
    clip: SourceClip
    workers: int = Field(2, ge=1)
    read_timeout: float = Field(120.0, gt=0)
    on_bad_sample: str = "fail"


class StoreSection(Section):
    """Store of features: the folder, and whether features that were made otherwise are replaced."""

    path: str = Field(min_length=1)
    overwrite: bool = False


class WaitingSection(Section):
    """Time that a process waits for another one that cuts the rows into shards; for nothing else does it wait."""

    timeout_minutes: int = Field(1440, ge=1)


class ExtractionSections(Section):
    """All that describes an extraction, and all that its run.yaml holds."""

    extraction: ExtractionSection
    data: SourceSection
    encoders: EncodersSection
    output: StoreSection
    supervision: WaitingSection = WaitingSection()


class ExtractionRun(ExtractionSections, Run):
    """An extraction."""

    sections: ClassVar = ExtractionSections

    @property
    def task(self) -> Task:
        """Task that the features are for."""
        return FEATURE_TASKS[self.extraction.task]
