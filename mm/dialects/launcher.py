"""Environment that `accelerate launch` gives to the processes that it starts; it is a launcher here, and no more.

Names of variables: accelerate's own, of its package `accelerate.utils.launch`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mm.config.base import load_json
from mm.errors import ConfigError, Problem

_STRATEGIES = {"FULL_SHARD": 3, "1": 3, "SHARD_GRAD_OP": 2, "2": 2, "NO_SHARD": 0, "3": 0}
"""ZeRO stages by FSDP's word or number for the same."""
_OPTIMIZER_ON = "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"


@dataclass(frozen=True)
class Launcher:
    """Settings of accelerate's configuration that concern a training.

    Attributes:
        accumulation: samples of each process in one step; None where it does not say.
        zero_stage: of DeepSpeed, or what FSDP's strategy is of that; None without them.
        offloads: DeepSpeed is to keep the optimizer's state in host memory. cpu: accelerators are left alone.
    """

    accumulation: int | None = None
    zero_stage: int | None = None
    offloads: bool = False
    cpu: bool = False

    @property
    def shards_parameters(self) -> bool:
        """True for ZeRO-3, and where the optimizer's state would have to be kept in host memory."""
        return self.zero_stage == 3 or (self.zero_stage in (1, 2) and self.offloads)

    @property
    def shards_optimizer(self) -> bool:
        """True for ZeRO-1 and ZeRO-2."""
        return self.zero_stage in (1, 2) and not self.shards_parameters


def read_launcher(environment: Mapping[str, str]) -> tuple[Launcher, list[Problem]]:
    """The settings in an environment, and CFG-388 for each that is none, or is not here."""
    problems: list[Problem] = []

    def is_true(name: str) -> bool:
        return environment.get(name, "").lower() in ("1", "true", "yes")

    stage: int | None = None
    offloads = environment.get(_OPTIMIZER_ON, "none").lower() not in ("none", "")
    if is_true("ACCELERATE_USE_DEEPSPEED"):
        stage = _number(environment, "ACCELERATE_DEEPSPEED_ZERO_STAGE", problems)
        file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        if file:
            stage, offloads = _of_file(file, problems)
        elif stage is None and not problems:
            stage = 2  # accelerate's own
    if stage is not None and not 0 <= stage <= 3:
        found = f"accelerate's configuration asks for ZeRO stage {stage}."
        problems.append(Problem("CFG-388", found, "Set zero_stage to 0, 1, 2 or 3."))
        stage = None
    if is_true("ACCELERATE_USE_FSDP"):
        strategy = environment.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD")
        stage, offloads = _STRATEGIES.get(strategy.upper()), False
        if stage is None:
            problems.append(Problem("CFG-388", f"FSDP's strategy is {strategy}.", "Use FULL_SHARD."))
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", "bf16"):
        found = f"accelerate's mixed_precision is {precision}, and training is in bf16 with fp32 masters."
        problems.append(Problem("CFG-388", found, "Set it to bf16."))
    accumulation = _number(environment, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", problems)
    return Launcher(accumulation or None, stage, offloads, is_true("ACCELERATE_USE_CPU")), problems


def _of_file(file: str, problems: list[Problem]) -> tuple[int | None, bool]:
    """ZeRO's stage in a JSON of DeepSpeed, and whether that has the optimizer in host memory."""
    try:
        values = load_json(Path(file))
    except ConfigError as error:
        problems += error.problems
        return None, False
    zero = values.get("zero_optimization", {}) if isinstance(values, dict) else {}
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if type(stage) is not int:
        problems.append(Problem("CFG-388", f"zero_optimization.stage in {file} is {stage!r}.", "Give a number."))
        return None, False
    place = zero.get("offload_optimizer")
    return stage, isinstance(place, dict) and place.get("device", "none") != "none"


def launcher_notes(launcher: Launcher) -> Iterator[str]:
    """Lines for the log: what of accelerate's configuration is done in another way here."""
    if launcher.shards_optimizer:
        yield f"ZeRO-{launcher.zero_stage}: the distributed optimizer shards masters and moments over the processes"
    elif launcher.shards_parameters and launcher.zero_stage in (1, 2):
        yield f"ZeRO-{launcher.zero_stage} with the optimizer in host memory: layer-zero shards all over the processes"
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
