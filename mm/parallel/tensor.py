"""Tensor parallelism: the linears of a block cut over ranks, with the tokens between them cut too or not.

Columns (q, k, v, k_img, v_img, ffn.0) hold rows of the weight, so they give this rank's heads or hidden channels; rows
(o, ffn.2) hold columns of the weight, and their partial results are added up over the ranks. With sequence parallelism
the residual stream is cut over the same ranks: tokens are gathered before the columns and scattered while added up
after the rows (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2). One gathering serves q, k and v together, and
the backward gathers again instead of keeping the whole tokens.

megatron-core's ColumnParallelLinear is not used: it gathers for q, k and v each, three times the traffic.
Shapes: B batch, T tokens of a context-parallel chunk, t tokens of a rank, D model width, P tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mm.wan.layers import QKNorm

_COLUMN_LINEARS = ("q", "k", "v", "k_img", "v_img", "0")  # 0 and 2 are those of ffn
_ROW_LINEARS = ("o", "2")
SHARDED_DIM = {
    **{f"{linear}.{part}": 0 for linear in _COLUMN_LINEARS for part in ("weight", "bias", "weight_scale", "lora_B")},
    **{f"{linear}.{part}": 1 for linear in _ROW_LINEARS for part in ("weight", "lora_A")},
    **{f"{norm}.weight": 0 for norm in ("norm_q", "norm_k", "norm_k_img")},
}
"""Dim along which a block's parameter is cut, by the end of its name; parameters that are not here are whole."""


def sharded_dim(name: str) -> int | None:
    """The dim along which tensor parallelism cuts the parameter of this native name; None when every rank has it."""
    parts = name.split(".")
    in_block = parts[0] in ("blocks", "vace_blocks") and parts[2] in ("self_attn", "cross_attn", "ffn")
    return SHARDED_DIM.get(".".join(parts[-2:])) if in_block else None


def gradient_is_partial(name: str, sequence_parallel: bool) -> bool:
    """Tell whether a rank's gradient of this parameter is only its part of a sum over the tensor-parallel ranks.

    With sequence parallelism every whole parameter works on this rank's tokens only. Without it whole parameters see
    everything, except the text and image embeddings, whose results go into each rank's own heads, and the whole half of
    a LoRA adapter, which works with a rank's share of the linear.
    """
    if sharded_dim(name) is not None:
        return False
    embeds, adapts = ("text_embedding.", "img_emb."), (".lora_A", ".lora_B")
    return sequence_parallel or name.startswith(embeds) or name.endswith(adapts)


@dataclass(frozen=True)
class TensorAxis:
    """The tensor-parallel axis of this rank, and the parts of a model that is cut along it.

    Attributes:
        group: the ranks that share every block.
        sequence_parallel: whether the residual stream is cut over them too.
    """

    group: dist.ProcessGroup
    sequence_parallel: bool

    def column(self, in_features: int, out_features: int) -> nn.Module:
        """Rows `out_features / P` of a linear."""
        return nn.Linear(in_features, out_features // self.group.size())

    def row(self, in_features: int, out_features: int) -> nn.Module:
        """Columns `in_features / P` of a linear whose result is added up over the ranks."""
        return RowLinear(in_features // self.group.size(), out_features, self)

    def qk_norm(self, width: int, head_dim: int, eps: float) -> nn.Module:
        """RMSNorm of a width that the ranks share, with statistics of all of it."""
        return QKNorm(width, head_dim, eps, self.group.size(), self.sum_statistics)

    def sum_statistics(self, x: Tensor) -> Tensor:
        """Sum of the ranks' statistics, 4 bytes a token; of their gradients in backward."""
        return _sum(x, self.group)

    def columns(self, x: Tensor, linears: Sequence[nn.Module]) -> list[Tensor]:
        """Column linears of the same tokens: [B, t or T, D] to [B, T, width of each]."""
        if not self.sequence_parallel:
            whole = _CopyIn.apply(x, self.group)
            return [linear(whole) for linear in linears]
        whole = _GatherTokens.apply(x, self.group)
        if _others_decide_what_is_saved():
            return [linear(whole) for linear in linears]
        again = _GatherAgain(x.detach(), whole, self.group)
        with torch.autograd.graph.saved_tensors_hooks(again.pack, again.unpack):
            return [linear(whole) for linear in linears]

    def add_up(self, x: Tensor) -> Tensor:
        """Sum of the ranks' [B, T, D], as [B, t, D] with sequence parallelism, whole without."""
        out: Tensor = (_ScatterSum if self.sequence_parallel else _SumOut).apply(x, self.group)
        return out


def _others_decide_what_is_saved() -> bool:
    """Tell whether an activation checkpoint runs this code: it keeps nothing of the first run, all of the second."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


class RowLinear(nn.Module):
    """A rank's columns of a linear; partial results are added up (`add_up`), then the bias is added once."""

    def __init__(self, in_features: int, out_features: int, axis: TensorAxis) -> None:
        super().__init__()
        self.add_up = axis.add_up
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, in_features] to [B, t or T, out_features]."""
        return self.add_up(F.linear(x, self.weight)) + self.bias


class _GatherAgain:
    """Saved-tensor hooks that keep a rank's own tokens and gather the whole again when backward asks for them."""

    def __init__(self, own: Tensor, whole: Tensor, group: dist.ProcessGroup) -> None:
        self._own, self._group = own, group
        self._storage = _storage_of(whole)
        self._uses = 0
        self._whole: Tensor | None = None

    def pack(self, saved: Tensor) -> Any:
        """Views of the whole tokens become their shape; everything else is saved as it is."""
        if _storage_of(saved) != self._storage:
            return saved
        self._uses += 1
        return saved.size(), saved.stride(), saved.storage_offset()

    def unpack(self, packed: Any) -> Tensor:
        """The linears that share the tokens share one gathering; the last of them lets go of it."""
        if isinstance(packed, Tensor):
            return packed
        if self._whole is None:
            self._whole = gather_tokens(self._own, self._group)
        whole = self._whole.as_strided(*packed)
        self._uses -= 1
        if self._uses <= 0:
            self._whole = None
        return whole


def _storage_of(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def gather_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, t, D] of every rank to [B, T, D]."""
    batch, width, *rest = x.shape
    out = x.new_empty(group.size() * batch, width, *rest)
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out.unflatten(0, (-1, batch)).transpose(0, 1).reshape(batch, -1, *rest)


def _scatter_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, T, D] to this rank's [B, t, D] of the sum."""
    batch, tokens, *rest = x.shape
    width = tokens // group.size()
    parts = x.unflatten(1, (-1, width)).transpose(0, 1).reshape(-1, width, *rest)
    out = x.new_empty(batch, width, *rest)
    dist.reduce_scatter_tensor(out, parts.contiguous(), group=group)
    return out


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group)
    return out


def _same(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    del group
    return x.view_as(x)


def _collective(
    forward: Callable[[Tensor, dist.ProcessGroup], Tensor], backward: Callable[[Tensor, dist.ProcessGroup], Tensor]
) -> type[torch.autograd.Function]:
    """A differentiable collective from what it does in each direction."""

    class Collective(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
            ctx.group = group
            return forward(x, group)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            return backward(grads[0], ctx.group), None

    return Collective


_GatherTokens: Any = _collective(gather_tokens, _scatter_sum)
_ScatterSum: Any = _collective(_scatter_sum, gather_tokens)
_CopyIn: Any = _collective(_same, _sum)
_SumOut: Any = _collective(_sum, _same)
