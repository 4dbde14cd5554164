"""The section `data`: which features are trained on, and how they become batches."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mm.config.base import Section
from mm.config.data import TEMPORAL_STRIDE
from mm.config.run.encoders import TokenizerSection
from mm.config.run.shapes import ShapeRule
from mm.config.storage import Storage


class Clip(Section):
    """The clip that one sample is.

    Attributes:
        num_frames: frames, 4k + 1. frame_interval: every how-manieth frame of the video is taken.
        height, width: pixels, one size for all samples.
        shape: a rule for the size of each sample, in place of `height` and `width`; `num_frames` are then the most.
    """

    num_frames: int = Field(ge=1)
    frame_interval: int = Field(1, ge=1)
    height: int | None = Field(None, ge=1)
    width: int | None = Field(None, ge=1)
    shape: ShapeRule | None = Field(None, discriminator="rule")

    @property
    def fixed_size(self) -> tuple[int, int]:
        """Height and width, where there is no rule."""
        if self.height is None or self.width is None:
            raise ValueError("the clip has no fixed size")
        return self.height, self.width

    def latent_size(self, latent_pixels: int) -> tuple[int, int, int] | None:
        """F, H, W of the latents, whose pixels stand for so many rows; None where they have several sizes."""
        if self.shape is not None:
            return None
        height, width = self.fixed_size
        return (self.num_frames - 1) // TEMPORAL_STRIDE + 1, height // latent_pixels, width // latent_pixels


class FeatureSet(Section):
    """Features that extraction wrote.

    Attributes:
        path: a `.txt` list of their folders and addresses, one address (`s3://...`), or one listing (`.json`,
            `.jsonl`).
        folder: folder that the listing's paths start from; only with a listing.
        clip: what they must have been made of, checked against their recipe; None takes them as they are.
        tokenizer: compared with the one that they were made with; None compares nothing.
        storage: how those in object storage are read.
    """

    path: str = Field(min_length=1)
    folder: str | None = Field(None, min_length=1)
    clip: Clip | None = None
    tokenizer: TokenizerSection | None = None
    storage: Storage = Storage()


MinBucket = Literal["error", "drop", "repeat"]


class SourceShare(Section):
    """Share of one feature store in training.

    Attributes:
        folder: the store, as the list of features names it.
        repeats: passes over its samples in an epoch of all.
        weight: factor on its share by size; 2 gives twice as many of its samples.
        micro_batch_size: samples in a micro-batch of it; None takes the run's.
        begin_step, end_step: steps before the first and after the last that may take its samples.
        begin_epoch, end_epoch: epochs of the mixture (`mm.data.plan`) before the first and after the last that may;
            where steps are said too, both must allow it.
    """

    folder: str = Field(min_length=1)
    repeats: int = Field(1, ge=1, le=10**9 + 1)
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    micro_batch_size: int | None = Field(None, ge=1)
    begin_step: int = Field(0, ge=0)
    end_step: int | None = Field(None, ge=1)
    begin_epoch: int = Field(0, ge=0, le=10**9)
    end_epoch: int | None = Field(None, ge=1, le=10**9)

    @property
    def is_timed(self) -> bool:
        """True where some steps may not take its samples."""
        return bool(self.begin_step or self.begin_epoch) or self.end_step is not None or self.end_epoch is not None


class Mixture(Section):
    """Shares of feature stores in training. Stores that no share names have one of the defaults.

    Attributes:
        shares: none takes all stores as one source.
    """

    shares: tuple[SourceShare, ...] = ()

    def sizes(self, micro_batch_size: int) -> set[int]:
        """Samples of micro-batches of all shares, where the run's have so many; of stores without a share too."""
        return {micro_batch_size, *(share.micro_batch_size or micro_batch_size for share in self.shares)}


class ConditionDropout(Section):
    """Shares of samples that are trained without a condition, each drawn by itself; zeros take its place.

    Attributes:
        control: of the control video. start: of the start image. reference: of the reference image.
        image: of the image encoder's features.
    """

    control: float = Field(0.0, ge=0, le=1)
    start: float = Field(0.0, ge=0, le=1)
    reference: float = Field(0.0, ge=0, le=1)
    image: float = Field(0.0, ge=0, le=1)

    @property
    def rates(self) -> dict[str, float]:
        """Those that are above zero."""
        return {name: rate for name in type(self).model_fields if (rate := getattr(self, name))}


class DataSection(Section):
    """Walk of training through the features.

    Attributes:
        features: which. caption_dropout: share of samples that are trained with the empty caption.
        condition_dropout: shares of those that are trained without what the task has beside it.
        shuffle: a new order each epoch, drawn from the seed; otherwise the order of the listing.
        mixture: shares of the stores.
        min_bucket: what becomes of samples of a shape of which a store has fewer than a micro-batch takes: an `error`;
            `drop` leaves them out; `repeat` puts some into one micro-batch more than once.
        micro_batch_size: samples in one forward of one replica.
        pack_tokens: puts samples of any shapes into sequences of at most so many tokens, a micro-batch each; padding
            is not counted.
        pair_cost: cost of a pair of tokens by that of a token, by which micro-batches are dealt to replicas; None takes
            the operations of the model. `mm doctor costs` measures it.
        global_batch_size: samples in one step of all replicas; None means one micro-batch for each of them.
        workers: feature-reading processes for each rank. read_timeout: seconds to read a micro-batch.
        on_bad_sample: `fail`, or `skip:max=0.1%` of the samples, each replaced by the next.
        pin_memory: copy batches into page-locked memory, for faster transfers to an accelerator.
    """

    features: FeatureSet
    caption_dropout: float = Field(0.0, ge=0, le=1)
    condition_dropout: ConditionDropout = ConditionDropout()
    shuffle: bool = True
    mixture: Mixture = Mixture()
    min_bucket: MinBucket = "error"
    micro_batch_size: int = Field(1, ge=1)
    pack_tokens: int | None = Field(None, ge=1)
    pair_cost: float | None = Field(None, ge=0, allow_inf_nan=False)
    global_batch_size: int | None = Field(None, ge=1)
    workers: int = Field(2, ge=0)
    read_timeout: float = Field(600.0, gt=0)
    on_bad_sample: str = "fail"
    pin_memory: bool = False
