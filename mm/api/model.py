"""Weights of any format as a model on one device."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from mm.checkpoint.mismatch import require_exactly
from mm.checkpoint.weights import WeightSource, open_weights
from mm.config.model import Precision, WanConfig
from mm.config.run.generation import AdapterFile
from mm.config.tasks.registry import TaskName
from mm.device.backend import DeviceKind, select
from mm.errors import ConfigError
from mm.generate.weights import GenerationWeights, with_adapters
from mm.wan.config_json import infer_config
from mm.wan.encoders import DTYPES
from mm.wan.model import WanModel, whole_shapes


def load_model(
    path: str | Path,
    *,
    dtype: Precision = "bf16",
    device: DeviceKind | None = None,
    task: TaskName | None = None,
    adapters: Iterable[str | Path | tuple[str | Path, float]] = (),
    text_len: int | None = None,
    averaged: bool = False,
) -> WanModel:
    """Load a transformer, ready for `model.velocity(latents=, timestep=, text=, **features)`.

    Its parameters need no gradient; `model.requires_grad_()` changes that.

    Args:
        path: a Hugging Face or native folder or file, the folder of a whole diffusers model, an MM folder, or a run's
            checkpoints.
        dtype: of the parameters, except those that stay fp32 (`mm.wan.precision`).
        device: kind of device; None takes the best there is.
        task: what the weights must be for; None takes what they say.
        adapters: LoRA files or folders that are added, each alone or with a factor on it.
        text_len: tokens that captions are padded to, where it is not the 512 of the released models.
        averaged: of a training checkpoint the average of its weights (`--ema-decay`).

    Returns:
        The model in evaluation mode.

    Raises:
        ConfigError: CFG-030 and CFG-180 for the device, CFG-201 for weights of another task.
        CheckpointError, DataError: what `mm.checkpoint.weights.open_weights` raises, CKPT-011 for tensors of another
            model, DATA-090 to DATA-093 for adapters.
    """
    inside = Path(path) / "transformer"
    source = open_weights(inside if inside.is_dir() else path, averaged=averaged)
    pairs = [one if isinstance(one, tuple) else (one, 1.0) for one in adapters]
    sections = [AdapterFile(path=str(one), strength=strength) for one, strength in pairs]
    config = config_of(source, task, text_len)
    weights = with_adapters(source, sections, config, DTYPES[dtype], fingerprinted=False)
    return model_of(weights, config, DTYPES[dtype], select(device).device)


def config_of(source: WeightSource, task: TaskName | None = None, text_len: int | None = None) -> WanConfig:
    """Configuration of weights that are a whole model.

    Raises:
        ConfigError: CFG-201 for weights of another task than `task`.
        CheckpointError: CKPT-011 for tensors of another model.
    """
    config = source.config() or infer_config(source.shapes(), source.path)
    if task is not None and config.task.name != task:
        found = f"{source.path} holds weights of {config.task.name}, and task is {task}."
        raise ConfigError("CFG-201", found, "Name other weights, or leave task out.")
    if text_len is not None:
        config = WanConfig.model_validate({**config.model_dump(), "text_len": text_len})
    require_exactly(source, whole_shapes(config))
    return config


def model_of(weights: GenerationWeights, config: WanConfig, dtype: torch.dtype, device: torch.device) -> WanModel:
    """A model in evaluation mode with these weights, which need no gradient; one tensor at a time is read."""
    with torch.device("meta"):
        model = WanModel(config)
    model.to_precision(dtype).requires_grad_(False).to_empty(device=device)
    for name, parameter in model.named_parameters():
        parameter.copy_(weights.value_of(name, tuple(parameter.shape)))
    return model.eval()
