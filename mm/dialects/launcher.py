"""Environment that `accelerate launch` gives to the processes that it starts; it is a launcher here, and no more.

`python -m mm.cli.accelerate launch` sets the same variables. Their names: accelerate's own, of its package
`accelerate.utils.launch`. What a dialect makes of them is said in its room.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mm.errors import Problem

ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
_OFFLOADS = tuple(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part}_DEVICE" for part in ("OPTIMIZER", "PARAM"))
_STAGES = 4  # of ZeRO, from 0


@dataclass(frozen=True)
class Launch:
    """Launcher's word of a training.

    Attributes:
        deepspeed, fsdp: it was asked for either.
        zero_stage: of DeepSpeed, by the launcher's own word; None where a file says it, or nothing.
        file: DeepSpeed's JSON. fsdp_strategy: FSDP's word or number.
        mixed_precision: its word. cpu: devices are left alone.
        optimizer_offload, parameter_offload: DeepSpeed is to keep these in host memory; the variable that says so.
        accumulation: samples of each process in one step; None where it does not say.
    """

    deepspeed: bool = False
    fsdp: bool = False
    zero_stage: int | None = None
    file: str | None = None
    fsdp_strategy: str = "FULL_SHARD"
    mixed_precision: str = "no"
    cpu: bool = False
    optimizer_offload: str | None = None
    parameter_offload: str | None = None
    accumulation: int | None = None


def read_launch(environment: Mapping[str, str]) -> tuple[Launch, list[Problem]]:
    """The launcher's word, and CFG-388 for each variable that holds no number where one belongs."""
    problems: list[Problem] = []

    def is_true(name: str) -> bool:
        return environment.get(name, "").lower() in ("1", "true", "yes")

    def number(name: str, most: int | None = None) -> int | None:
        text = environment.get(name)
        if not text:
            return None
        if not text.isdecimal() or (most is not None and int(text) > most):
            expected = "a number" if most is None else f"0 to {most}"
            remedy = f"Correct accelerate's configuration; {expected} stands there."
            problems.append(Problem("CFG-388", f"{name} is {text!r}.", remedy))
            return None
        return int(text)

    def offload(name: str) -> str | None:
        return None if environment.get(name, "none").lower() in ("none", "") else name

    deepspeed = is_true("ACCELERATE_USE_DEEPSPEED")
    optimizer_offload, parameter_offload = map(offload, _OFFLOADS)
    launch = Launch(
        deepspeed=deepspeed,
        fsdp=is_true("ACCELERATE_USE_FSDP"),
        zero_stage=number("ACCELERATE_DEEPSPEED_ZERO_STAGE", _STAGES - 1) if deepspeed else None,
        file=environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE") or None,
        fsdp_strategy=environment.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD"),
        mixed_precision=environment.get("ACCELERATE_MIXED_PRECISION", "no").lower(),
        cpu=is_true("ACCELERATE_USE_CPU"),
        optimizer_offload=optimizer_offload,
        parameter_offload=parameter_offload,
        accumulation=number(ACCUMULATION),
    )
    return launch, problems
