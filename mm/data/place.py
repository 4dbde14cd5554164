"""Places of samples: where features lie, or of which clip they are yet to be made."""

from __future__ import annotations

from dataclasses import dataclass

from mm.config.run.extraction import SourceClip
from mm.config.storage import Location
from mm.config.tasks.task import Media
from mm.data.features import Origin
from mm.data.metadata import VideoSample
from mm.data.store.blobs import Blob
from mm.data.store.shard import LatentShape


@dataclass(frozen=True, slots=True)
class FeaturePlace:
    """All that is needed to read one sample, small enough to be sent to another process.

    Attributes:
        folder, file: the store and the file below it.
        blobs: of a store of shards, where the sample and its caption's embedding are in such files.
        sample, recipe_key: what the file must say of itself.
        latent_shape: as listed.
    """

    folder: Location
    file: str
    sample: str
    recipe_key: str
    latent_shape: LatentShape
    blobs: tuple[Blob, Blob] | None = None

    def __str__(self) -> str:
        return str(self.folder / self.file)


@dataclass(frozen=True, slots=True)
class ClipPlace:
    """All that is needed to read the clip of a sample whose features are made when they are asked for.

    Attributes:
        folder: the store that its features belong to.
        sample, draw: whose clip, and which of them. clip, seed: what is taken of the video.
        caption: that goes with it. origin: what its features will say of themselves. latent_shape: that they will have.
        row: of the sample in the store. media: that the task takes beside the clip.
    """

    folder: Location
    sample: VideoSample
    draw: int
    clip: SourceClip
    seed: int
    caption: str
    origin: Origin
    latent_shape: LatentShape
    row: int
    media: tuple[Media, ...] = ()

    def __str__(self) -> str:
        return self.sample.where


Place = FeaturePlace | ClipPlace
