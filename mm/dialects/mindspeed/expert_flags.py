"""Flags about two experts: both trained in one run, or the other one's weights for rendered clips."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from mm.dialects.mindspeed.flag_paths import sets
from mm.dialects.mindspeed.mesh_flags import MeshFlags


class ExpertFlags(MeshFlags):
    """Experts of a training; the command adds its own flags."""

    groups: ClassVar[Mapping[str, str]] = {"expert_boundary": "experts"}

    expert_boundary: float | None = sets(
        "experts.boundary",
        None,
        gt=0,
        lt=1,
        description="train two experts: from this noise level on that of --load, below it that of --load-low-noise; "
        "0.875 for Wan2.2's T2V-A14B, 0.9 for I2V-A14B",
    )
    load_low_noise: str | None = sets(
        "experts.load", None, description="--load of the expert for little noise (diffusers' transformer_2)"
    )
    load_base_model_low_noise: str | None = sets(
        "experts.base", None, description="with LoRA the --load-base-model of the expert for little noise"
    )
    expert_steps: int = sets(
        "experts.steps_in_a_row",
        1,
        ge=1,
        description="steps that one expert is trained for before it is drawn again which one comes",
    )
    offload_expert: bool = sets(
        "experts.offload", False, description="the expert that is not used waits in host memory, with its optimizer"
    )
    validation_other_expert: str | None = sets(
        "validation.other_expert",
        None,
        description="weights of the other one of two experts, asked for the noise levels beyond the band that is "
        "trained",
    )
