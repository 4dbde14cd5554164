"""Inputs of the transformer: latents, timesteps, text and the features that the model's task declares.

Samples of one shape are rows of a batch, samples of any shapes lie one after the other in one sequence of tokens. The
second are a list of the first, so that all of the model, the stages and the loss goes through `samples` of either.

Shapes: B batch, C latent channels, F H W latent frames, height and width, L text tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from mm.config.model import WanConfig
from mm.config.tasks.task import Entry
from mm.errors import ConfigError
from mm.wan.reuse import BlockReuse


@dataclass(frozen=True)
class ModelInputs:
    """Some samples, as the transformer takes them.

    Attributes:
        latents: [B, C, F, H, W] noisy latents, C = `config.noise_channels`; cast to the model's dtype.
        timestep: [B], 0 (clean) to 1000 (noise), a fraction allowed; or [B, R], one of each run of tokens.
        text: [B, L, text_dim] text features; cast to the model's dtype. Wan was trained with captions padded by zero
            vectors to `config.text_len` and without a mask, so padding is the caller's part and changes the result.
        features: what the task declares (`config.task.features`), by name, each [B, *`config.feature_shapes`].
        runs: numbers of the video's tokens, in their order, that the R timesteps are for; none where timesteps are [B].
        reuse: what decides whether the blocks run; None where they always do.
    """

    latents: Tensor
    timestep: Tensor
    text: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)
    runs: tuple[int, ...] = ()
    reuse: BlockReuse | None = None

    def part(self, part: Hashable) -> ModelInputs:
        """The same for one of several transformers or parts of a clip, whose blocks reuse nothing of the others'."""
        return self if self.reuse is None else replace(self, reuse=self.reuse.of(part))

    def each(self, change: Callable[[Tensor], Tensor]) -> ModelInputs:
        """The same with every tensor changed."""
        features = {name: change(value) for name, value in self.features.items()}
        tensors = change(self.latents), change(self.timestep), change(self.text)
        return ModelInputs(*tensors, features, self.runs, self.reuse)

    @property
    def samples(self) -> tuple[ModelInputs, ...]:
        """Parts of a sequence of tokens: this alone, as each row of the batch is a sequence."""
        return (self,)

    @property
    def timestep_rows(self) -> Tensor:
        """Timesteps of all runs, [R B]: those of the first run before those of the second."""
        return self.timestep.t().flatten() if self.runs else self.timestep

    def feature(self, name: str) -> Tensor | None:
        """One feature of all samples; None of an optional one that is not there."""
        return self.features.get(name)

    def leading_frames(self, config: WanConfig) -> int:
        """Latent frames of tokens that stand in front of the video's."""
        return sum(feature.name in self.features for feature in config.task.entering(Entry.TOKENS))

    def with_channels(self, config: WanConfig) -> Tensor:
        """[B, in_dim, F, H, W]: the noisy latents, and behind their channels those of the features that enter there."""
        added = [self.features[feature.name] for feature in config.task.entering(Entry.CHANNELS)]
        return (
            torch.cat((self.latents, *(value.to(self.latents.dtype) for value in added)), 1) if added else self.latents
        )

    def check(self, config: WanConfig) -> None:
        """Check the shapes against a model.

        Raises:
            ConfigError: CFG-041 latents, CFG-042 text features, CFG-043 timesteps of another shape; CFG-056 for
                features that are missing, CFG-057 for some that the task does not have, and the id that the task
                declares for one of another shape.
        """
        latents, text = self.latents, self.text
        if latents.ndim != 5 or latents.shape[1] != config.noise_channels:
            raise ConfigError(
                "CFG-041",
                f"Latents have shape {tuple(latents.shape)}, expected [B, {config.noise_channels}, F, H, W].",
                "Give latents of the VAE this model was trained with.",
            )
        batch = latents.shape[0]
        if text.ndim != 3 or text.shape[0] != batch or text.shape[1] < 1 or text.shape[2] != config.text_dim:
            raise ConfigError(
                "CFG-042",
                f"Text features have shape {tuple(text.shape)}, expected [{batch}, L, {config.text_dim}].",
                "Give features of the text encoder this model was trained with, one row for each latent.",
            )
        expected = (batch, len(self.runs)) if self.runs else (batch,)
        tokens = math.prod(latents.shape[2:]) // math.prod(config.patch_size)
        if tuple(self.timestep.shape) != expected or sum(self.runs) not in (0, tokens):
            found = f"Timesteps have shape {tuple(self.timestep.shape)}, expected {list(expected)}"
            raise ConfigError(
                "CFG-043",
                f"{found}{f' for runs of {list(self.runs)} of {tokens} tokens' if self.runs else ''}.",
                "Give one timestep for each latent, or one for each token of each.",
            )
        self._check_features(config)

    def _check_features(self, config: WanConfig) -> None:
        task = config.task
        unknown = sorted(self.features.keys() - {feature.name for feature in task.features})
        if unknown:
            raise ConfigError(
                "CFG-057",
                f"This {task.name} model was given {' and '.join(unknown)}.",
                "Leave them out, or use the weights of a model whose task has them.",
            )
        if any(feature.name not in self.features and not feature.optional for feature in task.features):
            wanted, given = " and ".join(feature.name for feature in task.features), " and ".join(self.features)
            raise ConfigError(
                "CFG-056",
                f"This {task.name} model needs {wanted}; given: {given or 'none of them'}.",
                "Give all, or use the weights of a text-to-video model.",
            )
        batch, _, frames, height, width = self.latents.shape
        shapes = config.feature_shapes((frames, height, width))
        for feature in task.features:
            if feature.name not in self.features:
                continue
            found, expected = list(self.features[feature.name].shape), [batch, *shapes[feature.name]]
            if found != expected:
                message = f"{feature.title} have shape {tuple(found)}, expected {expected}."
                raise ConfigError(feature.error, message, feature.remedy)


