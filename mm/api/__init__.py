"""Functions and types that Python users import, from here or from `mm`.

They return values, write nothing that they are not told to, and need no process group for one process. The commands are
thin over the same rooms.
"""

from mm.api.encoders import Encoders
from mm.api.experts import Experts, load_experts
from mm.api.features import VideoRow, extract_features
from mm.api.generation import generate_videos
from mm.api.model import load_model
from mm.api.model_config import ModelConfig
from mm.api.saved_video import save_video
from mm.api.training import TrainingResult, train_model
from mm.api.wan_video_pipeline import WanVideoPipeline
from mm.api.weights import Converted, convert_weights, inspect_weights
from mm.config.run.residency import Residency
from mm.generate.sampling import SamplingOptions

__all__ = [
    "Converted",
    "Encoders",
    "Experts",
    "ModelConfig",
    "Residency",
    "SamplingOptions",
    "TrainingResult",
    "VideoRow",
    "WanVideoPipeline",
    "convert_weights",
    "extract_features",
    "generate_videos",
    "inspect_weights",
    "load_experts",
    "load_model",
    "save_video",
    "train_model",
]
