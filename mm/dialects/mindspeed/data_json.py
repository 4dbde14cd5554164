"""Sections of the two data files: `data.json` of feature extraction and `feature_data.json` of training.

A field exists only where it has an effect, or where the one thing done here may be said out loud; the fields of
MindSpeed-MM that are left out are errors that say what to do instead.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mm.config.base import Section
from mm.config.run.data import ConditionDropout, Mixture
from mm.config.storage import Storage
from mm.dialects.mindspeed.encoder_json import TokenizerConfig


class BasicParameters(Section):
    """Place of the data.

    Attributes:
        data_path: a `.txt` list of data sets, or one annotation file (`.json`, `.jsonl`).
        data_folder: folder that the annotation's paths start from; only with an annotation file.
    """

    data_path: str = Field(min_length=1)
    data_folder: str | None = Field(None, min_length=1)


class RawParameters(BasicParameters):
    """`data_storage_mode` combine: annotations beside videos."""

    data_storage_mode: Literal["combine"] = "combine"


class FeatureParameters(BasicParameters):
    """`data_storage_mode` sorafeatured: the folders that feature extraction wrote.

    Attributes:
        storage: how stores in object storage are read; a key of this project's own.
    """

    data_storage_mode: Literal["sorafeatured"] = "sorafeatured"
    storage: Storage = Storage()


class Preprocess(Section):
    """The clip that becomes one training sample.

    Attributes:
        num_frames: frames of a clip, 4k + 1. A longer video gives one contiguous clip at a start drawn from the seed.
        frame_interval: every how-manieth frame of the video is taken.
        max_height, max_width: pixels; every clip is resized to cover this size and cropped to its centre.
    """

    num_frames: int = Field(ge=1)
    frame_interval: int = Field(1, ge=1)
    max_height: int = Field(ge=1)
    max_width: int = Field(ge=1)


class RawPreprocess(Preprocess):
    """`preprocess_parameters` of feature extraction.

    Attributes:
        min_num_frames: the fewest frames to accept from a short video, which is then cut to the largest 4k + 1;
            without it, a video shorter than `num_frames` is an error.
        video_reader_type: `auto` and `pyav` read with PyAV; `decord` reads with decord those videos of which a check
            proves that it gives the same frames, and the others with PyAV, which is told.
    """

    min_num_frames: int | None = Field(None, ge=1)
    video_reader_type: Literal["auto", "decord", "pyav"] = "auto"


class FeaturePreprocess(Preprocess):
    """`preprocess_parameters` of training: what the features must have been made with, checked against their recipe.

    Attributes:
        cfg: probability that a sample is trained with the empty caption, which classifier-free guidance needs.
        condition_dropout: probabilities that it is trained without its `control` video, its `start` or `reference`
            image, or the `image` encoder's features; a key of this project's own.
    """

    cfg: float = Field(0.0, ge=0, le=1)
    condition_dropout: ConditionDropout = ConditionDropout()


class RawDataset(Section):
    """`dataset_param` of feature extraction."""

    dataset_type: Literal["t2v"]
    basic_parameters: RawParameters
    preprocess_parameters: RawPreprocess
    use_text_processer: Literal[True] = True
    enable_text_preprocessing: Literal[True] = True
    tokenizer_config: TokenizerConfig


class FeatureDatasetParam(Section):
    """`dataset_param` of training."""

    dataset_type: Literal["t2v"]
    basic_parameters: FeatureParameters
    preprocess_parameters: FeaturePreprocess
    tokenizer_config: TokenizerConfig | None = None


class DataloaderParam(Section):
    """Walk of training through the features.

    Attributes:
        shuffle: a new order each epoch, drawn from the seed; otherwise the order of data.jsonl.
        pin_memory: copy batches into page-locked memory, for faster transfers to an accelerator.
        mixture: shares of the stores that data_path lists; a key of this project's own.
    """

    shuffle: bool = True
    pin_memory: bool = False
    mixture: Mixture = Mixture()


class ExtractData(Section):
    """`feature_extract/data.json`."""

    dataset_param: RawDataset


class TrainData(Section):
    """`{size}/{task}/feature_data.json`."""

    dataset_param: FeatureDatasetParam
    dataloader_param: DataloaderParam = DataloaderParam()
