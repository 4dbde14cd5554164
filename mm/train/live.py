"""Features that are made while training goes on: who makes them, and how the other ranks of a replica get them.

The first rank of each replica reads, encodes and keeps; encoders stand nowhere else. What it has of a step the other
ranks of the replica get as one message.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, cast

from safetensors.torch import load, save
from torch import Tensor

from mm.checkpoint.comm import Comm, on_every_rank, on_rank_zero
from mm.config.rules.live import budget_bytes, live_extractions
from mm.config.run.training import TrainingRun
from mm.data.loader import FeatureBatch
from mm.data.packed import is_packed, pack, segments_of
from mm.data.sampler import DealtStep
from mm.data.steps import StepBatches
from mm.device.backend import Backend
from mm.parallel.mesh import Mesh
from mm.parallel.replica import from_first_of_replica, leads_replica
from mm.supervise.limits import PREPARING
from mm.supervise.watchdog import Watchdog

if TYPE_CHECKING:
    from mm.extract.live.opening import LiveStores

_OF_BATCH = ("sample", "draw", "index", "without_caption", "replaced", "place")


@contextmanager
def live_stores(
    sections: TrainingRun, mesh: Mesh, backend: Backend, comm: Comm, watch: Watchdog
) -> Iterator[LiveStores]:
    """The stores whose features the run makes, open; every rank calls it.

    Args:
        sections: the run, with a section `live`. mesh, backend: where it runs. watch: over this process.
        comm: the ranks over a group that waits as long as looking at all clips takes.

    Raises:
        ConfigError, DataError: what `mm.extract.live.opening.prepare` raises, on all ranks.
    """
    # only here: the encoders' libraries take a third of the time in which a training process starts
    from mm.extract.live.opening import LiveStores, prepare

    runs, budget = live_extractions(sections), budget_bytes(sections)
    with watch.during(PREPARING):
        kept = on_rank_zero(comm, lambda: sum(prepare(run) for run in runs))
    with LiveStores(runs) as stores:

        def begin() -> None:
            if leads_replica(mesh):
                left = None if budget is None else max(0, budget - kept) // mesh.layout.dp_size
                stores.can_make(backend.device, left)
                if sections.data.caption_dropout:
                    stores.make_empty_captions()

        with watch.during(PREPARING):
            on_every_rank(comm, begin)
        yield stores


def shared_steps(steps: Generator[StepBatches], mesh: Mesh, backend: Backend) -> Generator[StepBatches]:
    """The steps that the first rank of the replica reads, on all its ranks; the others' own are not read."""
    with closing(steps):
        if mesh.layout.tp_size * mesh.layout.cp_size * mesh.layout.pp_size == 1:
            yield from steps
            return
        leads = leads_replica(mesh)
        while True:
            own = next(steps, None) if leads else None
            content = from_first_of_replica(mesh, _written(own) if own is not None else b"", backend.device)
            if not content:
                return
            yield own if own is not None else _read(content)


def _written(step: StepBatches) -> bytes:
    """A step as bytes, without its noise: the ranks that need it draw it, which is cheaper than a message."""
    tensors: dict[str, Tensor] = {}
    batches = []
    for number, batch in enumerate(step.batches):
        said = []
        for place, segment in enumerate(segments_of(batch)):
            values: dict[str, Any] = dict(segment)
            found = {"latents": segment["latents"], "text": segment["text"], **segment["features"]}
            tensors |= {f"{number} {place} {name}": value.clone() for name, value in found.items()}  # of one memory
            said.append({name: values[name] for name in _OF_BATCH if name in values})
        batches.append({"packed": is_packed(batch), "segments": said})
    dealt = step.dealt
    about = {"batches": batches, "sizes": dealt.sizes, "most": dealt.most, "tokens": dealt.tokens}
    return save(tensors, {"step": json.dumps(about)})


def _read(content: bytes) -> StepBatches:
    tensors = load(content)
    length = int.from_bytes(content[:8], "little")
    about = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["step"])
    batches = []
    for number, batch in enumerate(about["batches"]):
        segments = []
        for place, said in enumerate(batch["segments"]):
            begin = f"{number} {place} "
            found = {name.removeprefix(begin): tensors[name] for name in tensors if name.startswith(begin)}
            latents, text = found.pop("latents"), found.pop("text")
            segments.append(cast(FeatureBatch, {"latents": latents, "text": text, "features": found, **said}))
        batches.append(pack(segments) if batch["packed"] else segments[0])
    return StepBatches(batches, DealtStep(tuple(about["sizes"]), about["most"], tuple(about["tokens"])))
