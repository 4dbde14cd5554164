"""Types of open stores: what a data set asks of one, whatever holds its samples."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypedDict

from torch import Tensor

from mm.config.model import WanConfig
from mm.config.storage import Location
from mm.data.listing import Digest, LatentShape, ListedSample, RowsOfDraw
from mm.data.place import ClipPlace, Place
from mm.data.store.blobs import Blob

if TYPE_CHECKING:  # libraries that decode, which few trainings need
    from mm.data.clips import Clip


class SampleTensors(TypedDict):
    """Tensors that a feature file gives training: latents [16, F, H, W], prompt [L, D], the task's features by name."""

    latents: Tensor
    prompt: Tensor
    features: dict[str, Tensor]


class Store(Protocol):
    """A store of features, open; its samples are told by their rows 0, 1, ....

    Attributes:
        folder: it. recipe_key: of its recipe. draws: of each sample.
    """

    @property
    def folder(self) -> Location:
        """The folder."""

    @property
    def recipe_key(self) -> str:
        """The key of its recipe."""

    @property
    def draws(self) -> int:
        """Draws of each sample."""

    def __len__(self) -> int: ...

    def name(self, row: int) -> str:
        """The sample's id."""

    def latent_shape(self, row: int) -> LatentShape:
        """Shape (C, F, H, W) of the sample's latents."""

    def text_tokens(self, row: int) -> int:
        """Tokens of the sample's caption."""

    def listed(self, row: int) -> ListedSample:
        """The sample's video, caption and clip."""

    def place(self, row: int) -> Place:
        """Place of the sample."""

    def of_draw(self, draw: int) -> RowsOfDraw:
        """The rows of one draw."""

    def shapes(self) -> Counter[LatentShape]:
        """Number of samples with each latent shape, in the order of the shapes' first samples."""

    def add_identity(self, digest: Digest) -> None:
        """Feed the names, clips, captions and videos of all samples to a digest."""

    def empty_prompt(self) -> Path | Blob | None:
        """Place of the empty caption's embedding."""


class MakingStore(Store, Protocol):
    """A store whose features are made when they are asked for."""

    def place_again(self, row: int, lost: Place) -> Place | None:
        """Another place of a sample whose features cannot be read from one; None where there is none."""

    def make(self, place: ClipPlace, clip: Clip, model: WanConfig) -> SampleTensors:
        """Features of a clip."""

    @property
    def clip_bytes(self) -> int:
        """The most bytes that a clip's pixels take."""