@dataclass(frozen=True)
class PackedInputs:
    """Samples of any shapes, which share one sequence of tokens and see nothing of each other.

    Attributes:
        samples: of one sample each, in the order of the sequence. Captions may have any numbers of tokens.
    """

    samples: tuple[ModelInputs, ...]
    reuse = None  # sequences of several samples are for training

    @property
    def timestep_rows(self) -> Tensor:
        """Timesteps of all runs of all samples, [R]: those of the first sample before those of the second."""
        return torch.cat([sample.timestep_rows for sample in self.samples])

    @property
    def text(self) -> Tensor:
        """Text features of all samples one after the other, [1, L of all, text_dim]."""
        return torch.cat([sample.text for sample in self.samples], dim=1)

    def feature(self, name: str) -> Tensor | None:
        """One feature of all samples, [S, *shape]; of those of the samples' sizes only each sample has its own."""
        if name not in self.samples[0].features:
            return None
        return torch.cat([sample.features[name] for sample in self.samples])

    def each(self, change: Callable[[Tensor], Tensor]) -> PackedInputs:
        """The same with every tensor changed."""
        return PackedInputs(tuple(sample.each(change) for sample in self.samples))

    def check(self, config: WanConfig) -> None:
        """Check every sample against a model.

        Raises:
            ConfigError: what `ModelInputs.check` raises, and CFG-240 for no samples, or several where one is expected.
        """
        batches = [len(sample.latents) for sample in self.samples]
        if not batches or set(batches) != {1}:
            raise ConfigError(
                "CFG-240",
                f"A packed sequence was given samples in batches of {batches or 'nothing'}, expected one sample each.",
                "Give each sample of the sequence by itself.",
            )
        for sample in self.samples:
            sample.check(config)
            if sample.features.keys() != self.samples[0].features.keys():
                given = [" and ".join(each.features) or "nothing" for each in self.samples]
                raise ConfigError(
                    "CFG-240",
                    f"Samples of a packed sequence were given {', '.join(dict.fromkeys(given))}.",
                    "Give optional features to all samples of a sequence or to none.",
                )


Inputs = ModelInputs | PackedInputs
"""Inputs of models, stages and steps."""


def runs_of(timestep: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Timesteps of each token, [B, T], as those of runs, [B, R], and how many tokens each run has.

    Reads which tokens differ, so that it waits for the device.
    """
    changes = (timestep[:, 1:] != timestep[:, :-1]).any(0).nonzero().flatten().tolist()
    firsts = [0, *(place + 1 for place in changes)]
    counts = (stop - start for start, stop in pairwise([*firsts, timestep.shape[1]]))
    return timestep[:, firsts], tuple(counts)
