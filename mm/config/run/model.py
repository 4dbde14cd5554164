"""The section `model`: the transformer and the precision it is trained in."""

from __future__ import annotations

from typing import Literal

from mm.config.base import Section
from mm.config.model import WanConfig


class ModelSection(Section):
    """The transformer.

    Attributes:
        shape: sizes, and the task that its weights are for.
        precision: of parameters and activations; with bf16 the master weights are fp32.
    """

    shape: WanConfig
    precision: Literal["bf16", "fp32"] = "fp32"
