"""The optimizer that fits how a model keeps its parameters."""

from __future__ import annotations

from mm.optim.layerzero import LayerZeroOptimizer
from mm.optim.megatron import MegatronOptimizer
from mm.optim.optimizer import Optimizer
from mm.optim.settings import UpdateSettings
from mm.parallel.apply import ParallelModel


def make_optimizer(parallel: ParallelModel, settings: UpdateSettings) -> Optimizer:
    """The optimizer of a model in megatron-core's DDP, or for one sharded by layer-zero."""
    return (MegatronOptimizer if parallel.zero is None else LayerZeroOptimizer)(parallel, settings)
