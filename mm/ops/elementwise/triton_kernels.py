"""Triton kernels of the elementwise operators of a Wan block; `mm.ops.elementwise.triton_operators` starts them.

A program takes tiles of ROWS whole rows into registers, so that each big tensor is read once and written once. BLOCK is
the width rounded up to a power of two, which Triton's tiles need; what lies beyond WIDTH is masked. Kernels that also
sum over rows (gradients of weight, bias and gate) give each program a strip of rows of one batch element and write
its sum: adding these up afterwards, instead of with atomics, gives the same bits every time. Everything is fp32 in
registers. Row r of batch element b is row b * tokens + r of a contiguous [B, T, D]. A `*_stride` is the distance
between the rows of two batch elements, 0 where all share one.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rows_of_tile(first, tokens, ROWS: tl.constexpr):
    """(rows counted from the first of all batch elements, tokens, which of them there are), [ROWS, 1] each."""
    token = first + tl.arange(0, ROWS)[:, None]
    return tl.program_id(1).to(tl.int64) * tokens + token, token, token < tokens


@triton.jit
def _parameter(parameter, start, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One row of weights, biases or gates, [1, BLOCK] fp32."""
    column = tl.arange(0, BLOCK)[None, :]
    return tl.load(parameter + start + column, mask=column < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def _store_sum(sums, tile, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Write the sum of a tile's rows to this program's row of [B, strips, WIDTH]."""
    column = tl.arange(0, BLOCK)[None, :]
    row = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums + row * WIDTH + column, tl.sum(tile, axis=0, keep_dims=True), mask=column < WIDTH)


@triton.jit
def _turn(x, cos, sin, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rotate the pairs (x[2i], x[2i+1]) of [ROWS, BLOCK] by [ROWS, BLOCK / 2] cosines and sines."""
    even, odd = tl.split(tl.reshape(x, [ROWS, BLOCK // 2, 2]))
    return tl.interleave(even * cos - odd * sin, even * sin + odd * cos)


@triton.jit
def _rotation(cos, sin, token, is_token, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Cosines and sines of the pairs of whole rows, from the [T, HEAD_DIM / 2] that all heads share."""
    pair = tl.arange(0, BLOCK // 2)[None, :]
    offset = token.to(tl.int64) * (HEAD_DIM // 2) + pair % (HEAD_DIM // 2)
    inside = is_token & (pair < WIDTH // 2)
    return tl.load(cos + offset, mask=inside, other=0.0), tl.load(sin + offset, mask=inside, other=0.0)


@triton.jit
def layer_norm(
    x,
    weight,
    bias,
    out,
    mean,
    rstd,
    tokens,
    weight_stride,
    bias_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """LayerNorm(x) * weight + bias. Grid: (tiles, B)."""
    row, _, is_token = _rows_of_tile(tl.program_id(0) * ROWS, tokens, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = is_token & (column < WIDTH)
    values = tl.load(x + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    row_mean = tl.sum(values, axis=1, keep_dims=True) / WIDTH
    centred = tl.where(column < WIDTH, values - row_mean, 0.0)
    row_rstd = tl.rsqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / WIDTH + eps)
    batch = tl.program_id(1).to(tl.int64)
    scale = _parameter(weight, batch * weight_stride, WIDTH, BLOCK)
    shift = _parameter(bias, batch * bias_stride, WIDTH, BLOCK)
    result = centred * row_rstd * scale + shift
    tl.store(out + row * WIDTH + column, result.to(out.dtype.element_ty), mask=inside)
    tl.store(mean + row, row_mean, mask=is_token)
    tl.store(rstd + row, row_rstd, mask=is_token)


@triton.jit
def layer_norm_backward(
    grad,
    x,
    weight,
    mean,
    rstd,
    grad_x,
    grad_weight,
    grad_bias,
    tokens,
    strip,
    weight_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Gradients of x, and of weight and bias summed over each strip, [B, strips, WIDTH]. Grid: (strips, B)."""
    column = tl.arange(0, BLOCK)[None, :]
    scale = _parameter(weight, tl.program_id(1).to(tl.int64) * weight_stride, WIDTH, BLOCK)
    weight_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    bias_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    start = tl.program_id(0) * strip
    end = tl.minimum(start + strip, tokens)
    for first in tl.range(start, end, ROWS, num_stages=STAGES):
        row, _, is_token = _rows_of_tile(first, tokens, ROWS)
        inside = is_token & (column < WIDTH)
        offset = row * WIDTH + column
        upstream = tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
        row_rstd = tl.load(rstd + row, mask=is_token, other=0.0)
        normed = (values - tl.load(mean + row, mask=is_token, other=0.0)) * row_rstd
        weight_sum += upstream * normed
        bias_sum += upstream
        scaled = upstream * scale
        along_ones = tl.sum(scaled, axis=1, keep_dims=True) / WIDTH
        along_normed = tl.sum(scaled * normed, axis=1, keep_dims=True) / WIDTH
        result = row_rstd * (scaled - along_ones - normed * along_normed)
        tl.store(grad_x + offset, result.to(grad_x.dtype.element_ty), mask=inside)
    _store_sum(grad_weight, weight_sum, WIDTH, BLOCK)
    _store_sum(grad_bias, bias_sum, WIDTH, BLOCK)


@triton.jit
def gated_residual(
    x, y, gate, out, tokens, gate_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
) -> None:
    """x + y * gate. Grid: (tiles, B)."""
    row, _, is_token = _rows_of_tile(tl.program_id(0) * ROWS, tokens, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = is_token & (column < WIDTH)
    offset = row * WIDTH + column
    factor = _parameter(gate, tl.program_id(1).to(tl.int64) * gate_stride, WIDTH, BLOCK)
    branch = tl.load(y + offset, mask=inside, other=0.0).to(tl.float32)
    result = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32) + branch * factor
    tl.store(out + offset, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gated_residual_backward(
    grad,
    y,
    gate,
    grad_y,
    grad_gate,
    tokens,
    strip,
    gate_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Gradients of y, and of gate summed over each strip, [B, strips, WIDTH]. Grid: (strips, B)."""
    column = tl.arange(0, BLOCK)[None, :]
    factor = _parameter(gate, tl.program_id(1).to(tl.int64) * gate_stride, WIDTH, BLOCK)
    gate_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    start = tl.program_id(0) * strip
    end = tl.minimum(start + strip, tokens)
    for first in tl.range(start, end, ROWS, num_stages=STAGES):
        row, _, is_token = _rows_of_tile(first, tokens, ROWS)
        inside = is_token & (column < WIDTH)
        offset = row * WIDTH + column
        upstream = tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)
        gate_sum += upstream * tl.load(y + offset, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_y + offset, (upstream * factor).to(grad_y.dtype.element_ty), mask=inside)
    _store_sum(grad_gate, gate_sum, WIDTH, BLOCK)


@triton.jit
def sum_of_squares(x, squares, tokens, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr) -> None:
    """Sum of squares of each row. Grid: (tiles, B)."""
    row, _, is_token = _rows_of_tile(tl.program_id(0) * ROWS, tokens, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = is_token & (column < WIDTH)
    values = tl.load(x + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(squares + row, tl.sum(values * values, axis=1, keep_dims=True), mask=is_token)


@triton.jit
def rms_norm_rope(
    x,
    weight,
    cos,
    sin,
    out,
    rstd,
    tokens,
    mean_width,
    eps,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTATE: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """x * rstd * weight, rotated if ROTATE. WHOLE: rstd is computed and written, else it is read. Grid: (tiles, B)."""
    row, token, is_token = _rows_of_tile(tl.program_id(0) * ROWS, tokens, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = is_token & (column < WIDTH)
    values = tl.load(x + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    if WHOLE:
        row_rstd = tl.rsqrt(tl.sum(values * values, axis=1, keep_dims=True) / mean_width + eps)
        tl.store(rstd + row, row_rstd, mask=is_token)
    else:
        row_rstd = tl.load(rstd + row, mask=is_token, other=0.0)
    scale = _parameter(weight, 0, WIDTH, BLOCK)
    result = values * row_rstd * scale
    if ROTATE:
        row_cos, row_sin = _rotation(cos, sin, token, is_token, WIDTH, HEAD_DIM, BLOCK)
        result = _turn(result, row_cos, row_sin, ROWS, BLOCK)
    tl.store(out + row * WIDTH + column, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _turned_back(
    grad,
    cos,
    sin,
    offset,
    token,
    is_token,
    inside,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTATE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The gradient of what was rotated, [ROWS, BLOCK]: the transpose of a rotation turns the other way."""
    upstream = tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)
    if ROTATE:
        row_cos, row_sin = _rotation(cos, sin, token, is_token, WIDTH, HEAD_DIM, BLOCK)
        upstream = _turn(upstream, row_cos, -row_sin, ROWS, BLOCK)
    return upstream


@triton.jit
def rms_norm_rope_dot(
    grad,
    x,
    weight,
    cos,
    sin,
    rstd,
    dot,
    tokens,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTATE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Product of each row's normed values with their gradient. Grid: (tiles, B)."""
    row, token, is_token = _rows_of_tile(tl.program_id(0) * ROWS, tokens, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = is_token & (column < WIDTH)
    offset = row * WIDTH + column
    upstream = _turned_back(grad, cos, sin, offset, token, is_token, inside, WIDTH, HEAD_DIM, ROTATE, BLOCK, ROWS)
    scale = _parameter(weight, 0, WIDTH, BLOCK)
    values = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    normed = values * tl.load(rstd + row, mask=is_token, other=0.0)
    tl.store(dot + row, tl.sum(upstream * scale * normed, axis=1, keep_dims=True), mask=is_token)


@triton.jit
def rms_norm_rope_backward(
    grad,
    x,
    weight,
    cos,
    sin,
    rstd,
    dot,
    grad_x,
    grad_weight,
    tokens,
    strip,
    mean_width,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTATE: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Gradients of x, and of weight summed over each strip, [B, strips, WIDTH]. Grid: (strips, B).

    WHOLE: what `rms_norm_rope_dot` computes is computed here, else it is read.
    """
    column = tl.arange(0, BLOCK)[None, :]
    scale = _parameter(weight, 0, WIDTH, BLOCK)
    weight_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    start = tl.program_id(0) * strip
    end = tl.minimum(start + strip, tokens)
    for first in tl.range(start, end, ROWS, num_stages=STAGES):
        row, token, is_token = _rows_of_tile(first, tokens, ROWS)
        inside = is_token & (column < WIDTH)
        offset = row * WIDTH + column
        upstream = _turned_back(grad, cos, sin, offset, token, is_token, inside, WIDTH, HEAD_DIM, ROTATE, BLOCK, ROWS)
        row_rstd = tl.load(rstd + row, mask=is_token, other=0.0)
        normed = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32) * row_rstd
        weight_sum += upstream * normed
        scaled = upstream * scale
        if WHOLE:
            row_dot = tl.sum(scaled * normed, axis=1, keep_dims=True)
        else:
            row_dot = tl.load(dot + row, mask=is_token, other=0.0)
        result = row_rstd * (scaled - normed * (row_dot / mean_width))
        tl.store(grad_x + offset, result.to(grad_x.dtype.element_ty), mask=inside)
    _store_sum(grad_weight, weight_sum, WIDTH, BLOCK)
