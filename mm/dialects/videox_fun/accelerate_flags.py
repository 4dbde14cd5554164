"""The flags of `accelerate launch` that VideoX-Fun's commands give, with their names there."""

from __future__ import annotations

from typing import ClassVar, Literal

from mm.config.flags import Flags
from mm.dialects.meaning import refused, taken, used

_SHARDED = "how layer-zero works anyway"
_SAVED = "checkpoints are whole under every layout"


class AccelerateFlags(Flags):
    """Start a script of VideoX-Fun on the devices of one or several machines."""

    underscores: ClassVar[bool] = True

    mixed_precision: Literal["no", "fp16", "bf16"] | None = used("model.precision")
    num_processes: int | None = used(ge=1)
    num_machines: int = used(default=1, ge=1)
    machine_rank: int = used(default=0, ge=0)
    main_process_ip: str | None = used()
    main_process_port: int | None = used(ge=1, le=65535)
    multi_gpu: bool = taken("--num_processes says how many", False)
    cpu: bool = used("training.device", default=False)
    module: bool = used(default=False)
    num_cpu_threads_per_process: str | None = taken("OMP_NUM_THREADS says how many")
    config_file: str | None = used()
    gpu_ids: str | None = refused("chooses devices", "Set CUDA_VISIBLE_DEVICES instead.")
    use_deepspeed: bool = used("parallel.distributed_optimizer", default=False)
    deepspeed_config_file: str | None = used()
    deepspeed_multinode_launcher: str | None = used()
    zero_stage: int | None = used("parallel.layerzero", ge=0, le=3)
    zero3_init_flag: str | None = taken(_SHARDED)
    zero3_save_16bit_model: str | None = taken(_SAVED)
    offload_optimizer_device: str | None = used()
    offload_param_device: str | None = used()
    gradient_accumulation_steps: str | None = used("data.global_batch_size")
    gradient_clipping: str | None = taken("--max_grad_norm says it")
    use_fsdp: bool = used("parallel.layerzero", default=False)
    fsdp_sharding_strategy: str | None = used()
    fsdp_auto_wrap_policy: str | None = taken(_SHARDED)
    fsdp_transformer_layer_cls_to_wrap: str | None = taken(_SHARDED)
    fsdp_state_dict_type: str | None = taken(_SAVED)
    fsdp_backward_prefetch: str | None = taken(_SHARDED)
    fsdp_cpu_ram_efficient_loading: str | None = taken(_SHARDED)
    fsdp_sync_module_states: str | None = taken(_SHARDED)
    fsdp_use_orig_params: str | None = taken(_SHARDED)
