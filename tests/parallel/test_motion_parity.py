"""The loss of motion on layouts: losses, gradients, norms and weights of one process, which takes frames as they are.

Samples have frames of 15 tokens, of which a rank may hold less than one, and single frames, which have no such loss.
"""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from matrix import Matrix
from packed_rows import ONE, TWO, packed
from parity import ANY, MIXED, ODD, Row
from test_parity import OVERLAPPED, PLAIN, SHARDED, layout, pp, ring, sp, ulysses, usp

from mm.config.diffusion import DiffusionConfig
from mm.config.layerzero import ZeroConfig
from mm.config.recompute import Recompute
from mm.diffusion.motion import motion_squares

MOTION = DiffusionConfig(motion_loss_ratio=0.4)
ROWS = [
    replace(row, objective=MOTION)
    for row in [
        Row(layout(1), micro_batch_size=2),
        packed(1, TWO),
        Row(layout(1), model_type="ti2v", micro_batch_size=2),
        Row(layout(2), OVERLAPPED, samples=MIXED),
        Row(layout(2, **ulysses(2)), samples=MIXED),
        Row(layout(2, **ring(2)), micro_batch_size=2),
        Row(layout(2, tp_size=2)),
        Row(layout(2, **sp(2)), samples=MIXED),
        Row(layout(2, **pp(2)), samples=MIXED),
        Row(layout(2, zero3_size=2), PLAIN, ZeroConfig(zero3_size=2)),
        Row(layout(2, **ring(2)), model_type="ti2v", micro_batch_size=2),
        Row(layout(2, **sp(2)), model_type="fun_control_ref"),
        packed(2, **ulysses(2)),
        packed(2, TWO, **ring(2)),
        packed(4, TWO, **sp(2), **ring(2)),
        packed(4, ONE, model_type="ti2v", **usp(2, 2)),
        packed(4, TWO, OVERLAPPED, **pp(2, 2), **ulysses(2)),
        Row(layout(3, **ring(3)), samples=ANY),
        Row(layout(4, **usp(2, 2)), samples=MIXED),
        Row(layout(4, **sp(2), **ulysses(2)), SHARDED, samples=ANY),
        Row(layout(4, **sp(2), **pp(2, 2)), SHARDED, recompute=Recompute()),
        Row(layout(8, **ring(8, window_size=4)), samples=ODD),
        Row(layout(8, **sp(2), **usp(2, 2)), samples=MIXED),
    ]
]
EVERY_DAY = [ROWS[7]]
"""Where frames lie on several ranks. The others are nightly."""
MATRIX = Matrix(ROWS, EVERY_DAY)


@pytest.mark.parametrize("row", MATRIX.cases())
def test_equals_one_process(row: Row) -> None:
    MATRIX.check(row)


@pytest.mark.parametrize("of_frame", [4, 5])
@pytest.mark.parametrize("cuts", [(0, 20), (0, 2, 9, 9, 13, 20), tuple(range(21))], ids=["whole", "parts", "tokens"])
def test_parts_of_tokens_add_up_to_torch_s_difference_and_its_gradient(of_frame: int, cuts: tuple[int, ...]) -> None:
    """Values and gradients of frames as they are, in fp64, with and without the first frame of one of two samples."""
    error = torch.randn(2, 20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    frames = 20 // of_frame
    for given in (None, torch.tensor([1.0, 0.0], dtype=torch.float64)):
        own, plain = (error.clone().requires_grad_() for _ in range(2))
        parts = [motion_squares(own[:, a:b], error, a, of_frame, given) for a, b in pairwise(cuts)]
        squares = plain.view(2, frames, of_frame, 3).diff(dim=1).square()
        kept = torch.ones(2, frames - 1, 1, 1, dtype=torch.float64)
        if given is not None:
            kept[:, 0] = given.view(2, 1, 1)
        expected = (kept * squares).sum(dim=(1, 2, 3))
        found = torch.stack(parts).sum(dim=0)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
        (found * torch.tensor([1.0, 3.0])).sum().backward()
        (expected * torch.tensor([1.0, 3.0])).sum().backward()
        torch.testing.assert_close(own.grad, plain.grad, rtol=1e-12, atol=1e-14)
