"""Layout of a run of DiffSynth-Studio's train.py, which accelerate's configuration says there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mm.config.base import load_json
from mm.dialects.launcher import Launch, read_launch
from mm.errors import ConfigError, Problem

_STRATEGIES = {"FULL_SHARD": 3, "1": 3, "SHARD_GRAD_OP": 2, "2": 2, "NO_SHARD": 0, "3": 0}
"""ZeRO stages by FSDP's word or number for the same."""


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
    launch, problems = read_launch(environment)
    stage, offloads = launch.zero_stage, launch.optimizer_offload is not None
    if launch.deepspeed and launch.file:
        stage, offloads = _of_file(launch.file, problems)
    elif launch.deepspeed and stage is None and not problems:
        stage = 2  # accelerate's own
    if launch.fsdp:
        stage, offloads = _strategy(launch, problems), False
    if launch.mixed_precision not in ("no", "bf16"):
        found = f"accelerate's mixed_precision is {launch.mixed_precision}, and training is in bf16 with fp32 masters."
        problems.append(Problem("CFG-388", found, "Set it to bf16."))
    return Launcher(launch.accumulation or None, stage, offloads, launch.cpu), problems


def _strategy(launch: Launch, problems: list[Problem]) -> int | None:
    stage = _STRATEGIES.get(launch.fsdp_strategy.upper())
    if stage is None:
        problems.append(Problem("CFG-388", f"FSDP's strategy is {launch.fsdp_strategy}.", "Use FULL_SHARD."))
    return stage


def _of_file(file: str, problems: list[Problem]) -> tuple[int | None, bool]:
    """ZeRO's stage in a JSON of DeepSpeed, and whether that has the optimizer in host memory."""
    try:
        values = load_json(Path(file))
    except ConfigError as error:
        problems += error.problems
        return None, False
    zero = values.get("zero_optimization", {}) if isinstance(values, dict) else {}
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if type(stage) is not int or not 0 <= stage <= 3:
        remedy = "Give 0, 1, 2 or 3."
        problems.append(Problem("CFG-388", f"zero_optimization.stage in {file} is {stage!r}.", remedy))
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
