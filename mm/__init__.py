"""Parallel training of Wan2.1 video diffusion transformers. Importing this package alone imports no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # they need torch, and are imported when they are first asked for
    from mm.api import (
        Converted,
        Encoders,
        Experts,
        ModelConfig,
        Residency,
        SamplingOptions,
        TrainingResult,
        VideoRow,
        WanVideoPipeline,
        convert_weights,
        extract_features,
        generate_videos,
        inspect_weights,
        load_experts,
        load_model,
        save_video,
        train_model,
    )

__version__ = "0.1.0"

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


def __getattr__(name: str) -> Any:
    """The functions and types of `mm.api` by their names."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("mm.api"), name)
