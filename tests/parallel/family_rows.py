"""Rows of the parity matrix of the tasks whose features enter in ways of their own: tokens in front of the video's,
tokens added to, a stream beside it, and timesteps of tokens."""

from parity import ANY, MIXED, ODD, REFERENCED, Row
from test_parity import OVERLAPPED, PLAIN, SHARDED, layout, pp, ring, sp, ulysses, usp

from mm.config.layerzero import ZeroConfig
from mm.config.recompute import Recompute

FULL = Recompute()
OFFLOAD = Recompute(full_layers=0, keep_layers=None, kept="q,k,v,O", offload=True)

TASKS = ["fun_control_ref", "fun_camera", "vace", "ti2v"]
"""Those with an entry of their own."""
OTHERS = ["fun_control", "wan22_i2v"]
"""Those whose features enter as those of other tasks do."""


def rows(task: str) -> list[Row]:
    """Every axis alone, two combined, layer-zero, recomputation with offload, packed."""
    of = {"model_type": task}
    # With samples of two tokens the bias of the image keys has a gradient that is rounding and little else.
    packable = ODD if task == "fun_camera" else ANY
    return [
        Row(layout(1), SHARDED, micro_batch_size=2, recompute=OFFLOAD, **of),
        Row(layout(1), samples=packable, packs=((3, 1),), recompute=OFFLOAD, **of),
        Row(layout(2), OVERLAPPED, samples=MIXED, recompute=FULL, **of),
        Row(layout(2, **ulysses(2)), **of),
        Row(layout(2, **ring(2)), samples=MIXED, **of),
        Row(layout(2, tp_size=2), recompute=FULL, **of),
        Row(layout(2, **sp(2)), **of),
        Row(layout(2, **pp(2)), samples=MIXED, **of),
        Row(layout(2, **pp(2, 2)), OVERLAPPED, recompute=OFFLOAD, **of),
        Row(layout(2, zero3_size=2), PLAIN, ZeroConfig(zero3_size=2), samples=MIXED, **of),
        Row(layout(2, **sp(2)), samples=packable, packs=((3, 1),), **of),
        Row(layout(2, **ring(2)), samples=packable, packs=((4,),), recompute=FULL, **of),
        Row(layout(4, **usp(2, 2)), samples=MIXED, **of),
        Row(layout(4, **sp(2), **pp(2, 2)), SHARDED, recompute=FULL, **of),
        Row(layout(4, **pp(2, 1, ((3, 1),)), **ring(2)), samples=MIXED, **of),
        Row(layout(4, zero3_size=2, **pp(2, 2)), PLAIN, ZeroConfig(zero3_size=2), samples=ODD, **of),
        Row(layout(8, **sp(2), **ulysses(2), **pp(2)), OVERLAPPED, recompute=OFFLOAD, **of),
    ]


def referenced() -> list[Row]:
    """VACE with references: samples of one clip size whose tokens differ by the frames in front."""
    of = {"model_type": "vace", "samples": REFERENCED}
    return [
        Row(layout(1), packs=((3, 1),), recompute=OFFLOAD, **of),
        Row(layout(2), OVERLAPPED, recompute=FULL, **of),
        Row(layout(2, **ulysses(2)), **of),
        Row(layout(2, **ring(2)), **of),
        Row(layout(2, **sp(2)), recompute=FULL, **of),
        Row(layout(2, **pp(2, 2)), **of),
        Row(layout(2, zero3_size=2), PLAIN, ZeroConfig(zero3_size=2), **of),
        Row(layout(2, **sp(2)), packs=((3, 1),), **of),
        Row(layout(2, **ring(2)), packs=((4,),), recompute=FULL, **of),
        Row(layout(4, **usp(2, 2)), **of),
        Row(layout(4, **sp(2), **pp(2)), SHARDED, recompute=FULL, **of),
        Row(layout(4, **pp(2), **ring(2)), packs=((3, 1),), **of),
    ]


ROWS = (
    [row for task in TASKS for row in rows(task)]
    + referenced()
    + [
        row
        for task in OTHERS
        for row in (
            Row(layout(1), recompute=OFFLOAD, model_type=task),
            Row(layout(2, **ulysses(2)), samples=MIXED, model_type=task),
            Row(layout(2, **ring(2)), model_type=task),
            Row(layout(2, **sp(2)), model_type=task),
            Row(layout(2, **pp(2, 2)), OVERLAPPED, model_type=task),
            Row(layout(2, zero3_size=2), PLAIN, ZeroConfig(zero3_size=2), model_type=task),
            Row(layout(2, **ring(2)), samples=ANY, packs=((3, 1),), model_type=task),
            Row(layout(4, **sp(2), **pp(2)), SHARDED, recompute=FULL, model_type=task),
        )
    ]
)
EVERY_DAY = [
    row
    for row in ROWS
    if row.layout.world_size == 2 and row.model_type == "vace" and row.packs == () and row.samples != REFERENCED
]
"""The others are nightly."""
