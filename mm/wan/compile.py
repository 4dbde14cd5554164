"""Compiles the blocks of a stage with torch.compile, each by itself.

What a compiler can fuse is traced: elementwise operators, whole linears, GELU. Attention (an `ActivationPolicy` has
effects in Python) and everything that talks to other ranks stay outside the graphs, which call them: a block becomes
seven graphs with eager calls between them, with tensor parallelism five. A compiled function saves for backward
through the same hooks as any other, so recomputation and offload need to know nothing of it. Sums are added in another
order than eagerly, so the last bits of a compiled run are its own; the second run of a recomputed block is the same
code again, and changes none.

All blocks share their graphs, and each number of tokens has its own. Graphs for any number would be fewer, but a
recomputed block must meet the graph of its first run again: a number that two graphs would take, one made for it and
one for any, stops the run in backward (pytorch issue 166926).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from mm.config.model import WanConfig
from mm.wan.block import WanBlock
from mm.wan.initial import initial_value
from mm.wan.layers import ModuleFactories
from mm.wan.precision import keep_fp32
from mm.wan.rope import grid_positions

_VARIANTS = 4  # of a number of tokens: blocks that keep attention, or not; of the first stage, or of those that receive

_TINY = WanConfig(text_dim=8, text_len=4, hidden_size=32, ffn_dim=48, num_heads=2, num_layers=1, freq_dim=16)
_GRID = (2, 2, 3)
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Of the largest element. What is found is a compiler that computes something else, not its rounding."""


def graphs_needed(num_sizes: int, pipeline: bool) -> int:
    """Number of times that the code of a block is compiled, at most.

    Args:
        num_sizes: different numbers of tokens that the samples have.
        pipeline: whether blocks get what was sent to their stage, whose strides tell the step's largest sample too.
    """
    return num_sizes * (num_sizes if pipeline else 1) * _VARIANTS


def most_graphs() -> int:
    """Number of graphs of one function that torch keeps."""
    from torch._dynamo import config as dynamo_config  # a second of importing, for runs that compile alone

    return int(dynamo_config.accumulated_recompile_limit)


def compile_blocks(blocks: Iterable[WanBlock], num_graphs: int, tensor_parallel: bool) -> None:
    """Let each block be compiled when it first runs. In place: names, hooks and later `fully_shard` stay as they are.

    Args:
        blocks: of a stage.
        num_graphs: `graphs_needed`; what would need more runs eagerly, with a warning of torch.
        tensor_parallel: whether linears and the norms of queries and keys talk to other ranks.
    """
    for block in blocks:
        _keep_outside(block, tensor_parallel)
        block.compile(dynamic=False, recompile_limit=num_graphs)


def _keep_outside(block: WanBlock, tensor_parallel: bool) -> None:
    """Mark what graphs call and do not contain: what keeps things for recomputation or talks to other ranks."""
    disable = torch.compiler.disable
    block.self_attn.attention = disable(block.self_attn.attention)
    block.cross_attn.attention = disable(block.cross_attn.attention)
    if tensor_parallel:
        # Between their messages only q, k, v and o are left, which are matrix products with nothing to fuse.
        for module in (block.self_attn, block.cross_attn, block.ffn[2]):
            module.forward = disable(module.forward)
        block.ffn.columns = disable(block.ffn.columns)


def try_compiling(device: torch.device, dtype: torch.dtype) -> str | None:
    """Compile a small block, run it forward and backward, and compare it with the eager one.

    Args:
        device: where. dtype: of the bulk of the parameters.

    Returns:
        None when it works, else the first line of what went wrong: no C++ compiler, no Triton, a backend's error, or
        numbers that differ.
    """
    try:
        expected = _run(device, dtype, compiled=False)
        found = _run(device, dtype, compiled=True)
    except Exception as error:  # compilers fail in ways of their own, and eager blocks need none of them
        text = str(error).strip() or "no message"
        return f"{type(error).__name__}: {text.splitlines()[0]}"
    finally:
        torch.compiler.reset()  # its graphs would only be looked through
    off = max(_distance(f, e) for f, e in zip(found, expected, strict=True))
    if not off <= _TOLERANCE[dtype]:
        return f"a compiled block differs from the eager one by {off:.1e} of the largest element"
    return None


def _run(device: torch.device, dtype: torch.dtype, compiled: bool) -> list[Tensor]:
    """Output and gradients of the small block."""
    block = WanBlock(_TINY, ModuleFactories())
    for name, parameter in block.named_parameters():
        value = initial_value(f"blocks.0.{name}", parameter.shape, 0)
        parameter.data = value.to(device, torch.float32 if keep_fp32(f"blocks.0.{name}") else dtype)
    width, tokens = _TINY.hidden_size, math.prod(_GRID)
    x, time, context = (
        initial_value(name, (1, size, width), 0).to(device, kind).requires_grad_()
        for name, size, kind in (
            ("probe.hidden", tokens, dtype),
            ("probe.time", 6, torch.float32),
            ("probe.text", _TINY.text_len, dtype),
        )
    )
    if compiled:
        compile_blocks([block], num_graphs=1, tensor_parallel=False)
    out = block(x, time, context, grid_positions(_GRID, _TINY.head_dim, device))
    leaves = [x, time, context, *block.parameters()]
    return [out.detach(), *torch.autograd.grad(out.float().square().mean(), leaves)]


def _distance(found: Tensor, expected: Tensor) -> float:
    difference = (found.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max().clamp_min(1e-12))
