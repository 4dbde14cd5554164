"""Parts of a step on an accelerator: attention by backend, elementwise operators' bandwidth, copies to the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accel_bench import Bench, normal, relative, require
from results import Result, Target
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mm.config.model import WAN_1_3B, WAN_14B
from mm.device.queues import Queue, Queues, queues_of
from mm.ops.attention.api import (
    attention_backward,
    attention_with_lse,
    plain_attention_backward,
    plain_attention_with_lse,
)
from mm.ops.elementwise import reference
from mm.ops.elementwise.dispatch import operators_of
from mm.ops.elementwise.operators import HeadNorm
from mm.wan.rope import rope_tables

TOKENS, GRID = 32760, (21, 30, 52)  # of 480x832, 81 frames
TINY_TOKENS, TINY_GRID = 24, (2, 3, 4)
HEAD_DIM = 128
ATTENTION_BOUND = 2**-7  # bf16, largest error over largest value, as in tests/ops/test_lse_attention.py
OPERATOR_BOUND = 2**-8  # as in tests/ops/test_elementwise_autograd.py
ROWS_CHECKED = 256
ENGINE = "mm.ops.attention.api"

Pair = tuple[Callable[[], Any], Callable[[Any], Any]]
"""Forward, and backward of what forward gave."""


def engine_attention(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Pair:
    """What a training step calls."""
    return lambda: attention_with_lse(q, k, v), lambda kept: attention_backward(grad, q, k, v, *kept)


def torch_attention(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Pair:
    """torch's attention with one of its backends, through autograd."""
    inputs = [x.requires_grad_() for x in (q.detach(), k.detach(), v.detach())]

    def forward() -> tuple[Tensor, None]:
        with sdpa_kernel(backend):
            return reference.attention(*inputs), None

    def backward(kept: tuple[Tensor, None]) -> Any:
        with sdpa_kernel(backend):
            return torch.autograd.grad(kept[0], inputs, grad, retain_graph=True)

    return forward, backward


ATTENTIONS: dict[str, Callable[..., Pair]] = {
    ENGINE: engine_attention,
    "torch, cuDNN": partial(torch_attention, SDPBackend.CUDNN_ATTENTION),
    "torch, flash": partial(torch_attention, SDPBackend.FLASH_ATTENTION),
    "torch, efficient": partial(torch_attention, SDPBackend.EFFICIENT_ATTENTION),
}


