"""The words of `accelerate launch`, as torchrun's words and the variables that accelerate hands to its processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mm.config.flags import parse_flag_parts
from mm.config.unread import UnreadError
from mm.dialects.launcher import ACCUMULATION
from mm.dialects.meaning import Refused, given, name_of
from mm.dialects.videox_fun.accelerate_file import with_file
from mm.dialects.videox_fun.accelerate_flags import AccelerateFlags
from mm.errors import ConfigError, Problem, raise_all

_STANDARD = "standard"
_TYPO = "--deepspeed_multinode_launcherr"
"""As the guide's ZeRO-3 lines have it, which accelerate itself refuses."""


@dataclass(frozen=True)
class Launched:
    """Start of a job.

    Attributes:
        torchrun: its words. variables: that the processes are given.
    """

    torchrun: list[str] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)


def read_launch_words(words: Sequence[str], devices: int) -> Launched:
    """Start that the words behind `accelerate launch` ask for.

    Args:
        words: accelerate's flags, the script, the script's words.
        devices: accelerators of this machine, for the number of processes where nothing says it.

    Raises:
        ConfigError: CFG-004 to CFG-008, CFG-341 and CFG-343 for flags, CFG-350 for numbers that do not go together or a
            command without a script, and what `with_file` says of a configuration file; all at once.
    """
    own, script = _split(words)
    spelling = {_TYPO: _TYPO[:-1]}
    flags, problems = parse_flag_parts(AccelerateFlags, own, program="accelerate launch", spelling=spelling)
    if not script:
        problems.append(Problem("CFG-350", "accelerate launch is given no script.", "Name one behind its flags."))
    try:
        flags = with_file(flags, problems)
    except ConfigError as error:
        problems += error.problems
    for name, meaning in given(flags):
        if isinstance(meaning, Refused):
            problems.append(Problem("CFG-341", f"{name_of(name)} {meaning.why}.", meaning.remedy))
    torchrun: list[str] = []
    try:
        problems += _numbers(flags, devices)
        torchrun = [*_torchrun(flags, devices), *(["-m"] if flags.module else []), *script]
    except UnreadError:
        pass
    raise_all(ConfigError, problems)
    return Launched(torchrun, _variables(flags))


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """accelerate's own words, and those from the script on: the first that is neither a flag nor a flag's value."""
    switches = {name_of(name) for name, info in AccelerateFlags.model_fields.items() if info.annotation is bool}
    position = 0
    while position < len(words) and words[position].startswith("-"):
        alone = "=" in words[position] or words[position] in switches | {"-m"}
        position += 1 if alone else 2
    own = ["--module" if word == "-m" else word for word in words[:position]]
    return own, list(words[position:])


def _processes(flags: AccelerateFlags, devices: int) -> int:
    if flags.num_processes is not None:
        return flags.num_processes
    return flags.num_machines * max(1, 0 if flags.cpu else devices)


def _numbers(flags: AccelerateFlags, devices: int) -> list[Problem]:
    problems = []
    processes, machines = _processes(flags, devices), flags.num_machines
    if processes % machines:
        found = f"--num_processes {processes} do not divide by --num_machines {machines}."
        problems.append(Problem("CFG-350", found, "--num_processes counts those of all machines."))
    if not 0 <= flags.machine_rank < machines:
        found = f"--machine_rank is {flags.machine_rank}, and there are {machines} machines."
        problems.append(Problem("CFG-350", found, f"Use 0 to {machines - 1}."))
    if machines > 1 and flags.main_process_ip is None:
        found = f"--num_machines is {machines}, and --main_process_ip is missing."
        problems.append(Problem("CFG-350", found, "Give the address of the machine of rank 0."))
    if flags.deepspeed_multinode_launcher not in (None, _STANDARD):
        found = f"--deepspeed_multinode_launcher is {flags.deepspeed_multinode_launcher}."
        problems.append(Problem("CFG-350", found, "Use standard, and start the command on each machine."))
    return problems


def _torchrun(flags: AccelerateFlags, devices: int) -> list[str]:
    each = _processes(flags, devices) // flags.num_machines
    if flags.num_machines == 1:
        return ["--standalone", f"--nproc-per-node={each}"]
    return [
        f"--nnodes={flags.num_machines}",
        f"--node-rank={flags.machine_rank}",
        f"--nproc-per-node={each}",
        f"--master-addr={flags.main_process_ip}",
        f"--master-port={flags.main_process_port or 29500}",
    ]


def _variables(flags: AccelerateFlags) -> dict[str, str]:
    said = {
        "ACCELERATE_MIXED_PRECISION": flags.mixed_precision,
        "ACCELERATE_USE_CPU": "true" if flags.cpu else None,
        "ACCELERATE_USE_DEEPSPEED": "true" if flags.use_deepspeed else None,
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": flags.deepspeed_config_file,
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": None if flags.zero_stage is None else str(flags.zero_stage),
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": flags.offload_optimizer_device,
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": flags.offload_param_device,
        ACCUMULATION: flags.gradient_accumulation_steps,
        "ACCELERATE_USE_FSDP": "true" if flags.use_fsdp else None,
        "FSDP_SHARDING_STRATEGY": flags.fsdp_sharding_strategy,
    }
    return {name: value for name, value in said.items() if value is not None}
