"""Rules about LoRA: what adapters cannot be combined with."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mm.config.run.training import TrainingRun
from mm.errors import Problem


def _low_bits_are_not_sharded(run: TrainingRun) -> Iterator[Problem]:
    """CFG-106: FSDP2 gathers a block in one floating dtype, so 8-bit weights with their scales cannot be its shards."""
    if run.adapters is None or run.adapters.base_dtype is None or run.parallel.layerzero is None:
        return
    words = run.origins
    yield Problem(
        "CFG-106",
        f"{words['adapters.base_dtype'].with_value(run.adapters.base_dtype)} cannot be sharded by "
        f"{words['parallel.layerzero'].name}.",
        "Remove one of them: layer-zero shards a base in the run's precision, and tensor or pipeline parallelism "
        f"({words['parallel.tensor_size'].name}, {words['parallel.pipeline_size'].name}) divides one in 8 bits.",
    )


ADAPTER_RULES: tuple[Callable[[TrainingRun], Iterator[Problem]], ...] = (_low_bits_are_not_sharded,)
