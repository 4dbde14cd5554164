"""What `accelerate launch` tells the processes that it starts. It is a launcher here: its environment is read.

Names of variables: accelerate's own, of its package `accelerate.utils.launch`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from mm.errors import Problem

Precision = Literal["no", "fp16", "bf16", "fp8"]


@dataclass(frozen=True)
class Launcher:
    """Settings of accelerate's configuration that concern a training.

    Attributes:
        precision: "no" for what the script chooses; None where accelerate started nothing.
        accumulation: samples of each process in one step; None where it does not say.
        zero_stage: of DeepSpeed; None without it. fsdp: its FSDP shards the parameters.
    """

    precision: str | None = None
    accumulation: int | None = None
    zero_stage: int | None = None
    fsdp: bool = False

    @property
    def shards_optimizer(self) -> bool:
        """True for ZeRO-1 and ZeRO-2."""
        return self.zero_stage in (1, 2)

    @property
    def shards_parameters(self) -> bool:
        """True for ZeRO-3 and FSDP."""
        return self.zero_stage == 3 or self.fsdp


def read_launcher(environment: Mapping[str, str]) -> tuple[Launcher, list[Problem]]:
    """The settings in an environment, and CFG-388 for each that is none."""
    problems: list[Problem] = []
    uses_deepspeed = environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    stage = _number(environment, "ACCELERATE_DEEPSPEED_ZERO_STAGE", problems) if uses_deepspeed else None
    accumulation = _number(environment, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", problems)
    if stage is not None and not 0 <= stage <= 3:
        found = f"accelerate's configuration asks for ZeRO stage {stage}."
        problems.append(Problem("CFG-388", found, "Set zero_stage to 0, 1, 2 or 3."))
        stage = None
    fsdp = environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return Launcher(environment.get("ACCELERATE_MIXED_PRECISION"), accumulation, stage, fsdp), problems


def launcher_notes(launcher: Launcher) -> Iterator[str]:
    """Lines for the log: what of accelerate's configuration is done in another way here."""
    if launcher.shards_optimizer:
        yield f"ZeRO-{launcher.zero_stage}: the distributed optimizer shards masters and moments over the processes"
    elif launcher.shards_parameters:
        yield "ZeRO-3 or FSDP: layer-zero shards the parameters over the processes"


def _number(environment: Mapping[str, str], name: str, problems: list[Problem]) -> int | None:
    text = environment.get(name)
    if text is None:
        return None
    if not text.isdigit():
        problems.append(Problem("CFG-388", f"{name} is {text!r}.", "Correct accelerate's configuration."))
        return None
    return int(text)
