"""The transformer on the mesh with its weights where a generation's section says."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mm.config.run.generation import GenerationRun, latent_size
from mm.device.backend import free_host_bytes
from mm.generate.render import Processes
from mm.generate.weights import GenerationWeights
from mm.parallel.apply import ValueOf, WriteValue, apply_frozen
from mm.parallel.velocity import ParallelVelocity
from mm.residency.budget import forward_bytes, plan_weights
from mm.residency.hold import HeldWeights, WeightValues, hold_weights
from mm.wan.encoders import DTYPES
from mm.wan.model import WanModel


def held_velocity(
    run: GenerationRun, processes: Processes, weights: GenerationWeights, beside: int, transformers: int
) -> ParallelVelocity:
    """A transformer on the mesh.

    Args:
        run: the generation. processes: where. weights: of the transformer.
        beside: bytes of device memory that are taken by what is neither a transformer nor its forward.
        transformers: of the run, which share the limits.

    Raises:
        ConfigError: CFG-373 and CFG-374 for limits that cannot be kept.
        CheckpointError: CKPT-016 and CKPT-120 for values that cannot be used.
    """
    backend, mesh, dtype = processes.backend, processes.mesh, DTYPES[run.model.precision]
    tokens = run.wan.num_tokens(latent_size(run.output.size, run.wan.task.latent_pixels))
    batch = run.batch.size * (2 if run.sampling.batched_guidance else 1)
    working = forward_bytes(run.wan, mesh.tokens.width(tokens), batch, dtype.itemsize)
    free_host = free_host_bytes() // processes.of_node

    def put(model: WanModel, writer: Callable[[ValueOf], WriteValue]) -> HeldWeights:
        values = WeightValues(writer(weights.value_of), writer(weights.again()))
        plan = plan_weights(model, run.residency, beside + working, free_host, transformers)
        return hold_weights(model, plan, backend, values)

    extension = None if weights.fp8 is None else weights.fp8.extension()
    place = run.wan, mesh, backend, dtype, weights.value_of, run.zero
    return ParallelVelocity(apply_frozen(*place, extension=extension, put=put if run.zero is None else None))


def parameter_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(parameter.numel() * parameter.itemsize for parameter in module.parameters())
