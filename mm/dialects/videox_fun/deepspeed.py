"""DeepSpeed's JSON of `accelerate launch --deepspeed_config_file`: the keys that mean something here, and the others.

What is sharded decides the layout; sizes of buckets and printing are how megatron-core and FSDP2 do it anyway; what
would do something else is refused by its name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mm.config.base import Section, load_json, parse
from mm.errors import ConfigError, Problem, raise_all

Auto = Literal["auto"]


class Enabled(Section):
    """A switch."""

    enabled: bool | Auto = "auto"


class NoOffload(Section):
    """A place for states; they stay on the device."""

    device: Literal["none"] = "none"
    pin_memory: bool | None = None
    nvme_path: str | None = None


class ZeroOptimization(Section):
    """State that is sharded: 1, 2: the optimizer's; 3: the parameters too. Sizes of buckets decide nothing here."""

    stage: int = Field(0, ge=0, le=3)
    overlap_comm: bool = False
    offload_optimizer: NoOffload | None = None
    offload_param: NoOffload | None = None
    contiguous_gradients: bool | None = None
    reduce_scatter: bool | None = None
    round_robin_gradients: bool | None = None
    allgather_partitions: bool | None = None
    sub_group_size: Any = None
    reduce_bucket_size: Any = None
    allgather_bucket_size: Any = None
    stage3_prefetch_bucket_size: Any = None
    stage3_param_persistence_threshold: Any = None
    stage3_max_live_parameters: Any = None
    stage3_max_reuse_distance: Any = None
    stage3_gather_16bit_weights_on_model_save: bool | Auto | None = None


class DeepSpeedFile(Section):
    """The file. `gradient_clipping` is the flag's here, which DeepSpeed's own file would override there."""

    bf16: Enabled = Enabled()
    zero_optimization: ZeroOptimization = ZeroOptimization()
    train_micro_batch_size_per_gpu: int | Auto = "auto"
    train_batch_size: int | Auto = "auto"
    gradient_accumulation_steps: int | Auto = "auto"
    gradient_clipping: float | Auto | None = None
    steps_per_print: Any = None
    dump_state: bool | None = None
    wall_clock_breakdown: bool | None = None


_REFUSED = {
    "fp16": "trains in fp16, which is not here",
    "optimizer": "names an optimizer, which the script's flags do",
    "scheduler": "names a schedule, which the script's flags do",
    "activation_checkpointing": "recomputes blocks, which --gradient_checkpointing does",
    "amp": "is another way of mixed precision, which is not here",
}


def load_deepspeed(path: str) -> DeepSpeedFile:
    """Read the file.

    Raises:
        ConfigError: CFG-001, CFG-002; CFG-003, CFG-005 for keys and values that mean nothing here, CFG-343 for those
            that would do something that is not here; all at once.
    """
    values = load_json(Path(path))
    problems = []
    for key, why in _REFUSED.items():
        value = values.pop(key, None) if isinstance(values, dict) else None
        off = value is None or (isinstance(value, dict) and value.get("enabled") is False)
        if not off:
            problems.append(Problem("CFG-343", f"{key} in {path} {why}.", "Remove it from the file."))
    zero = values.get("zero_optimization") if isinstance(values, dict) else None
    for key in ("offload_optimizer", "offload_param"):
        place = zero.get(key) if isinstance(zero, dict) else None
        if isinstance(zero, dict) and isinstance(place, dict) and place.get("device", "none") != "none":
            del zero[key]
            found = (
                f"zero_optimization.{key} in {path} keeps states in the memory of {place['device']}, which is not here."
            )
            problems.append(Problem("CFG-343", found, "Remove it; with ZeRO-3 more devices hold less each."))
    try:
        result = parse(DeepSpeedFile, values, path)
    except ConfigError as error:
        raise_all(ConfigError, [*problems, *error.problems])
        raise AssertionError("an error without problems") from None
    raise_all(ConfigError, problems)
    return result
