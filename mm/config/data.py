"""What the two data files say: `data.json` of feature extraction and `feature_data.json` of training.

Names and nesting are MindSpeed-MM's. A field exists only where it has an effect, or where the one thing done here may
be said out loud; the fields of MindSpeed-MM that are left out are errors that say what to do instead.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from mm.config.base import Section
from mm.config.path_line import LineError, read_paths, write_paths
from mm.errors import ConfigError, Problem, raise_all

TEMPORAL_STRIDE = 4  # frames per latent frame of the Wan VAE, after a first frame that stands alone
LATENT_PIXELS = 8  # pixels per latent pixel
SIZE_MULTIPLE = 2 * LATENT_PIXELS  # 2 latent pixels per token
NOT_WITH_DECORD = "read with PyAV and not with decord, since nothing proves that decord gives the same frames"
MAX_TEXT_TOKENS = 512  # tokens of text that Wan2.1 was trained with


class BasicParameters(Section):
    """Where the data are.

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
    """`data_storage_mode` sorafeatured: the folders that feature extraction wrote."""

    data_storage_mode: Literal["sorafeatured"] = "sorafeatured"


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
    """

    cfg: float = Field(0.0, ge=0, le=1)

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """F, H, W of the latents of the largest clip."""
        frames = (self.num_frames - 1) // TEMPORAL_STRIDE + 1
        return frames, self.max_height // LATENT_PIXELS, self.max_width // LATENT_PIXELS


class TokenizerConfig(Section):
    """The tokenizer. In training it is optional and only compared with the one the features were made with.

    Attributes:
        from_pretrained: folder of the tokenizer.
        model_max_length: tokens after which a caption is cut.
    """

    hub_backend: Literal["hf"] = "hf"
    autotokenizer_name: Literal["AutoTokenizer"] = "AutoTokenizer"
    from_pretrained: str = Field(min_length=1)
    model_max_length: int = Field(MAX_TEXT_TOKENS, ge=1, le=MAX_TEXT_TOKENS)


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
    """How training walks through the features.

    Attributes:
        shuffle: a new order each epoch, drawn from the seed; otherwise the order of data.jsonl.
        pin_memory: copy batches into page-locked memory, for faster transfers to an accelerator.
    """

    shuffle: bool = True
    pin_memory: bool = False


class ExtractData(Section):
    """`feature_extract/data.json`."""

    dataset_param: RawDataset


class TrainData(Section):
    """`{size}/{task}/feature_data.json`."""

    dataset_param: FeatureDatasetParam
    dataloader_param: DataloaderParam = DataloaderParam()


@dataclass(frozen=True)
class DataSource:
    """One data set: the folder its paths start from and the file that lists its samples."""

    folder: Path
    annotation: Path


def data_sources(basic: BasicParameters, default_annotation: str | None = None) -> list[DataSource]:
    """The data sets that `basic_parameters` names, in order.

    A `.txt` file has one data set a line, `folder,annotation` in the form of `mm.config.path_line`; lines that begin
    with `#` are comments. An annotation without a folder part lies in the data set's folder; all other paths are used
    as they stand, relative ones from the current directory.

    Args:
        basic: the section.
        default_annotation: name of the annotation file for lines that give a folder only.

    Raises:
        ConfigError: CFG-001 when the list cannot be read, CFG-054 for every line that is not of that form.
    """
    path = Path(basic.data_path)
    if path.suffix != ".txt":
        return [DataSource(Path(basic.data_folder or "."), path)]
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: names may hold other line ends
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "CFG-001", f"{path} cannot be read ({error}).", "Check the path and its permissions."
        ) from None
    counts = (1, 2) if default_annotation else (2,)
    sources: list[DataSource] = []
    problems: list[Problem] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            words = read_paths(line, counts, lambda words: _are_there(words, default_annotation))
            sources.append(_source(words, default_annotation))
        except LineError as error:
            problems.append(_malformed_line(f"{path} line {number} is {line!r}; it {error}", default_annotation))
    if not sources and not problems:
        problems.append(Problem("CFG-054", f"{path} names no data set.", "Give one line a data set: folder,file."))
    raise_all(ConfigError, problems)
    return sources


def data_source_line(folder: Path, annotation: str | None = None) -> str:
    """A line of a list that `data_sources` reads as this data set, whatever characters its paths hold.

    Raises:
        ConfigError: CFG-130 for a path that no line can hold.
    """
    return write_paths([str(folder)] if annotation is None else [str(folder), annotation])


def _source(words: tuple[str, ...], default_annotation: str | None) -> DataSource:
    folder, annotation = Path(words[0]), Path(words[1] if len(words) > 1 else default_annotation or "")
    return DataSource(folder, folder / annotation if len(annotation.parts) == 1 else annotation)


def _are_there(words: tuple[str, ...], default_annotation: str | None) -> bool:
    source = _source(words, default_annotation)
    return os.path.isdir(source.folder) and (len(words) == 1 or os.path.exists(source.annotation))


def _malformed_line(found: str, default_annotation: str | None) -> Problem:
    expected = f"folder or folder,{default_annotation}" if default_annotation else "folder,annotation.json"
    remedy = 'Correct the line; a path with a comma goes into double quotes, "/a, b",data.json.'
    return Problem("CFG-054", f"{found}. Expected is {expected}.", remedy)
