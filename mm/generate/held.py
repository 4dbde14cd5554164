"""The transformer on the mesh with its weights where a section says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from mm.config.layerzero import ZeroConfig
from mm.config.model import WanConfig
from mm.config.run.generation import GenerationRun, latent_size
from mm.config.run.residency import Residency
from mm.generate.render import Processes
from mm.generate.weights import GenerationWeights
from mm.ops.attention.api import Attend, attention
from mm.ops.attention.sage import open_sage
from mm.parallel.apply import ParallelModel, ValueOf, WriteValue, apply_frozen
from mm.parallel.velocity import ParallelVelocity
from mm.residency.budget import Room, forward_bytes, plan_weights
from mm.residency.hold import HeldWeights, WeightValues, hold_weights
from mm.wan.encoders import DTYPES
from mm.wan.model import WanModel


def held_velocity(run: GenerationRun, processes: Processes, weights: GenerationWeights, room: Room) -> ParallelVelocity:
    """A transformer on the mesh.

    Args:
        run: the generation. processes: where. weights: of the transformer.
        room: memory for it, beside what is neither a transformer nor its forward.

    Raises:
        ConfigError: CFG-373 and CFG-374 for limits that cannot be kept, CFG-324 and CFG-325 for SageAttention where it
            is not.
        CheckpointError: CKPT-016 and CKPT-120 for values that cannot be used.
    """
    backend, mesh, dtype = processes.backend, processes.mesh, DTYPES[run.model.precision]
    tokens = run.wan.num_tokens(latent_size(run.output.size, run.wan.task.latent_pixels))
    batch = run.batch.size * (2 if run.sampling.batched_guidance else 1)
    working = forward_bytes(run.wan, mesh.tokens.width(tokens), batch, dtype.itemsize)
    attend = open_sage(backend.device, dtype) if run.sampling.attention == "sage" else attention
    held = run.wan, processes, weights, dtype, run.residency, replace(room, beside=room.beside + working)
    return ParallelVelocity(hold_on_mesh(*held, zero=run.zero, attend=attend))


def hold_on_mesh(
    wan: WanConfig,
    processes: Processes,
    weights: GenerationWeights,
    dtype: torch.dtype,
    residency: Residency,
    room: Room,
    *,
    zero: ZeroConfig | None = None,
    attend: Attend = attention,
) -> ParallelModel:
    """This rank's part of a transformer that is only run.

    Args:
        wan: its shape. processes: where. weights: its own, in fp8 where `residency` says so. dtype: of their bulk.
        residency: where they are, checked. room: memory for them. zero: layer-zero, which divides them itself.
        attend: self attention to a whole sequence.

    Raises:
        ConfigError: CFG-373 and CFG-374 for limits that cannot be kept.
        CheckpointError: CKPT-016 and CKPT-120 for values that cannot be used.
    """
    backend = processes.backend

    def put(model: WanModel, writer: Callable[[ValueOf], WriteValue]) -> HeldWeights:
        values = WeightValues(writer(weights.value_of), writer(weights.again()))
        plan = plan_weights(model, residency, room)
        return hold_weights(model, plan, backend, values)

    extension = None if weights.fp8 is None else weights.fp8.extension()
    place = wan, processes.mesh, backend, dtype, weights.value_of, zero
    return apply_frozen(*place, extension=extension, put=put if zero is None else None, attend=attend)


def parameter_bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(parameter.numel() * parameter.itemsize for parameter in module.parameters())
