"""Every rank streams its own shard: bits are those of a model whose weights are all on the device."""

from typing import Any

import torch
from held_models import SIZE, TINY, WITH_SIDES, inputs, write
from ranks import run_ranks

from mm.config.layout import Layout
from mm.config.place import process_place
from mm.device.backend import select
from mm.parallel.apply import apply_frozen
from mm.parallel.mesh import build_mesh
from mm.parallel.velocity import ParallelVelocity
from mm.residency.hold import WeightValues, hold_weights
from mm.residency.plan import WeightPlan, evenly
from mm.supervise.job import Job
from mm.wan.inputs import ModelInputs

LAYOUTS = [
    Layout(2, cp_size=2, ulysses_size=2),
    Layout(2, cp_size=2),
    Layout(2, tp_size=2),
    Layout(2, tp_size=2, sequence_parallel=True),
]


def value_of(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    value = torch.empty(shape)
    write(name, value)
    return value


def compared() -> list[tuple[bool, int, int]]:
    """For each layout and model whether bits are equal, and bytes copied in a forward here and of a whole model."""
    backend, found = select("cpu"), []
    assert SIZE == (2, 6, 8)
    with Job(process_place(), backend.collective, backend.device, 2):
        for layout in LAYOUTS:
            for wan in (TINY, WITH_SIDES):
                blocks = wan.num_layers + len(wan.side_blocks)
                plan, held = WeightPlan(evenly(blocks, blocks), frozenset({1, 2})), []

                def put(model: Any, writer: Any, plan: Any = plan, held: Any = held) -> None:
                    values = WeightValues(writer(value_of), writer(value_of))
                    held.append(hold_weights(model, plan, backend, values))

                with build_mesh(layout, 2, "cpu") as mesh:
                    place: Any = wan, mesh, backend, torch.float32, value_of
                    streamed = ParallelVelocity(apply_frozen(*place, put=put))
                    resident = ParallelVelocity(apply_frozen(*place))
                    same = True
                    for seed in range(2):
                        given = inputs(wan, seed)
                        parts = [given.pop(name) for name in ("latents", "timestep", "text")]
                        asked = ModelInputs(*parts, features=given)
                        same &= torch.equal(streamed(asked), resident(asked))
                found.append((same, plan.copied_bytes(held[0].blocks), held[0].stream.out_of_turn))
    return found


def test_ranks_stream_their_own_shards() -> None:
    results = run_ranks(2, compared, timeout_s=200)
    for rank in results:
        assert all(same and not out_of_turn for same, _, out_of_turn in rank)
        whole, halves = [copied for _, copied, _ in rank[:4]], [copied for _, copied, _ in rank[4:]]
        assert all(half < 0.62 * all_of for half, all_of in zip(halves, whole, strict=True))
