"""Start point for another task, made of a model that has less: the same weights, and beside them what is new.

New input channels of the patch embedding get weights of zero, behind those that are there, so that a model that is
given nothing there begins as the one it was made of. New modules begin as those of a model that is trained from scratch
(`mm.wan.initial`): which bits is a function of the seed and the names. Without weights that the new task has no place
for, nothing is made: what would be left out is named.

VideoX-Fun does the first of these by itself, when a config.json says more channels than the weights have.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from mm.checkpoint.convert import known_config
from mm.checkpoint.formats.source import TensorKind, WeightSource
from mm.checkpoint.mismatch import require_exactly
from mm.checkpoint.weights import open_weights
from mm.config.model import WanConfig, of_task
from mm.config.tasks.registry import TASKS
from mm.config.tasks.task import Task
from mm.errors import CheckpointError
from mm.wan.initial import initial_value
from mm.wan.model import whole_shapes

log = logging.getLogger(__name__)

_PATCHES = "patch_embedding.weight"


@dataclass(frozen=True)
class WidenedWeights:
    """`WeightSource` over a model with what another task adds, one tensor at a time.

    Attributes:
        source: the model. wide: shape of the new one. seed: of the values of new modules.
    """

    source: WeightSource
    wide: WanConfig
    seed: int

    @property
    def path(self) -> Path:
        """Path of the model that it is made of."""
        return self.source.path

    @property
    def label(self) -> str:
        """The format of that model."""
        return f"{self.source.label}, made wider"

    def kinds(self) -> dict[str, TensorKind]:
        """Those of the source, the patch embedding's with more channels; new ones have the patch embedding's dtype."""
        return self._kinds

    @cached_property
    def _kinds(self) -> dict[str, TensorKind]:
        found = self.source.kinds()
        dtype = found[_PATCHES].dtype if found[_PATCHES].dtype.itemsize > 1 else torch.bfloat16
        return {
            name: TensorKind(shape, found[name].dtype if name in found else dtype)
            for name, shape in whole_shapes(self.wide).items()
        }

    @cached_property
    def _there(self) -> Collection[str]:
        return self.source.shapes().keys()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Those of the new model."""
        return {name: kind.shape for name, kind in self._kinds.items()}

    def read(self, name: str) -> Tensor:
        """One tensor: the source's, with zeros for new channels, or a new one."""
        kind = self._kinds[name]
        if name not in self._there:
            return initial_value(name, kind.shape, self.seed).to(kind.dtype)
        there = self.source.read(name)
        if name != _PATCHES:
            return there
        wide = torch.zeros(kind.shape, dtype=torch.float32).to(kind.dtype)
        wide[:, : there.shape[1]] = there
        return wide

    def config(self) -> WanConfig:
        """Configuration of the new model."""
        return self.wide

    def log_what_is_new(self) -> None:
        """Say which weights are not the source's."""
        before, after = self.source.shapes(), self.shapes()
        own, narrow, wide = known_config(self.source), before[_PATCHES][1], after[_PATCHES][1]
        if wide > narrow:
            log.info("patch_embedding has %d input channels in place of %d; the new ones are zero.", wide, narrow)
        if wide > narrow and own.condition_channels:
            kept = f"channels {own.noise_channels} to {narrow - 1}"
            message = "%s keep what %s models have learned for %s, and mean another thing in %s models."
            log.warning(message, kept, own.task.name, "their condition", self.wide.task.name)
        new = Counter(_module(name) for name in after.keys() - before.keys())
        listed = ", ".join(f"{name} ({count})" for name, count in sorted(new.items()))
        if new:
            log.info("%d tensors are new, with initial values of seed %d: %s.", new.total(), self.seed, listed)


def widened(source_path: Path, task: Task, seed: int, *, averaged: bool = False) -> WidenedWeights:
    """Open a model as the start point for another task.

    Args:
        source_path: weights of any format. task: without side blocks. seed: of the values of new modules.
        averaged: take the average of a training checkpoint's weights.

    Raises:
        CheckpointError: CKPT-011 and CKPT-023 as for conversions, CKPT-130 where models of that task have no place for
            some of the weights, or nothing more than these; what `open_weights` raises.
        DataError: from `open_weights`.
    """
    source = open_weights(source_path, averaged=averaged)
    own = known_config(source)
    require_exactly(source, whole_shapes(own))
    found = WidenedWeights(source, _wider(source, own, task), seed)
    before, after = whole_shapes(own), found.shapes()
    lost = [name for name in before if not _holds(name, before[name], after.get(name))]
    if lost:
        raise _refused(source, own, task, f"these have no place for {len(lost)} of its tensors, such as {lost[0]}")
    return found


def _wider(source: WeightSource, own: WanConfig, task: Task) -> WanConfig:
    if task.latent_channels != own.task.latent_channels:
        raise _refused(source, own, task, f"its latents, of {own.out_dim} channels, are of another encoder")
    if task.name == own.task.name:
        raise _refused(source, own, task, "it is one")
    names = {name for other in TASKS.values() for name in other.sizes}
    sizes = {name: getattr(own, name) or task.sizes[name] for name in task.sizes}
    return of_task(own.model_copy(update=dict.fromkeys(names)), task, **sizes)


def _holds(name: str, before: tuple[int, ...], after: tuple[int, ...] | None) -> bool:
    """Tell whether a tensor of the one shape has its place in one of the other."""
    if after is None or name != _PATCHES:
        return after == before
    return before[1] <= after[1] and before[:1] + before[2:] == after[:1] + after[2:]


def _module(name: str) -> str:
    """`blocks.*.cross_attn.k_img`, or the first word of a name outside the blocks."""
    first, *others = name.split(".")
    return ".".join([first, "*", *others[1:-1]]) if first == "blocks" else first


def _refused(source: WeightSource, own: WanConfig, task: Task, what: str) -> CheckpointError:
    return CheckpointError(
        "CKPT-130",
        f"{source.path}, a {own.task.name} model, cannot be made a {task.name} model: {what}.",
        "Take the weights of a text-to-video model of that family, or of one whose conditions are part of that task's.",
    )
