"""What torch_npu's documentation says its operators compute, in torch's own functions, for the CPU.

Sources: torch_npu/_op_plugin_docs.py of the wheel (npu_fusion_attention, npu_rms_norm, npu_rotary_mul), and CANN's
pages on aclnnFlashAttentionScoreGrad and aclnnRmsNormGrad for the backward operators.
"""

from typing import Any

import torch
from torch import Tensor

LANES = 8


def scores_of(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """[B, N, T, S] from BSND."""
    return torch.einsum("btnk,bsnk->bnts", query, key) * scale


def wide(*tensors: Tensor) -> list[Tensor]:
    return [x if x.dtype == torch.float64 else x.float() for x in tensors]


def sequences(*ends: list[int]) -> list[tuple[slice, ...]]:
    """Rows of queries and keys of each sequence of layout TND, which lie one after the other."""
    starts = ([0, *side[:-1]] for side in ends)
    rows = ([slice(a, b) for a, b in zip(*both, strict=True)] for both in zip(starts, ends, strict=True))
    return list(zip(*rows, strict=True))


def fusion_attention(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str,
    pse: None = None, padding_mask: None = None, atten_mask: None = None, scale: float = 1.0, keep_prob: float = 1.0,
    pre_tockens: int = 0, next_tockens: int = 0, inner_precise: int = 0, prefix: None = None,
    actual_seq_qlen: list[int] | None = None, actual_seq_kvlen: list[int] | None = None, sparse_mode: int = 0,
    gen_mask_parallel: bool = True, sync: bool = False, softmax_layout: str = "",
) -> Any:  # fmt: skip
    if input_layout == "TND":
        assert softmax_layout == "TND" and actual_seq_qlen is not None and actual_seq_kvlen is not None
        assert (actual_seq_qlen[-1], actual_seq_kvlen[-1]) == (len(query), len(key))
        parts = [
            fusion_attention(query[None, q], key[None, k], value[None, k], head_num, "BSND", scale=scale)
            for q, k in sequences(actual_seq_qlen, actual_seq_kvlen)
        ]
        statistics = [torch.cat([part[i][0] for part in parts], 1).transpose(0, 1) for i in (1, 2)]
        return torch.cat([part[0][0] for part in parts]), *statistics, query.new_empty(0), 0, 0, 0
    assert actual_seq_qlen is actual_seq_kvlen is None and softmax_layout == ""
    assert (input_layout, head_num, keep_prob) == ("BSND", query.shape[2], 1.0)
    assert pse is None and padding_mask is None and atten_mask is None
    q, k, v = wide(query, key, value)
    scores = scores_of(q, k, scale)
    softmax_max = scores.amax(-1, keepdim=True)
    weights = (scores - softmax_max).exp()
    softmax_sum = weights.sum(-1, keepdim=True)
    out = torch.einsum("bnts,bsnk->btnk", weights / softmax_sum, v).to(query.dtype)
    return out, softmax_max.repeat(1, 1, 1, LANES), softmax_sum.repeat(1, 1, 1, LANES), query.new_empty(0), 0, 0, 0


def fusion_attention_grad(
    query: Tensor, key: Tensor, value: Tensor, dy: Tensor, head_num: int, input_layout: str, *,
    softmax_max: Tensor, softmax_sum: Tensor, attention_in: Tensor, scale_value: float = 1.0,
    actual_seq_qlen: list[int] | None = None, actual_seq_kvlen: list[int] | None = None, softmax_layout: str = "",
) -> Any:  # fmt: skip
    if input_layout == "TND":
        assert softmax_layout == "TND" and actual_seq_qlen is not None and actual_seq_kvlen is not None
        assert softmax_max.shape[:2] == softmax_sum.shape[:2] == query.shape[:2]
        parts = [
            fusion_attention_grad(
                query[None, q], key[None, k], value[None, k], dy[None, q], head_num, "BSND",
                softmax_max=softmax_max[q].transpose(0, 1)[None], softmax_sum=softmax_sum[q].transpose(0, 1)[None],
                attention_in=attention_in[None, q], scale_value=scale_value,
            )
            for q, k in sequences(actual_seq_qlen, actual_seq_kvlen)
        ]  # fmt: skip
        return *(torch.cat([part[i][0] for part in parts]) for i in range(3)), query.new_empty(0), torch.empty(0)
    assert (input_layout, head_num) == ("BSND", query.shape[2])
    assert softmax_max.shape[-1] == softmax_sum.shape[-1] == LANES
    q, k, v, grad, out = wide(query, key, value, dy, attention_in)
    weights = (scores_of(q, k, scale_value) - softmax_max[..., :1]).exp() / softmax_sum[..., :1]
    dv = torch.einsum("bnts,btnk->bsnk", weights, grad)
    dweights = torch.einsum("btnk,bsnk->bnts", grad, v)
    dscores = weights * (dweights - (grad * out).sum(-1).transpose(1, 2).unsqueeze(-1))
    dq = torch.einsum("bnts,bsnk->btnk", dscores, k) * scale_value
    dk = torch.einsum("bnts,btnk->bsnk", dscores, q) * scale_value
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), query.new_empty(0), torch.empty(0)


def rms_norm(self: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    assert self.dtype == gamma.dtype
    x, weight = wide(self, gamma)
    rstd = (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (x * rstd * weight).to(self.dtype), rstd


def rms_norm_backward(dy: Tensor, self: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    assert dy.dtype == self.dtype == gamma.dtype
    grad, x, weight = wide(dy, self, gamma)
    normed = x * rstd
    dx = (grad * weight - normed * (grad * weight * normed).mean(-1, keepdim=True)) * rstd
    return dx.to(self.dtype), (grad * normed).flatten(0, -2).sum(0)


def rotary_mul(self: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half") -> Tensor:
    # the limits of the interleaved mode on layout BSND
    assert rotary_mode == "interleave" and self.shape[0] * self.shape[2] < 1000
    assert r1.shape == r2.shape == (1, self.shape[1], 1, self.shape[3])
    r1, r2 = r1.to(self.dtype), r2.to(self.dtype)
    swapped = torch.stack((-self[..., 1::2], self[..., ::2]), dim=-1).flatten(-2)
    return r1 * self + r2 * swapped


OPERATORS = {
    "npu_fusion_attention": fusion_attention,
    "npu_fusion_attention_grad": fusion_attention_grad,
    "npu_rms_norm": rms_norm,
    "npu_rms_norm_backward": rms_norm_backward,
    "npu_rotary_mul": rotary_mul,
}
