"""The file of `accelerate launch --config_file`, as `accelerate config` writes it: words of the command in YAML."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mm.config.base import Section, parse
from mm.config.unread import Unread
from mm.config.yaml_file import load_yaml
from mm.dialects.meaning import name_of
from mm.dialects.videox_fun.accelerate_flags import AccelerateFlags
from mm.errors import Problem

Distributed = Literal["NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "DEEPSPEED", "FSDP"]
_OF_THIS_MACHINE = ("machine_rank",)
"""Fields of which a word of the command stands before the file's, which all machines share."""
_OFF: tuple[Any, ...] = (None, False, "", "no", "NO", "none", "false", "all", [], {})


class DeepSpeedSection(Section):
    """The key `deepspeed_config`: flags of the same names; lists of hosts are refused elsewhere."""

    deepspeed_config_file: str | None = None
    deepspeed_multinode_launcher: str | None = None
    zero_stage: int | None = Field(None, ge=0, le=3)
    zero3_init_flag: bool | None = None
    zero3_save_16bit_model: bool | None = None
    offload_optimizer_device: str | None = None
    offload_param_device: str | None = None
    offload_optimizer_nvme_path: str | None = None
    offload_param_nvme_path: str | None = None
    gradient_accumulation_steps: int | None = Field(None, ge=1)
    gradient_clipping: float | None = None


class FSDPSection(Section):
    """The key `fsdp_config`."""

    fsdp_sharding_strategy: str | int | None = None
    fsdp_auto_wrap_policy: str | None = None
    fsdp_transformer_layer_cls_to_wrap: str | None = None
    fsdp_state_dict_type: str | None = None
    fsdp_backward_prefetch: str | None = None
    fsdp_backward_prefetch_policy: str | None = None
    fsdp_forward_prefetch: bool | None = None
    fsdp_cpu_ram_efficient_loading: bool | None = None
    fsdp_sync_module_states: bool | None = None
    fsdp_use_orig_params: bool | None = None
    fsdp_min_num_params: int | None = None
    fsdp_version: Literal[1] | None = None


class AccelerateFile(Section):
    """The file. What is about other machines than the launcher's own has one value, which means nothing."""

    compute_environment: Literal["LOCAL_MACHINE"] = "LOCAL_MACHINE"
    distributed_type: Distributed | None = None
    num_processes: int | None = Field(None, ge=1)
    num_machines: int | None = Field(None, ge=1)
    machine_rank: int | None = Field(None, ge=0)
    main_process_ip: str | None = None
    main_process_port: int | None = Field(None, ge=1, le=65535)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    use_cpu: bool | None = None
    deepspeed_config: DeepSpeedSection = DeepSpeedSection()
    fsdp_config: FSDPSection = FSDPSection()
    main_training_function: str | None = None
    rdzv_backend: str | None = None
    same_network: bool | None = None
    debug: bool | None = None
    enable_cpu_affinity: bool | None = None


_REFUSED = {
    "gpu_ids": "chooses devices, which CUDA_VISIBLE_DEVICES does",
    "downcast_bf16": "rounds what stays in fp32 here",
    "dynamo_backend": "compiles the model, which is not here",
    "dynamo_config": "compiles the model, which is not here",
    "fp8_config": "trains in fp8, which is not here",
    "megatron_lm_config": "is of another trainer",
    "mpirun_config": "starts processes in another way",
    "ipex_config": "is of Intel's devices",
    "tpu_env": "is of TPUs",
    "tpu_name": "is of TPUs",
    "tpu_zone": "is of TPUs",
    "tpu_use_cluster": "is of TPUs",
    "tpu_use_sudo": "is of TPUs",
    "commands": "is of TPUs",
    "command_file": "is of TPUs",
    "deepspeed_config.deepspeed_hostfile": "names hosts; the command is started on each machine here",
    "deepspeed_config.deepspeed_inclusion_filter": "names hosts; the command is started on each machine here",
    "deepspeed_config.deepspeed_exclusion_filter": "names hosts; the command is started on each machine here",
    "deepspeed_config.deepspeed_moe_layer_cls_names": "is about mixtures of experts",
    "fsdp_config.fsdp_offload_params": "keeps parameters in the host's memory, which is not here",
    "fsdp_config.fsdp_activation_checkpointing": "recomputes blocks, which --gradient_checkpointing does",
}
"""Keys that would do something that is not here; a value that asks for nothing is taken."""


@dataclass(frozen=True)
class _Word:
    """A word of the file: its key, the value of the flag that it stands for, and its own value as text."""

    key: str
    value: Any
    shown: str


def with_file(flags: AccelerateFlags, problems: list[Problem]) -> AccelerateFlags:
    """The words of a command with those of its file, if it names one.

    Keeps CFG-001 to CFG-005 for what cannot be read and for keys that are not known, CFG-433 for values that would do
    something that is not here, CFG-342 for those that words of the command contradict; all at once.

    Raises:
        ConfigError: CFG-001, CFG-002, CFG-003, CFG-005.
    """
    path = flags.config_file
    if path is None or isinstance(path, Unread):
        return flags
    values = load_yaml(Path(path))
    problems += _refused(values, path)
    given: dict[str, Any] = {}
    for field, word in _words(parse(AccelerateFile, values, path)).items():
        ours = getattr(flags, field)
        if field not in flags.model_fields_set or isinstance(ours, Unread):
            given[field] = word.value
        elif ours != word.value and field not in _OF_THIS_MACHINE:
            said = f"{name_of(field)} is given" if ours is True else f"{name_of(field)} is {ours}"
            found = f"{said}, and {word.key} in {path} is {word.shown}."
            problems.append(Problem("CFG-342", found, "Make them agree, or remove one of them."))
    return flags.model_copy(update=given)


def _refused(values: Any, path: str) -> Iterator[Problem]:
    """Take keys out of the file's values that have no meaning here; CFG-433 for those that ask for something."""
    for key, why in _REFUSED.items():
        *parents, name = key.split(".")
        place = values
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None
        if not isinstance(place, dict) or name not in place:
            continue
        value = place.pop(name)
        if any(inner not in _OFF for inner in (value.values() if isinstance(value, dict) else [value])):
            yield Problem("CFG-433", f"{key} in {path} {why}.", "Remove it from the file.")


def _words(file: AccelerateFile) -> dict[str, _Word]:
    """The words that stand for a flag, by its field."""
    known, kind = AccelerateFlags.model_fields, file.distributed_type
    found = {
        name: _Word(name, value, str(value)) for name, value in file if name in known and name in file.model_fields_set
    }
    if file.use_cpu is not None:
        found["cpu"] = _Word("use_cpu", file.use_cpu, str(file.use_cpu).lower())
    sections: dict[str, Section] = {"deepspeed_config": file.deepspeed_config, "fsdp_config": file.fsdp_config}
    if kind is not None:  # which says what of the others counts, as there
        found["use_deepspeed"] = _Word("distributed_type", kind == "DEEPSPEED", kind)
        found["use_fsdp"] = _Word("distributed_type", kind == "FSDP", kind)
        counts = {"deepspeed_config": kind == "DEEPSPEED", "fsdp_config": kind == "FSDP"}
        sections = {name: section for name, section in sections.items() if counts[name]}
    for name, section in sections.items():
        for key, value in section:
            if key in known and value is not None:
                text = str(value).lower() if isinstance(value, bool) else str(value)
                found[key] = _Word(f"{name}.{key}", value if type(value) is int and key == "zero_stage" else text, text)
    return {field: word for field, word in found.items() if word.value is not None}
