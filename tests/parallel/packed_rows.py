"""Layouts on which several samples share a sequence, beside one process that computes them one by one.

Sizes of samples are `parity.ANY`: 45, 2, 7 and 12 tokens, captions of 1, 4 and 7; two are single frames, and one has
fewer tokens than there are context-parallel ranks. Numbers of samples differ between micro-batches and replicas, so a
loss that weighs micro-batches alike is another one.
"""

from parity import ANY, Row
from test_parity import OVERLAPPED, PLAIN, SHARDED, layout, pp, ring, sp, ulysses, usp

from mm.config.layerzero import ZeroConfig
from mm.config.recompute import Recompute

ONE, TWO = ((4,),), ((3, 1),)
REPLICAS = ((3,), (1,))
FOUR = ((1, 2, 3, 2),)  # twice the samples
KEEP = Recompute(full_layers=1, keep_layers=1, kept="q,k,v,O")
OFFLOAD = Recompute(full_layers=0, keep_layers=None, offload=True)


def packed(world: int, packs: tuple[tuple[int, ...], ...] = ONE, options=PLAIN, **degrees) -> Row:
    of_row = {name: degrees.pop(name) for name in ("zero", "recompute", "model_type") if name in degrees}
    return Row(layout(world, **degrees), options, samples=ANY, packs=packs, **of_row)


ROWS = [
    packed(1),
    packed(1, TWO),
    packed(1, model_type="i2v"),
    packed(1, TWO, recompute=Recompute()),
    packed(1, TWO, recompute=KEEP),
    packed(1, TWO, recompute=OFFLOAD),
    packed(2, **ulysses(2)),
    packed(2, TWO, **ring(2)),
    packed(2, TWO, tp_size=2),
    packed(2, **sp(2)),
    packed(2, TWO, **pp(2)),
    packed(2, TWO, OVERLAPPED, **pp(2, 2)),
    packed(2, REPLICAS, OVERLAPPED),
    packed(2, REPLICAS, SHARDED),
    packed(2, REPLICAS, zero=ZeroConfig(zero3_size=2), zero3_size=2),
    packed(2, TWO, recompute=OFFLOAD, **ring(2)),
    packed(2, model_type="speedcontrol", **sp(2)),
    packed(3, **ring(3)),
    packed(3, TWO, **ulysses(3)),
    packed(4, **usp(2, 2)),
    packed(4, TWO, model_type="flf2v", **sp(2), **ring(2)),
    packed(4, model_type="i2v", **sp(2), **ulysses(2)),
    packed(4, TWO, SHARDED, **sp(2), **pp(2)),
    packed(4, TWO, OVERLAPPED, model_type="i2v", **pp(2, 2), **ulysses(2)),
    packed(4, FOUR, recompute=OFFLOAD, **pp(2, 2), **ring(2)),
    packed(4, REPLICAS, zero=ZeroConfig(zero3_size=2), zero3_size=2, recompute=KEEP, **ring(2)),
    packed(4, **ring(4, window_size=2, send_recv_overlap=True)),
]
