"""A command line of `mm train` as a run, without files on disk."""

from typing import Any

from mm.config.base import parse
from mm.config.flags import parse_flags
from mm.config.layerzero import ZeroConfig
from mm.config.run.training import TrainingRun
from mm.dialects.mindspeed.data_json import TrainData
from mm.dialects.mindspeed.pretrain_json import PretrainModel
from mm.dialects.mindspeed.retired_flags import RETIRED_TRAIN_FLAGS
from mm.dialects.mindspeed.train_flags import TrainFlags
from mm.dialects.mindspeed.training import TrainFiles, translate

SHAPE = {"hidden_size": 48, "ffn_dim": 64, "num_heads": 4, "num_layers": 4}
CLIP = {"num_frames": 9, "max_height": 64, "max_width": 64}


def data_file(**preprocess: Any) -> TrainData:
    param = {
        "dataset_type": "t2v",
        "basic_parameters": {"data_path": "features.txt"},
        "preprocess_parameters": {**CLIP, **preprocess},
    }
    return parse(TrainData, {"dataset_param": param}, "d.json")


def model_file(**predictor: Any) -> PretrainModel:
    return parse(PretrainModel, {"predictor": {**SHAPE, **predictor}, "diffusion": {}}, "m.json")


def train_flags(words: str) -> TrainFlags:
    required = "--mm-data d.json --mm-model m.json"
    return parse_flags(TrainFlags, f"{required} {words}".split(), program="mm train", retired=RETIRED_TRAIN_FLAGS)


def translated(
    words: str | TrainFlags,
    model: PretrainModel | None = None,
    zero: ZeroConfig | None = None,
    world_size: int = 1,
    held_out: TrainData | None = None,
) -> TrainingRun:
    flags = train_flags(words) if isinstance(words, str) else words
    return translate(flags, TrainFiles(model or model_file(), data_file(), zero, held_out), world_size)
