"""The optimizer that fits how a model keeps its parameters."""

from __future__ import annotations

from mm.parallel.apply import ParallelModel
from mm.parallel.layerzero_optimizer import LayerZeroOptimizer
from mm.parallel.megatron_optimizer import MegatronOptimizer
from mm.parallel.optimizer import AdamWSettings, Optimizer


def make_optimizer(parallel: ParallelModel, settings: AdamWSettings) -> Optimizer:
    """AdamW for a model in megatron-core's DDP, or for one sharded by layer-zero."""
    return (MegatronOptimizer if parallel.zero is None else LayerZeroOptimizer)(parallel, settings)
