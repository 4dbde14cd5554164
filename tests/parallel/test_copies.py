"""A block moves no activation that it could leave where it is, as training puts it together on one rank."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mm.config.model import WanConfig
from mm.ops.attention.segments import Segment, Segments
from mm.parallel.context import ContextGroups, context_attention
from mm.wan.block import WanBlock
from mm.wan.layers import ModuleFactories
from mm.wan.rope import grid_positions

GRID, TOKENS = (2, 6, 8), 96
CONFIG = WanConfig(hidden_size=192, ffn_dim=384, num_heads=4, num_layers=1)
MOVES = ("clone", "copy_", "constant_pad_nd", "cat", "stack", "index")


class CountMoves(TorchDispatchMode):
    """The operators that write an activation again as it is. Casts are not among them: they change it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in MOVES and result.numel() >= TOKENS * CONFIG.head_dim:
            self.seen.append(name)
        return result


def moves(dtype: torch.dtype, places: int) -> list[str]:
    """Of forward and backward of a block whose rank has so many places for the tokens."""
    block = WanBlock(CONFIG, ModuleFactories(self_attention=context_attention(ContextGroups(None, None, None, 1))))
    for parameter in block.parameters():
        parameter.data = parameter.data.to(dtype)
    x = torch.randn(1, places, CONFIG.hidden_size, dtype=dtype, requires_grad=True)
    time = torch.randn(1, 6, CONFIG.hidden_size, requires_grad=True)
    context = torch.randn(1, 8, CONFIG.hidden_size, dtype=dtype, requires_grad=True)
    positions = grid_positions((1, 1, places), CONFIG.head_dim)
    positions = type(positions)(positions.cos, positions.sin, Segments((Segment(TOKENS, places),)))
    with CountMoves() as counted:
        out = block(x, time, context, positions)
        torch.autograd.grad(out, (x, time, context, *block.parameters()), torch.randn_like(out))
    return counted.seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_moved(dtype: torch.dtype) -> None:
    assert moves(dtype, TOKENS) == []


def test_the_counter_sees_what_padding_moves() -> None:
    assert "constant_pad_nd" in moves(torch.bfloat16, TOKENS + 2)
