"""MindSpeed-MM's JSON files of extraction and training, read and checked each by itself.

What values mean together is asked of the sections that they become (`mm.config.rules`).
"""

from __future__ import annotations

from pathlib import Path

from mm.dialects.mindspeed.accepted import Note
from mm.dialects.mindspeed.data_json import ExtractData, TrainData
from mm.dialects.mindspeed.extract_files import ExtractModel, ExtractTools
from mm.dialects.mindspeed.pretrain_json import PretrainModel
from mm.dialects.mindspeed.reading import Reading, alone
from mm.dialects.mindspeed.retired_data import RETIRED, RETIRED_IN_EXTRACTION, RETIRED_IN_TRAINING


def read_extract_data(path: str, reading: Reading) -> ExtractData:
    """data.json of feature extraction, of which what cannot be read is `UNREAD` and told to `reading`."""
    return reading.file(ExtractData, path, "data.json", RETIRED | RETIRED_IN_EXTRACTION)


def read_train_data(path: str, reading: Reading) -> TrainData:
    """feature_data.json of training; see `read_extract_data`."""
    return reading.file(TrainData, path, "feature_data.json", RETIRED | RETIRED_IN_TRAINING)


def read_pretrain_model(path: str, reading: Reading) -> PretrainModel:
    """pretrain_model.json; see `read_extract_data`."""
    return reading.file(PretrainModel, path, "pretrain_model.json")


def read_extract_model(path: str, reading: Reading) -> ExtractModel:
    """model_wan.json; see `read_extract_data`."""
    return reading.file(ExtractModel, path, "model_wan.json")


def read_extract_tools(path: str, reading: Reading) -> ExtractTools:
    """tools.json; see `read_extract_data`."""
    return reading.file(ExtractTools, path, "tools.json")


def load_extract_data(path: Path, notes: list[Note] | None = None) -> ExtractData:
    """data.json of feature extraction by itself.

    Args:
        path: the file. notes: gets what is taken as it is done here anyway, and what goes by another name here.

    Raises:
        ConfigError: what `mm.config.base.load` raises, CFG-008 for a field of MindSpeed-MM that has no effect here;
            all at once.
    """
    return alone(lambda reading: read_extract_data(str(path), reading), notes)


def load_train_data(path: Path, notes: list[Note] | None = None) -> TrainData:
    """feature_data.json of training; takes and raises what `load_extract_data` does."""
    return alone(lambda reading: read_train_data(str(path), reading), notes)