def check_attention(pair: Pair, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> str:
    """Some rows of the output and of dq at full length against the plain reference in fp32."""
    forward, backward = pair
    kept = forward()
    dq = backward(kept)[0]
    rows = slice(0, None, max(q.shape[1] // ROWS_CHECKED, 1))
    wide = q[:, rows].float(), k.float(), v.float()
    out, lse = plain_attention_with_lse(*wide)
    expected = plain_attention_backward(grad[:, rows].float(), *wide, out, lse)[0]
    errors = relative(kept[0][:, rows], out), relative(dq[:, rows], expected)
    for name, error in zip(("the output of attention", "its gradient"), errors, strict=True):
        require(name, error, ATTENTION_BOUND)
    return f"{errors[0]:.0e}, {errors[1]:.0e}"


def attention_line(bench: Bench, name: str, heads: int, tokens: int) -> dict[str, Any]:
    """Check and time one implementation."""

    def run() -> dict[str, Any]:
        shape = (1, tokens, heads, HEAD_DIM)
        tensors = [normal(shape, key, bench.device, torch.bfloat16) for key in ("q", "k", "v", "gradient")]
        forward, backward = pair = ATTENTIONS[name](*tensors)
        try:
            checked = check_attention(pair, *tensors)
        except RuntimeError as error:  # torch has not every backend on every device
            if name == ENGINE:
                raise
            return {"result": f"refused: {str(error).splitlines()[0][:60]}"}
        forward_s, kept = bench.seconds(forward).median, forward()
        backward_s = bench.seconds(lambda: backward(kept)).median
        flops = 4 * tokens**2 * heads * HEAD_DIM / 1e12
        figures = {"forward TFLOP/s": flops / forward_s, "backward TFLOP/s": 2.5 * flops / backward_s}
        return {"bf16 - fp32": checked, **bench.figures(figures)}

    return bench.guarded({"attention": name, "heads": heads}, run)


def d1(bench: Bench) -> Result:
    """Attention forward and backward by implementation."""
    tokens = TINY_TOKENS if bench.tiny else TOKENS
    flops = "forward 4 s^2 heads width, backward 2.5 times that"
    result = bench.result("d1: attention", {"s": tokens, "head width": HEAD_DIM, "dtype": "bf16"}, flops)
    for heads in (2,) if bench.tiny else (WAN_1_3B.num_heads, WAN_14B.num_heads):
        lines = [attention_line(bench, name, heads, tokens) for name in ATTENTIONS]
        result.rows += lines
        if not bench.tiny:
            for column, bound in (("forward TFLOP/s", 560.0), ("backward TFLOP/s", 480.0)):
                found = lines[0].get(column)
                result.targets.append(Target(f"{heads} heads, {column}", found, bound, at_most=False))
    return result


@dataclass(frozen=True)
class Operator:
    """One direction of a fused operator.

    Attributes:
        name: of it. run: the call. plain: the reference's, on fp32 inputs; both give tuples whose first parts match.
        passes: tensors of T x D that it must read or write at least.
    """

    name: str
    run: Callable[[], tuple[Tensor, ...]]
    plain: Callable[[], tuple[Tensor, ...]]
    passes: int


def operators(bench: Bench, width: int, grid: tuple[int, int, int]) -> list[Operator]:
    """The three operators in both directions, on bf16 streams."""
    device, tokens = bench.device, math.prod(grid)
    x, y, grad = (normal((1, tokens, width), key, device, torch.bfloat16) for key in ("x", "y", "gradient"))
    scale, shift, gate = (normal((1, 1, width), key, device) for key in ("scale", "shift", "gate"))
    norm = normal((width,), "norm", device, torch.bfloat16)
    rotation = rope_tables(grid, HEAD_DIM, device)
    fused, eps, head_grad = operators_of(x), 1e-6, grad.unflatten(-1, (-1, HEAD_DIM))
    _, mean, rstd = fused.layer_norm(x, scale, shift, eps)
    of_heads = HeadNorm(HEAD_DIM, eps, width)
    _, root = fused.rms_norm_rope(x, norm, rotation, of_heads)

    def differentiate(function: Callable[..., Tensor], *inputs: Tensor, grad: Tensor) -> Callable[[], Any]:
        def run() -> tuple[Tensor, ...]:
            leaves = [value.detach().float().requires_grad_() for value in inputs]
            return torch.autograd.grad(function(*leaves), leaves, grad.float())

        return run

    def norm_rope(x: Tensor, weight: Tensor) -> Tensor:
        heads = reference.rms_norm(x, weight, eps).unflatten(-1, (-1, HEAD_DIM))
        return reference.apply_rope(heads, *rotation)

    def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return reference.modulate(x, shift, scale - 1, eps)

    return [
        Operator("layer_norm", lambda: fused.layer_norm(x, scale, shift, eps),
                 lambda: (modulated(x.float(), scale, shift),), 2),
        Operator("layer_norm, backward", lambda: fused.layer_norm_backward(grad, x, scale, mean, rstd),
                 differentiate(modulated, x, scale, shift, grad=grad), 3),
        Operator("gated_residual", lambda: (fused.gated_residual(x, y, gate),),
                 lambda: (reference.gated_residual(x.float(), y.float(), gate),), 3),
        Operator("gated_residual, backward", lambda: fused.gated_residual_backward(grad, y, gate),
                 differentiate(partial(reference.gated_residual, x.float()), y, gate, grad=grad), 3),
        Operator("rms_norm_rope", lambda: fused.rms_norm_rope(x, norm, rotation, of_heads),
                 lambda: (norm_rope(x.float(), norm.float()),), 2),
        Operator("rms_norm_rope, backward",
                 lambda: fused.rms_norm_rope_backward(head_grad, x, norm, rotation, root, of_heads),
                 differentiate(norm_rope, x, norm, grad=head_grad), 3),
    ]  # fmt: skip


def copy_rate(bench: Bench, num_bytes: int) -> float:
    """Bytes a second read and written by a copy on the device."""
    source = normal((num_bytes // 4,), "copied", bench.device)
    target = torch.empty_like(source)
    calls = 1 if bench.tiny else 20

    def run() -> None:
        for _ in range(calls):
            target.copy_(source)

    return 2 * num_bytes / bench.seconds(run, calls).median


def d2(bench: Bench) -> Result:
    """The elementwise operators' bandwidth: bytes that must be moved over the time, beside a copy on the device."""
    grid = TINY_GRID if bench.tiny else GRID
    tokens, calls = math.prod(grid), 1 if bench.tiny else 20
    result = bench.result("d2: bandwidth of the elementwise operators", {"s": tokens, "dtype": "bf16"})
    copied = copy_rate(bench, 2**16 if bench.tiny else 2**30)
    for width in (HEAD_DIM,) if bench.tiny else (WAN_1_3B.hidden_size, WAN_14B.hidden_size):
        for operator in operators(bench, width, grid):
            error = max(map(relative, operator.run(), operator.plain()))
            require(operator.name, error, OPERATOR_BOUND)

            def run(operator: Operator = operator) -> None:
                for _ in range(calls):
                    operator.run()

            rate = operator.passes * 2 * tokens * width / bench.seconds(run, calls).median
            figures = {"GB/s": rate / 1e9, "copy GB/s": copied / 1e9, "share of copy": rate / copied}
            result.rows.append(
                {"operator": operator.name, "D": width, "bf16 - fp32": f"{error:.0e}", **bench.figures(figures)}
            )
            if not bench.tiny:
                name = f"{operator.name}, D {width}: share of copy"
                result.targets.append(Target(name, rate / copied, 0.8, at_most=False))
    return result


def copy_line(bench: Bench, queues: Queues, direction: Queue, host: Tensor) -> dict[str, Any]:
    """Copies of the size of `host` in one direction, alone and beside attention."""
    num_bytes = host.numel()
    content = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=bench.device)
    host.copy_(content)
    here = torch.empty_like(content)
    target, source = (host, content) if direction == "to host" else (here, host)
    copies = 1 if bench.tiny else 8

    def copy() -> None:
        for _ in range(copies):
            queues.copy(direction, target, source)
        done = queues.record(direction)
        if done is not None:  # on the CPU a copy is over when it returns
            done.synchronize()

    alone_s = bench.seconds(copy, copies).median
    require("what was copied", float(not torch.equal(target.to(bench.device), content)), 0.0)
    shape = (1, TINY_TOKENS, 2, HEAD_DIM) if bench.tiny else (1, TOKENS, WAN_1_3B.num_heads, HEAD_DIM)
    q, k, v = (normal(shape, key, bench.device, torch.bfloat16) for key in "qkv")
    attention_s = bench.seconds(lambda: attention_with_lse(q, k, v)).median
    calls = 1 if bench.tiny else max(math.ceil(2 * copies * alone_s / attention_s), 1)
    copying: list[float] = []

    def compute() -> None:
        for _ in range(calls):
            attention_with_lse(q, k, v)

    def both() -> None:
        compute()
        copying.append(bench.elapsed(copy))

    computing_s, both_s = bench.seconds(compute).median, bench.seconds(both).median
    beside_s = sorted(copying)[len(copying) // 2] / copies
    figures = {"GB/s alone": num_bytes / alone_s / 1e9, "GB/s beside attention": num_bytes / beside_s / 1e9,
               "rate kept": alone_s / beside_s, "attention slower": both_s / computing_s - 1}  # fmt: skip
    return bench.figures(figures)


def d3(bench: Bench) -> Result:
    """Copies of the size of attention's output, by the queues and the page-locked memory that offload uses."""
    tokens, heads = (TINY_TOKENS, 2) if bench.tiny else (TOKENS, WAN_1_3B.num_heads)
    result = bench.result("d3: copies to and from host memory", {"attention": f"{heads} heads, s {tokens}, bf16"})
    queues = queues_of(bench.backend)
    sizes = (2**12, 2**13) if bench.tiny else (340_000_000, 790_000_000)  # of 14B at 480x832x81 and 720x1280x81
    memory = bench.keep(queues.host_memory(max(sizes)))
    directions: tuple[Queue, Queue] = ("to host", "to device")
    for size in sizes:
        for direction in directions:
            what = {"GB": size / 1e9, "direction": direction}
            line = bench.guarded(what, partial(copy_line, bench, queues, direction, memory[:size]))
            result.rows.append(line)
            if not bench.tiny:
                name = f"{size / 1e9} GB {direction}: rate kept"
                result.targets.append(Target(name, line.get("rate kept"), 0.9, at_most=False))
    result.notes.append("The attention that runs beside the copies takes twice as long as they do alone.")
    return result
