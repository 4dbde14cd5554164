"""A pipeline's transformer divided over the processes of a script that torchrun has started.

Every process runs the script, encodes what it needs, computes its part of each step and decodes the same frames.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from mm.checkpoint.comm import Comm, ProcessGroupComm
from mm.config.layout import mesh_layout
from mm.config.model import Precision, WanConfig
from mm.config.place import ProcessPlace
from mm.config.rules.mesh import MESH_RULES
from mm.config.run.mesh import MeshRun
from mm.config.run.origins import Origins, Word
from mm.config.run.parallel import MeshSection
from mm.config.unread import broken
from mm.device.backend import Backend
from mm.errors import ConfigError, raise_all
from mm.generate.render import Processes
from mm.parallel.mesh import build_mesh
from mm.supervise.job import join_until_exit

MINUTES = 30
"""How long a collective may wait for the other processes."""
_WORDS = {
    "model.shape.num_heads": Word("num_heads", "config.json"),
    "parallel.context_size": Word("ulysses_degree * ring_degree"),
    "parallel.ulysses_size": Word("ulysses_degree"),
    "parallel.tensor_size": Word("tensor_degree"),
}


@dataclass(frozen=True)
class Degrees:
    """Degrees by which processes share a clip: heads for tokens, a ring of tokens, columns of the matrices."""

    ulysses: int = 1
    ring: int = 1
    tensor: int = 1

    @property
    def processes(self) -> int:
        """Processes that take part."""
        return self.ulysses * self.ring * self.tensor

    @classmethod
    def asked(cls, use_usp: bool, ulysses: int, ring: int, tensor: int, started: int) -> Degrees | None:
        """Degrees of a script's words on so many processes; None where each of these makes clips of its own.

        Args:
            use_usp: DiffSynth-Studio's word for Ulysses over all processes. ulysses, ring, tensor: degrees.
            started: processes.

        Raises:
            ConfigError: CFG-440 for degrees that are not those of the processes, CFG-441 for both ways to say them.
        """
        given = cls(ulysses, ring, tensor)
        if use_usp and given != cls():
            found = "use_usp and degrees say each how processes share a clip."
            raise ConfigError("CFG-441", found, "Give use_usp=True, which is ulysses_degree of all, or the degrees.")
        if use_usp:
            return cls(ulysses=started)
        if given == cls():
            return None
        if min(ulysses, ring, tensor) < 1 or given.processes != started:
            found = (
                f"ulysses_degree {ulysses} x ring_degree {ring} x tensor_degree {tensor} is {given.processes}, and "
                f"{started} {'process was' if started == 1 else 'processes were'} started."
            )
            how = f"Choose degrees whose product is {started}, or start the script with torchrun --nproc-per-node"
            raise ConfigError("CFG-440", found, f"{how} {max(given.processes, 1)}.")
        return given


class _DividedModel(MeshRun):
    """A model on processes, as the rules about these see it."""

    parallel: MeshSection
    shape: WanConfig
    precision: Precision

    @property
    def mesh(self) -> MeshSection:
        return self.parallel

    @property
    def wan(self) -> WanConfig:
        return self.shape

    @property
    def dtype(self) -> str:
        return self.precision


def divided(degrees: Degrees, wan: WanConfig, precision: Precision, backend: Backend, where: ProcessPlace) -> Processes:
    """Join the script's processes, unless it has done so itself; they part when it ends.

    Args:
        degrees: how they share a clip. wan: the transformer. precision: of its weights.
        backend: this process's device. where: this process's place.

    Raises:
        ConfigError: CFG-033 and CFG-034 for a model that does not divide so, CFG-090 and CFG-091 for processes that do
            not meet, CFG-442 where they were given different things.
    """
    context, is_hybrid = degrees.ulysses * degrees.ring, degrees.ring > 1
    section = MeshSection(
        tensor_size=degrees.tensor,
        context_size=context,
        context_algorithm=("hybrid" if degrees.ulysses > 1 else "ring") if is_hybrid else "ulysses",
        ulysses_size=degrees.ulysses if is_hybrid and degrees.ulysses > 1 else None,
    )
    words = _WORDS if is_hybrid else {**_WORDS, "parallel.context_size": Word("ulysses_degree")}
    run = _DividedModel(
        parallel=section, shape=wan, precision=precision, origins=Origins(words), world_size=where.world_size
    )
    raise_all(ConfigError, list(broken(MESH_RULES, run)))
    about = {"model": wan.model_dump(mode="json"), "precision": precision, "layout": section.model_dump(mode="json")}
    join_until_exit(where, backend.collective, backend.device, MINUTES, {"from_pretrained": about})
    comm = ProcessGroupComm(device=backend.device)
    require_alike(comm, "from_pretrained", about)
    mesh = contextlib.ExitStack().enter_context(build_mesh(mesh_layout(run), MINUTES, backend.device.type))
    return Processes(mesh, backend, comm, where.local_world_size)


def require_alike(comm: Comm, what: str, values: Mapping[str, Any]) -> None:
    """Compare what processes were given; one that goes its own way would leave the others waiting.

    Args:
        comm: the processes; every one calls this. what: was called. values: plain ones, images and lists of these.

    Raises:
        ConfigError: CFG-442 on every process where some differ, with their names.
    """
    mine = {name: _digest(value) for name, value in values.items()}
    everyone = comm.all_gather_object(mine)
    names = sorted(name for name in mine if any(other.get(name) != everyone[0][name] for other in everyone))
    if names:
        found = f"Processes give {what} different values of {', '.join(names)}."
        raise ConfigError("CFG-442", found, "Give every process the same; seed=None is drawn once for all of them.")


def _digest(value: Any) -> str:
    found = hashlib.blake2b(digest_size=16)
    for part in _bytes_of(value):
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.hexdigest()


def _bytes_of(value: Any) -> Iterable[bytes]:
    if isinstance(value, Image.Image):
        yield f"{value.mode} {value.size}".encode()
        yield value.tobytes()
    elif isinstance(value, Sequence) and not isinstance(value, str):
        yield f"{len(value)} values".encode()
        for one in value:
            yield from _bytes_of(one)
    elif isinstance(value, torch.Tensor):
        yield value.cpu().numpy().tobytes()
    else:
        yield repr(value).encode()
