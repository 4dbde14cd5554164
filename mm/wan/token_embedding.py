"""Embedding of the tokens that blocks run on: the video's, those in front of them, and those of the stream beside.

A rank embeds its own tokens alone: runs of the samples' (`mm.wan.packed.Run`), counted from the first token in front of
the video's. Shapes: B batch, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from mm.config.model import WanConfig
from mm.config.tasks.task import Entry, InputFeature
from mm.wan.inputs import Inputs, ModelInputs
from mm.wan.layers import Streams
from mm.wan.packed import Run, joined
from mm.wan.patches import Size, patchify, token_grid, window

Embedder = Callable[[str], nn.Module]
"""Module of a model by its name."""


def embed_tokens(config: WanConfig, embedder: Embedder, inputs: Inputs, runs: Sequence[Run]) -> Streams:
    """Tokens as the streams that blocks run on, [B, places of all runs, D] each.

    Each embedder is called once, whatever the tokens are: sharded ones wait for other ranks.

    Args:
        config: of the model. embedder: its modules.
        inputs: the samples. runs: which tokens of them; behind the last one are zeros.
    """
    parts = [_parts_of(config, inputs.samples[run.sample], run) for run in runs]
    ahead, video = [own for own, _ in parts], [own for _, own in parts]
    hidden: Tensor = embedder("patch_embedding")(_patches(config, inputs, video, ModelInputs.with_channels))
    for feature in _entering(config, Entry.HIDDEN, inputs):
        hidden = hidden + joined(_added(config, embedder, feature, inputs, video), 1)
    beside = _entering(config, Entry.SIDE_BLOCKS, inputs)
    sides = [_embedded(config, embedder, feature, inputs, video) for feature in beside]
    for feature in _entering(config, Entry.TOKENS, inputs):
        first = _embedded(config, embedder, feature, inputs, ahead)
        counts = [[own.places for own in each] for each in (ahead, video)]
        split = (x.split(count, dim=1) for x, count in zip((first, hidden), counts, strict=True))
        hidden = joined([tokens for pair in zip(*split, strict=True) for tokens in pair], 1)
    return hidden, *sides


def _entering(config: WanConfig, entry: Entry, inputs: Inputs) -> list[InputFeature]:
    given = inputs.samples[0].features
    return [feature for feature in config.task.entering(entry) if feature.name in given]


def _parts_of(config: WanConfig, sample: ModelInputs, run: Run) -> tuple[Run, Run]:
    """The tokens of a run that are in front of the video's, and those that are the video's, each counted apart."""
    _, rows, columns = token_grid(_size_of(sample.latents), config.patch_size)
    front = sample.leading_frames(config) * rows * columns
    ahead = min(max(front - run.start, 0), run.places)
    return (
        Run(run.sample, min(run.start, front), ahead, front),
        Run(run.sample, max(run.start - front, 0), run.places - ahead, run.num_tokens - front),
    )


def _embedded(
    config: WanConfig, embedder: Embedder, feature: InputFeature, inputs: Inputs, runs: Sequence[Run]
) -> Tensor:
    """Embedded tokens of a feature of latents; one without an axis of frames is one frame."""

    def latents(sample: ModelInputs, config: WanConfig) -> Tensor:
        del config
        value = sample.features[feature.name]
        return value if value.ndim == sample.latents.ndim else value.unsqueeze(2)

    out: Tensor = embedder(str(feature.module))(_patches(config, inputs, runs, latents))
    return out


def _patches(
    config: WanConfig, inputs: Inputs, runs: Sequence[Run], latents: Callable[[ModelInputs, WanConfig], Tensor]
) -> Tensor:
    """Patches of some tokens, one run's after the other's."""
    whole = [patchify(latents(sample, config), config.patch_size) for sample in inputs.samples]
    return joined([window(whole[run.sample], 1, run.start, run.places) for run in runs], 1)


def _added(
    config: WanConfig, embedder: Embedder, feature: InputFeature, inputs: Inputs, runs: Sequence[Run]
) -> list[Tensor]:
    """Change of some tokens by a module, [B, places, D] of each run; it sees the frames that these lie in alone."""
    values, starts = [], []
    for run in runs:
        sample = inputs.samples[run.sample]
        num_frames, rows, columns = token_grid(_size_of(sample.latents), config.patch_size)
        in_frame = rows * columns
        first = min(run.start // in_frame, num_frames - 1)  # of a run of padding the last
        last = max(run.start + run.places - 1, run.start) // in_frame
        values.append(sample.features[feature.name][:, :, first : last + 1])
        starts.append(run.start - first * in_frame)
    added: list[Tensor] = embedder(str(feature.module))(values)
    each = zip(added, starts, runs, strict=True)
    return [window(tokens, 1, start, run.places) for tokens, start, run in each]


def _size_of(latents: Tensor) -> Size:
    frames, height, width = latents.shape[2:]
    return frames, height, width
