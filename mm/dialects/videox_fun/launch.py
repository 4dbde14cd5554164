"""Place of a process, and what replicas share, as `accelerate launch` and torchrun tell a script of VideoX-Fun."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from mm.config.place import ProcessPlace, process_place
from mm.dialects.launcher import ACCUMULATION, Launch
from mm.dialects.videox_fun.deepspeed import DeepSpeedFile, load_deepspeed
from mm.dialects.videox_fun.flags import VideoxFlags
from mm.dialects.videox_fun.reading import Reading
from mm.errors import ConfigError

Sharding = Literal["none", "optimizer", "parameters"]
"""State that replicas share: none, the optimizer's, or the parameters too."""
_STAGES: dict[int, Sharding] = {0: "none", 1: "optimizer", 2: "optimizer", 3: "parameters"}
_NO_OFFLOAD = "Leave the states on the devices; more of them, with ZeRO-3, hold less each."


def place_of(environment: Mapping[str, str]) -> ProcessPlace:
    """Place of this process; the guide exports WORLD_SIZE and RANK of machines, which one machine may leave there.

    Raises:
        ConfigError: CFG-031 for variables that make no sense; CFG-342 for those of machines where no launcher made
            processes of them.
    """
    if "LOCAL_RANK" in environment or "WORLD_SIZE" not in environment:
        return process_place(environment)
    machines = environment["WORLD_SIZE"]
    if machines == "1":
        return ProcessPlace(0, 1, 0)
    raise ConfigError(
        "CFG-342",
        f"WORLD_SIZE={machines} counts machines, and no launcher has started processes on them.",
        "Start the script with accelerate launch (or python -m mm.cli.accelerate launch), or with torchrun.",
    )


def sharding_of(
    flags: VideoxFlags, launch: Launch, place: ProcessPlace, reading: Reading
) -> tuple[Sharding, DeepSpeedFile]:
    """State that replicas share, by the launcher and the script's own flags; keeps CFG-342 and CFG-343."""
    _switches_agree(flags, launch, reading)
    reading.attempt(lambda: _accumulation_agrees(flags, launch, reading))
    for name in filter(None, (launch.optimizer_offload, launch.parameter_offload)):
        reading.wrong("CFG-343", f"{name} keeps states in the host's memory, which is not here.", _NO_OFFLOAD)
    if launch.fsdp:
        if launch.fsdp_strategy.upper() not in ("FULL_SHARD", "1"):
            found = f"--fsdp_sharding_strategy is {launch.fsdp_strategy}."
            reading.wrong("CFG-343", found, "Use FULL_SHARD; what ZeRO-2 shards, ZeRO-2 does.")
        return "parameters", DeepSpeedFile()
    if not launch.deepspeed:
        return "none", DeepSpeedFile()
    if launch.file is None:
        return _STAGES.get(2 if launch.zero_stage is None else launch.zero_stage, "none"), DeepSpeedFile()
    path = launch.file
    file = reading.attempt(lambda: load_deepspeed(path))
    reading.attempt(lambda: _file_agrees(file, path, flags, launch, place, reading))
    return reading.attempt(lambda: _STAGES[file.zero_optimization.stage]), file


def _switches_agree(flags: VideoxFlags, launch: Launch, reading: Reading) -> None:
    for given, asked, word in (
        (flags.use_deepspeed, launch.deepspeed, "--use_deepspeed"),
        (flags.use_fsdp, launch.fsdp, "--use_fsdp"),
    ):
        if given is True and not asked:
            found = f"The script is given {word}, and its launcher was not: nothing says what is sharded."
            remedy = f"Give accelerate launch {word} too, or remove it from both."
            reading.wrong("CFG-342", found, remedy)
        if given is False and asked:
            found = f"accelerate launch was given {word}, and the script was not."
            reading.wrong("CFG-342", found, "Give it to both, or to neither.")


def _accumulation_agrees(flags: VideoxFlags, launch: Launch, reading: Reading) -> None:
    said, steps = launch.accumulation, flags.gradient_accumulation_steps
    if said is not None and said != steps:
        found = f"{ACCUMULATION} of the launcher is {said}, and --gradient_accumulation_steps is {steps}."
        reading.wrong("CFG-342", found, "Make them agree, or leave it to the script's flag.")


def _file_agrees(
    file: DeepSpeedFile, path: str, flags: VideoxFlags, launch: Launch, place: ProcessPlace, reading: Reading
) -> None:
    """CFG-342: what DeepSpeed's file says again is what the flags say."""
    stage = file.zero_optimization.stage
    if launch.zero_stage is not None and launch.zero_stage != stage:
        found = f"--zero_stage is {launch.zero_stage}, and zero_optimization.stage in {path} is {stage}."
        reading.wrong("CFG-342", found, "Make them agree.")
    batch, steps = flags.train_batch_size, flags.gradient_accumulation_steps
    said = {
        "train_micro_batch_size_per_gpu": (file.train_micro_batch_size_per_gpu, "--train_batch_size", lambda: batch),
        "gradient_accumulation_steps": (
            file.gradient_accumulation_steps,
            "--gradient_accumulation_steps",
            lambda: steps,
        ),
        "train_batch_size": (
            file.train_batch_size,
            "of --train_batch_size, --gradient_accumulation_steps and the processes that",
            lambda: batch * steps * place.world_size,
        ),
        "gradient_clipping": (file.gradient_clipping, "--max_grad_norm", lambda: flags.max_grad_norm),
    }
    for key, (value, word, expected) in said.items():
        wanted = reading.attempt(expected)
        if value not in ("auto", None) and value != wanted:
            found = f"{key} in {path} is {value}, and {word} is {wanted}."
            reading.wrong("CFG-342", found, 'Make them agree, or write "auto" into the file.')
    if file.bf16.enabled is True and flags.mixed_precision not in ("bf16", None):
        found = f"bf16.enabled in {path} is true, and --mixed_precision is {flags.mixed_precision}."
        reading.wrong("CFG-342", found, 'Make them agree, or write "auto" into the file.')
