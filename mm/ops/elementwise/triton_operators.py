"""Operators for CUDA: one Triton kernel each, which reads every big tensor once and writes it once.

What no kernel takes (fp64, rows wider than registers, nothing at all) goes to `Operators`. Importing this file
imports triton; `dispatch` does so only for a tensor that needs it. Shapes as in `mm.ops.elementwise.operators`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mm.ops.elementwise import triton_kernels as kernels
from mm.ops.elementwise.operators import HeadNorm, Operators, Rotation, identity

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_WIDTH = 8192  # the widest row that registers hold twice (values and gradients) with its sums
_WIDE = 4096  # rows beyond this need the registers of twice as many threads
_TILE, _STRIP_TILE = 8192, 4096  # elements a program holds at a time, without and with sums over rows
_MAX_ROWS = 16
_MAX_STAGES = 3  # tiles on their way while one is computed, and that one
_PREFETCH_BYTES = 64 * 1024  # of shared memory; every device with bf16 has a third more


@dataclass(frozen=True)
class TritonOperators(Operators):
    """Operators in Triton kernels.

    Attributes:
        programs: among how many programs the rows are shared out where gradients are summed over rows. A few times
            the number of multiprocessors; sums of the same inputs have the same bits for the same number.
    """

    programs: int

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """`Operators.layer_norm`."""
        if not (_taken(x) and _per_batch(x, weight, bias)):
            return super().layer_norm(x, weight, bias, eps)
        x, weight, bias = x.contiguous(), _dense(weight), _dense(bias)
        out, mean, rstd = torch.empty_like(x), _statistic(x), _statistic(x)
        strides = _batch_stride(weight), _batch_stride(bias)
        _start_tiles(kernels.layer_norm, x, x, weight, bias, out, mean, rstd, x.shape[1], *strides, eps)
        return out, mean, rstd

    def layer_norm_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`Operators.layer_norm_backward`."""
        if not (_taken(x, grad) and _per_batch(x, weight)):
            return super().layer_norm_backward(grad, x, weight, mean, rstd)
        grad, x, weight = grad.contiguous(), x.contiguous(), _dense(weight)
        strips = self._strips(x)
        dx, dweight, dbias = torch.empty_like(x), strips.sums(), strips.sums()
        tensors = grad, x, weight, mean, rstd, dx, dweight, dbias
        _start_strips(kernels.layer_norm_backward, strips, 2, *tensors, x.shape[1], strips.rows, _batch_stride(weight))
        return dx, _add_up(dweight, weight), _add_up(dbias, weight)

    def gated_residual(self, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        """`Operators.gated_residual`."""
        if not (_taken(x, y) and _per_batch(x, gate)):
            return super().gated_residual(x, y, gate)
        x, y, gate = x.contiguous(), y.contiguous(), _dense(gate)
        out = torch.empty_like(x)
        _start_tiles(kernels.gated_residual, x, x, y, gate, out, x.shape[1], _batch_stride(gate))
        return out

    def gated_residual_backward(self, grad: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        """`Operators.gated_residual_backward`."""
        if not (_taken(y, grad) and _per_batch(y, gate)):
            return super().gated_residual_backward(grad, y, gate)
        grad, y, gate = grad.contiguous(), y.contiguous(), _dense(gate)
        strips = self._strips(y)
        dy, dgate = torch.empty_like(y), strips.sums()
        tensors = grad, y, gate, dy, dgate
        _start_strips(
            kernels.gated_residual_backward, strips, 2, *tensors, y.shape[1], strips.rows, _batch_stride(gate)
        )
        return dy, _add_up(dgate, gate)

    def rms_norm_rope(
        self, x: Tensor, weight: Tensor, rotation: Rotation | None, norm: HeadNorm
    ) -> tuple[Tensor, Tensor]:
        """`Operators.rms_norm_rope`; one kernel, or two where the squares are added up over ranks in between."""
        if not (_taken(x) and _of_heads(x, weight, rotation, norm.head_dim)):
            return super().rms_norm_rope(x, weight, rotation, norm)
        x, tokens, whole = x.contiguous(), x.shape[1], norm.sum_over_ranks is identity
        rstd = _statistic(x)
        if not whole:
            _start_tiles(kernels.sum_of_squares, x, x, rstd, tokens)
            rstd = torch.rsqrt(norm.sum_over_ranks(rstd) / norm.width + norm.eps)
        out = torch.empty_like(x)
        cos, sin = rotation or (None, None)
        heads = {"HEAD_DIM": norm.head_dim, "ROTATE": rotation is not None, "WHOLE": whole}
        _start_tiles(kernels.rms_norm_rope, x, x, weight, cos, sin, out, rstd, tokens, norm.width, norm.eps, **heads)
        return out.unflatten(-1, (-1, norm.head_dim)), rstd

    def rms_norm_rope_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, rotation: Rotation | None, rstd: Tensor, norm: HeadNorm
    ) -> tuple[Tensor, Tensor]:
        """`Operators.rms_norm_rope_backward`; one kernel, or two where dots are added up over ranks in between."""
        if not (_taken(x, grad) and _of_heads(x, weight, rotation, grad.shape[-1])):
            return super().rms_norm_rope_backward(grad, x, weight, rotation, rstd, norm)
        grad, x, tokens, whole = grad.contiguous(), x.contiguous(), x.shape[1], norm.sum_over_ranks is identity
        inputs = grad, x, weight, *(rotation or (None, None)), rstd
        heads = {"HEAD_DIM": grad.shape[-1], "ROTATE": rotation is not None}
        dot = None
        if not whole:
            dot = _statistic(x)
            _start_tiles(kernels.rms_norm_rope_dot, x, *inputs, dot, tokens, **heads)
            dot = norm.sum_over_ranks(dot)
        strips = self._strips(x)
        dx, dweight = torch.empty_like(x), strips.sums()
        tensors = *inputs, dot, dx, dweight
        # a row of cosines and sines is as long as one of fp32 values
        streams = 2 if rotation is None else 2 + 4 // x.element_size()
        _start_strips(
            kernels.rms_norm_rope_backward,
            strips,
            streams,
            *tensors,
            tokens,
            strips.rows,
            norm.width,
            WHOLE=whole,
            **heads,
        )
        return dx, dweight.sum(dim=(0, 1)).to(weight.dtype)

    def _strips(self, x: Tensor) -> _Strips:
        """Distribution of the rows of [B, T, D] among the programs."""
        batch, tokens, width = x.shape
        tile_rows = _tile_rows(width, _STRIP_TILE)
        rows = -(-tokens // max(1, self.programs // batch))
        return _Strips(x, tile_rows, -(-rows // tile_rows) * tile_rows)


@dataclass(frozen=True)
class _Strips:
    """Strips of `rows` rows of one batch element of `x`, whole tiles of `tile_rows` rows."""

    x: Tensor
    tile_rows: int
    rows: int

    @property
    def number(self) -> int:
        """Number of tiles for each batch element."""
        return -(-self.x.shape[1] // self.rows)

    def sums(self) -> Tensor:
        """Memory for the sum of each strip, [B, strips, D] fp32."""
        return self.x.new_empty(self.x.shape[0], self.number, self.x.shape[2], dtype=torch.float32)


def _taken(x: Tensor, *others: Tensor) -> bool:
    """Accept a stream [B, T, D] and others with as many elements, if the kernels can read all of them."""
    fits = x.dim() == 3 and 0 < x.shape[-1] <= _MAX_WIDTH and x.numel() > 0
    return fits and all(_readable(x, stream) and stream.numel() == x.numel() for stream in (x, *others))


def _per_batch(x: Tensor, *parameters: Tensor) -> bool:
    """Require of each parameter one row for every batch element, or one for all."""
    shapes = (1, 1, x.shape[2]), (x.shape[0], 1, x.shape[2])
    return all(_readable(x, parameter) and parameter.shape in shapes for parameter in parameters)


def _of_heads(x: Tensor, weight: Tensor, rotation: Rotation | None, head_dim: int) -> bool:
    """Require of `x` whole heads, one weight for each of its columns and the angles of its tokens."""
    angles = () if rotation is None else rotation
    return (
        (_readable(x, weight) and weight.is_contiguous() and weight.shape == x.shape[2:])
        and (x.shape[2] % head_dim == 0 and (rotation is None or head_dim % 2 == 0))
        and all(_readable(x, a) and a.is_contiguous() and a.shape == (x.shape[1], head_dim // 2) for a in angles)
    )


def _readable(x: Tensor, value: Tensor) -> bool:
    """Require plain memory on the device of `x`, for a kernel to read; subclasses may keep their values elsewhere."""
    return type(value) in (Tensor, nn.Parameter) and value.device == x.device and value.dtype in _DTYPES


def _dense(parameter: Tensor) -> Tensor:
    """Bring neighbouring columns next to each other; rows of a larger table stay where they are."""
    return parameter if parameter.stride(-1) == 1 else parameter.contiguous()


def _batch_stride(parameter: Tensor) -> int:
    return 0 if parameter.shape[0] == 1 else parameter.stride(0)


def _statistic(x: Tensor) -> Tensor:
    """Memory for one number for each row, [B, T, 1] fp32."""
    return x.new_empty(*x.shape[:2], 1, dtype=torch.float32)


def _add_up(sums: Tensor, parameter: Tensor) -> Tensor:
    """The gradient of a parameter [B, 1, D] or [1, 1, D], from [B, strips, D]."""
    return sums.sum(dim=1, keepdim=True).sum_to_size(parameter.shape).to(parameter.dtype)


def _block(width: int) -> int:
    return 1 << (width - 1).bit_length()


def _tile_rows(width: int, tile: int) -> int:
    return min(_MAX_ROWS, max(1, tile // _block(width)))


def _start_tiles(kernel: Any, x: Tensor, *arguments: Any, **constants: Any) -> None:
    """Start a kernel whose programs take one tile of `x` each."""
    batch, tokens, width = x.shape
    rows = _tile_rows(width, _TILE)
    constants |= {"WIDTH": width, "BLOCK": _block(width), "ROWS": rows}
    _start(kernel, (-(-tokens // rows), batch), 8, x, arguments, constants)


def _start_strips(kernel: Any, strips: _Strips, streams: int, *arguments: Any, **constants: Any) -> None:
    """Start a kernel whose programs take one strip each and read so many streams of the width and dtype of `x`."""
    batch, _, width = strips.x.shape
    block = _block(width)
    tile_bytes = streams * strips.tile_rows * block * strips.x.element_size()
    stages = min(_MAX_STAGES, 1 + _PREFETCH_BYTES // tile_bytes)
    constants |= {"WIDTH": width, "BLOCK": block, "ROWS": strips.tile_rows, "STAGES": stages}
    _start(kernel, (strips.number, batch), 16 if block > _WIDE else 8, strips.x, arguments, constants)


def _start(
    kernel: Any, grid: tuple[int, int], warps: int, x: Tensor, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    """Start a kernel on the device of `x`; fused multiply-adds are asked for because defaults differ by version."""
    with torch.cuda.device_of(x):
        kernel[grid](*arguments, **constants, num_warps=warps, enable_fp_fusion=True)
