"""The section `experts`: two experts of one shape that are trained in one run, such as Wan2.2's A14B models."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from mm.config.base import Section

HIGH, LOW = "transformer", "transformer_2"
"""diffusers' names of the expert for much noise and that for little; so are the folders of their checkpoints called."""


class ExpertsSection(Section):
    """Training of two experts; `checkpoint.load` and `adapters.base` are then of the one for much noise.

    Attributes:
        boundary: noise level from which on the expert for much noise is trained; below it the other one.
        load: of the expert for little noise, as `checkpoint.load` of the other.
        base: of the expert for little noise, as `adapters.base` of the other.
        steps_in_a_row: steps that one expert is trained for before it is drawn again which one comes.
        offload: the expert that is not used waits in host memory, with its optimizer.
    """

    boundary: float = Field(gt=0, lt=1)
    load: str | None = Field(None, min_length=1)
    base: str | None = Field(None, min_length=1)
    steps_in_a_row: int = Field(1, ge=1)
    offload: bool = False


def expert_folders(save: str) -> tuple[Path, Path]:
    """Folders of the experts' checkpoints, that for much noise first."""
    return Path(save) / HIGH, Path(save) / LOW
