"""Attention of samples in one sequence against torch's own attention with a mask; the calls of CUDA's kernel."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mm.ops.attention.packed import backward_of_pairs, forward_of_pairs, segment_attention
from mm.ops.attention.segments import Pair, Pairs, Segment, Segments, consecutive

HEADS, WIDTH = 3, 16
HAS_CUDA = torch.cuda.is_available()

LAYOUTS = {
    "one after the other": Pairs.of_rows(consecutive([5, 1, 6]), consecutive([2, 4, 1])),
    "with rows of none between": Pairs((Pair(slice(1, 4), slice(0, 2)), Pair(slice(6, 11), slice(3, 7)))),
    "one": Pairs((Pair(slice(0, 12), slice(0, 7)),)),
}


def drawn(device: str, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    source = torch.Generator().manual_seed(0)
    values = [torch.randn(1, n, HEADS, WIDTH, generator=source, dtype=torch.float64) for n in (12, 7, 7, 12)]
    return [x.to(device, dtype) for x in values]


def masked(q: Tensor, k: Tensor, v: Tensor, pairs: Pairs) -> Tensor:
    """torch's attention with a mask; rows of no pair are zeros."""
    mask = torch.zeros(q.shape[1], k.shape[1], dtype=torch.bool)
    for pair in pairs.each:
        mask[pair.queries, pair.keys] = True
    seen = mask.any(1)
    heads_first = (x.transpose(1, 2) for x in (q[:, seen], k, v))
    out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask[seen]).transpose(1, 2)
    return torch.zeros_like(q).index_copy(1, seen.nonzero().flatten(), out)


@pytest.mark.parametrize("pairs", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    ("device", "dtype", "bound"),
    [
        ("cpu", torch.float64, 1e-12),
        ("cpu", torch.float32, 2e-6),
        ("cpu", torch.bfloat16, 2e-2),
        pytest.param("cuda", torch.bfloat16, 2e-2, marks=pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")),
    ],
)
def test_equals_torch_attention_with_a_mask(device: str, dtype: torch.dtype, bound: float, pairs: Pairs) -> None:
    *inputs, grad = drawn(device, dtype)
    leaves = [x.requires_grad_() for x in inputs]
    found = segment_attention(*leaves, pairs)
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    expected = masked(*exact, pairs)
    assert_close([found, *torch.autograd.grad(found, leaves, grad)],
                 [expected, *torch.autograd.grad(expected, exact, grad.cpu().double())], bound)  # fmt: skip


def assert_close(found: list[Tensor], expected: list[Tensor], bound: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a.cpu().double() - b).abs().max() <= bound * b.abs().max()


def test_nothing_to_attend_is_refused() -> None:
    *inputs, _ = drawn("cpu", torch.float32)
    with pytest.raises(ValueError, match="a pair"):
        segment_attention(*inputs, Pairs(()))


def test_chunks_of_a_ring_pair_up() -> None:
    """Samples of 5, 2 and 7 tokens in chunks of 3, 1 and 4 places: the second chunk has 2, 1 and 3 of their tokens."""
    segments = Segments((Segment(5, 3), Segment(2, 1), Segment(7, 4)))
    assert segments.places == 8
    assert segments.rows(1) == [slice(0, 2), slice(3, 4), slice(4, 7)]
    # a chunk without tokens of a sample has no pair for it
    assert segments.pairs(0, 1).each == (
        Pair(slice(0, 3), slice(0, 2)),
        Pair(slice(3, 4), slice(3, 4)),
        Pair(slice(4, 8), slice(4, 7)),
    )
    short = Segments((Segment(2, 2), Segment(3, 2)))
    assert short.pairs(0, 1).each == (Pair(slice(2, 4), slice(2, 3)),)
    assert short.pairs(1, 0).each == (Pair(slice(0, 1), slice(2, 4)),)


class Calls(TorchDispatchMode):
    """Attention kernels with the lengths that they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        if "attention" in name:
            self.made.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 16), (torch.float16, 12), (torch.float32, 16)])
def test_cuda_takes_all_samples_in_one_call(dtype: torch.dtype, width: int) -> None:
    """A fake tensor needs no device: torch checks arguments and gives the shapes of the results."""
    pairs = Pairs.of_rows(consecutive([5, 1, 6]), consecutive([2, 4, 1]))
    with FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "is_pinned", lambda x: True)  # there is no memory to lock
        q, k, v = (torch.empty(1, n, HEADS, width, dtype=dtype, device="cuda") for n in (12, 7, 7))
        with Calls() as calls:
            forward = list(forward_of_pairs(q, k, v, pairs))
            out, lse = torch.cat([x[1] for x in forward], 1), torch.cat([x[2] for x in forward], 2)
            backward = list(backward_of_pairs(out, q, k, v, out, lse, pairs))
    assert [pair for pair, *_ in forward] == [pair for pair, _ in backward] == list(pairs.each)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, dtype, (1, HEADS, 12), torch.float32)
    for pair, (dq, dk, dv) in backward:
        assert dq.shape == (1, pair.queries.stop - pair.queries.start, HEADS, width)
        assert dk.shape == dv.shape == (1, pair.keys.stop - pair.keys.start, HEADS, width)
    one = ["_flash_attention_forward", "_flash_attention_backward"]
    each = ["_scaled_dot_product_efficient_attention"] * 3 + ["_scaled_dot_product_efficient_attention_backward"] * 3
    assert calls.made == (each if dtype == torch.float32 else one)
