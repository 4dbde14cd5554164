"""Weights of any format as a model on one device."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mm.checkpoint.mismatch import require_exactly
from mm.checkpoint.weights import WeightSource, open_weights
from mm.config.model import Precision, WanConfig
from mm.config.place import process_place
from mm.config.rules.residency import residency_problems
from mm.config.run.experts import HIGH, LOW
from mm.config.run.generation import AdapterFile, latent_size
from mm.config.run.residency import Residency
from mm.config.tasks.registry import TaskName
from mm.device.backend import Backend, DeviceKind, select
from mm.errors import ConfigError, raise_all
from mm.generate.weights import GenerationWeights, with_adapters
from mm.ops.attention.sage import open_sage
from mm.parallel.apply import ValueOf, WriteValue
from mm.residency.budget import Room, forward_bytes, plan_weights
from mm.residency.hold import WeightValues, hold_weights
from mm.wan.config_json import infer_config
from mm.wan.encoders import DTYPES
from mm.wan.layers import ModuleFactories, self_attention
from mm.wan.model import WanModel, whole_shapes

log = logging.getLogger(__name__)


def load_model(
    path: str | Path,
    *,
    dtype: Precision = "bf16",
    device: DeviceKind | None = None,
    task: TaskName | None = None,
    adapters: Iterable[str | Path | tuple[str | Path, float]] = (),
    text_len: int | None = None,
    averaged: bool = False,
    attention: Literal["exact", "sage"] = "exact",
    residency: Residency | None = None,
    clip: tuple[int, int, int] | None = None,
    batch_size: int = 1,
) -> WanModel:
    """Load a transformer, ready for `model.velocity(latents=, timestep=, text=, **features)`.

    Its parameters need no gradient; `model.requires_grad_()` changes that.

    Args:
        path: a Hugging Face or native folder or file, the folder of a whole diffusers model (of one with two experts
            that for much noise; `load_experts` loads both), an MM folder, or a run's checkpoints.
        dtype: of the parameters, except those that stay fp32 (`mm.wan.precision`).
        device: kind of device; None takes the best there is.
        task: what the weights must be for; None takes what they say.
        adapters: LoRA files or folders that are added, each alone or with a factor on it.
        text_len: tokens that captions are padded to, where it is not the 512 of the released models.
        averaged: of a training checkpoint the average of its weights (`--ema-decay`).
        attention: of the video's tokens to each other: exact, or by SageAttention in 8 bits, for inference alone.
        residency: where the weights are; None puts all of them on the device. With limits the model is for forwards
            without gradients.
        clip: frames, height and width of a clip whose forward the device limit has room for, too; None plans for
            weights alone, and leaves the rest to the limit's buffer. batch_size: such clips in one forward.

    Returns:
        The model in evaluation mode.

    Raises:
        ConfigError: CFG-371 to CFG-374 for limits that contradict each other or cannot be kept, CFG-030 and CFG-180 for
            the device, CFG-201 for weights of another task, CFG-324 and CFG-325 for SageAttention where it is not.
        CheckpointError, DataError: what `mm.checkpoint.weights.open_weights` raises, CKPT-011 for tensors of another
            model, DATA-090 to DATA-093 for adapters.
    """
    how = Placing(dtype, device, residency or Residency(), clip, batch_size, attention)
    how.check()
    return how.place(*opened(path, adapters, how, task, text_len, averaged=averaged), how.room())


@dataclass(frozen=True)
class Placing:
    """Way in which transformers come to one device.

    Attributes:
        dtype, device, residency, clip, batch_size, attention: as for `load_model`.
    """

    dtype: Precision
    device: DeviceKind | None
    residency: Residency
    clip: tuple[int, int, int] | None = None
    batch_size: int = 1
    attention: Literal["exact", "sage"] = "exact"

    def check(self) -> None:
        """Raise ConfigError, CFG-371 and CFG-372, for limits that contradict each other or have no effect."""
        raise_all(ConfigError, list(residency_problems(self.residency, lambda field: f"residency.{field}")))

    def room(self, transformers: int = 1) -> Room:
        """Memory for so many transformers, before any is held."""
        return Room.now(process_place().local_world_size, transformers=transformers)

    def place(self, weights: GenerationWeights, config: WanConfig, room: Room) -> WanModel:
        """The model of weights from `opened`; raises as `load_model`."""
        dtype = DTYPES[self.dtype]
        if self.clip is not None:
            tokens = config.num_tokens(latent_size(self.clip, config.task.latent_pixels))
            room = replace(room, beside=room.beside + forward_bytes(config, tokens, self.batch_size, dtype.itemsize))
        backend, parts = select(self.device), None
        if self.attention == "sage":
            parts = ModuleFactories(self_attention=partial(self_attention, attend=open_sage(backend.device, dtype)))
        return model_of(weights, config, dtype, backend, self.residency, room, parts=parts)


def opened(
    path: str | Path,
    adapters: Iterable[str | Path | tuple[str | Path, float]],
    how: Placing,
    task: TaskName | None,
    text_len: int | None,
    *,
    averaged: bool = False,
) -> tuple[GenerationWeights, WanConfig]:
    """Weights with adapters, and the model that they are of; the arguments and errors are those of `load_model`."""
    inside = Path(path) / HIGH
    if inside.is_dir() and (Path(path) / LOW).is_dir():
        log.warning("%s has two experts, of which that for much noise is loaded; load_experts loads both.", path)
    source = open_weights(inside if inside.is_dir() else path, averaged=averaged)
    pairs = [one if isinstance(one, tuple) else (one, 1.0) for one in adapters]
    sections = [AdapterFile(path=str(one), strength=strength) for one, strength in pairs]
    config = config_of(source, task, text_len)
    dtype = DTYPES[how.dtype]
    return with_adapters(source, sections, config, dtype, fingerprinted=False, fp8=how.residency.fp8), config


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


def model_of(
    weights: GenerationWeights,
    config: WanConfig,
    dtype: torch.dtype,
    backend: Backend,
    residency: Residency,
    room: Room,
    *,
    parts: ModuleFactories | None = None,
) -> WanModel:
    """A model in evaluation mode with these weights, which need no gradient; one tensor at a time is read.

    Args:
        weights: of the model, in fp8 where `residency` says so. config: the model. dtype: of the bulk of the weights.
        backend: the device. residency: where they are, checked. room: memory for them. parts: as for `WanModel`.

    Raises:
        ConfigError: CFG-373 and CFG-374 for limits that cannot be kept.
    """
    with torch.device("meta"):
        model = WanModel(config, parts)
    model.to_precision(dtype).requires_grad_(False)
    if weights.fp8 is not None:
        weights.fp8.prepare(model)
    plan = plan_weights(model, residency, room)
    hold_weights(model, plan, backend, WeightValues(_writer(weights.value_of), _writer(weights.again())))
    return model.eval()


def _writer(value_of: ValueOf) -> WriteValue:
    """Writer of whole parameters."""

    def write(name: str, target: Tensor) -> None:
        target.copy_(value_of(name, tuple(target.shape)))

    return write
