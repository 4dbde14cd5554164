"""Rules about LoRA: flags that belong together, their values, and what adapters cannot be combined with."""

from __future__ import annotations

from collections.abc import Iterator

from mm.config.request import Request
from mm.errors import Problem

_EXAMPLE = "--lora-r 16 --lora-alpha 16 --lora-target-modules q k v o --load-base-model TRANSFORMER"


def _flags_belong_together(request: Request) -> Iterator[Problem]:
    """CFG-104: adapters have a width, an alpha, linears and a base model."""
    flags = request.flags
    if not flags.lora:
        return
    needed = {
        "--lora-r": flags.lora_r is not None,
        "--lora-alpha": flags.lora_alpha is not None,
        "--lora-target-modules": bool(flags.lora_target_modules),
        "--load-base-model": flags.load_base_model is not None,
    }
    missing = [name for name, given in needed.items() if not given]
    if missing:
        remedy = f"Give all of {_EXAMPLE}, or none of LoRA's flags."
        if "--load-base-model" in missing and flags.load is not None:
            remedy += " The base model belongs to --load-base-model; --load is for adapters to start from."
        yield Problem("CFG-104", f"LoRA needs {' and '.join(missing)} as well.", remedy)


def _base_model_is_of_adapters(request: Request) -> Iterator[Problem]:
    """CFG-105: only LoRA has a base model."""
    if request.flags.load_base_model is not None and not request.flags.lora:
        yield Problem(
            "CFG-105",
            "--load-base-model has no effect without LoRA.",
            f"To train adapters give {_EXAMPLE}; to train all parameters give the weights to --load.",
        )


def _values_are_in_range(request: Request) -> Iterator[Problem]:
    """CFG-102 and CFG-103: a width, a scale, and no dropout."""
    rank, alpha, dropout = request.flags.lora_r, request.flags.lora_alpha, request.flags.lora_dropout
    if rank is not None and rank < 1:
        yield Problem("CFG-102", f"--lora-r is {rank}, expected 1 or more.", "Use 16, for example.")
    if alpha is not None and alpha <= 0:
        found = f"--lora-alpha is {alpha}, expected a number above 0."
        yield Problem("CFG-102", found, "Use the value of --lora-r, which scales the update by 1.")
    if dropout:
        found = f"--lora-dropout is {dropout}; dropout is not offered, as its masks would depend on the layout."
        yield Problem("CFG-103", found, "Remove it, or give 0.")


def _low_bits_are_not_sharded(request: Request) -> Iterator[Problem]:
    """CFG-106: FSDP2 gathers a block in one floating dtype, so 8-bit weights with their scales cannot be its shards."""
    flags = request.flags
    if flags.lora_base_dtype is not None and flags.layerzero:
        yield Problem(
            "CFG-106",
            f"--lora-base-dtype {flags.lora_base_dtype} cannot be sharded by --layerzero.",
            "Remove one of them: layer-zero shards a base in the run's precision, and tensor or pipeline parallelism "
            "(--tensor-model-parallel-size, --pipeline-model-parallel-size) divides one in 8 bits.",
        )


LORA_RULES = (_flags_belong_together, _base_model_is_of_adapters, _values_are_in_range, _low_bits_are_not_sharded)
