"""Defects of what the family's models add: side blocks, tokens in front of the video's, and a module that sees frames.

As `mutations`, of which these are the classes N14 to N17; importing this lists them.
"""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mutations import mutation
from torch import Tensor

from mm.parallel import stage
from mm.train import step
from mm.wan import token_embedding
from mm.wan.model import WanModel
from mm.wan.packed import Run
from mm.wan.patches import token_grid
from mm.wan.rope import RotaryTables

VACE = ("vace-ulysses2", "vace-tp2sp", "vace-pp2")
REFERENCE = ("ref-ulysses2", "ref-ring2", "ref-tp2sp", "ref-pp2")
CAMERA = ("camera-ulysses2", "camera-ring2", "camera-tp2sp")


# N14: a hint goes somewhere else, or is not as strong as was asked for.


def layers_of(patch: pytest.MonkeyPatch, change: Callable[[list[Any]], list[Any]]) -> None:
    layers = WanModel.layers
    patch.setattr(WanModel, "layers", lambda self, *args: change(layers(self, *args)))


@mutation("N14", *VACE, caught_by="loss gradient norm")
def hints_go_to_the_block_behind(patch: pytest.MonkeyPatch) -> None:
    def moved(layers: list[Any]) -> list[Any]:
        sides = [None, *(layer.side for layer in layers[:-1])]
        return [dataclasses.replace(layer, side=side) for layer, side in zip(layers, sides, strict=True)]

    layers_of(patch, moved)


@mutation("N14", *VACE, caught_by="loss gradient norm")
def scale_of_hints_ignored(patch: pytest.MonkeyPatch) -> None:
    layers_of(patch, lambda layers: [dataclasses.replace(layer, hint_scale=None) for layer in layers])


@mutation("N14", "vace-pp2", caught_by="loss gradient norm")
def scale_of_hints_is_that_of_the_first_stage_alone(patch: pytest.MonkeyPatch) -> None:
    layers = WanModel.layers

    def wrong(self: WanModel, *args: Any) -> list[Any]:
        first = "0" in self.blocks
        return [layer if first else dataclasses.replace(layer, hint_scale=None) for layer in layers(self, *args)]

    patch.setattr(WanModel, "layers", wrong)


# N15: the side blocks' stream does not cross a boundary as the hidden state does.


def streams_received(patch: pytest.MonkeyPatch, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    receive = stage.receive_side

    def wrong(*args: Any) -> tuple[Any, Any]:
        (hidden, side), conditions = receive(*args)
        return change(hidden, side), conditions

    patch.setattr(stage, "receive_side", wrong)


@mutation("N15", "vace-pp2", caught_by="gradient norm")
def later_stages_keep_the_gradient_of_the_side_stream(patch: pytest.MonkeyPatch) -> None:
    streams_received(patch, lambda hidden, side: (hidden, side.detach()))


@mutation("N15", "vace-pp2", caught_by="loss gradient norm")
def side_stream_begins_again_on_every_stage(patch: pytest.MonkeyPatch) -> None:
    streams_received(patch, lambda hidden, side: (hidden, hidden))


# N16: tokens of the reference image are taken for the video's.


@mutation("N16", *REFERENCE, caught_by="loss gradient norm")
def reference_at_the_position_of_the_first_frame(patch: pytest.MonkeyPatch) -> None:
    tables = RotaryTables.tables

    def wrong(self: RotaryTables, grid: Any, device: Any) -> tuple[Tensor, ...]:
        frames, rows, columns = grid
        of_video = tables(self, (frames - 1, rows, columns), device)
        return tuple(torch.cat((table[: rows * columns], table)) for table in of_video)

    patch.setattr(RotaryTables, "tables", wrong)


@mutation("N16", *REFERENCE, caught_by="loss gradient norm")
def loss_counts_the_reference(patch: pytest.MonkeyPatch) -> None:
    loss, counts = step._loss, step.token_counts

    def wrong(*args: Any) -> Any:
        with pytest.MonkeyPatch.context() as inside:
            inside.setattr(step, "token_counts", lambda *segment: (0, sum(counts(*segment))))
            return loss(*args)

    patch.setattr(step, "_loss", wrong)


@mutation("N16", *REFERENCE, caught_by="loss gradient norm")
def target_is_not_moved_behind_the_reference(patch: pytest.MonkeyPatch) -> None:
    pad = step.F.pad

    def wrong(x: Tensor, sides: tuple[int, ...]) -> Tensor:
        if len(sides) == 2:  # of the losses of samples
            return pad(x, sides)
        return pad(x, (*sides[:2], sides[3], sides[2]))

    patch.setattr(step, "F", SimpleNamespace(pad=wrong))


# N17: what is added to a rank's tokens is that of other tokens.


def runs_added(patch: pytest.MonkeyPatch, change: Callable[[Run, int], Run]) -> None:
    """Change the runs that are asked for, given a run and the tokens of a frame."""
    added = token_embedding._added

    def wrong(config: Any, embedder: Any, feature: Any, inputs: Any, runs: Any) -> Any:
        (_, rows, columns), *_ = (token_grid(tuple(of.latents.shape[2:]), config.patch_size) for of in inputs.samples)
        return added(config, embedder, feature, inputs, [change(run, rows * columns) for run in runs])

    patch.setattr(token_embedding, "_added", wrong)


@mutation("N17", *CAMERA, caught_by="loss gradient norm")
def every_rank_gets_the_rays_of_the_first_frames(patch: pytest.MonkeyPatch) -> None:
    runs_added(patch, lambda run, frame: run._replace(start=0))


@mutation("N17", *CAMERA, caught_by="loss gradient norm")
def rays_begin_with_a_frame_and_tokens_within_it(patch: pytest.MonkeyPatch) -> None:
    runs_added(patch, lambda run, frame: run._replace(start=run.start - run.start % frame))
