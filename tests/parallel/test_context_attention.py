"""Ulysses, ring, double ring and USP attention against plain attention over the whole sequence; their traffic.

One start of eight processes runs every layout on its first ranks, or on all of them in several groups at once.
"""

import contextlib
import datetime
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from context_layouts import BATCH, CHUNK, DRY, HEADS, LAYOUTS, WIDTH, WORLD, Layout, formulas
from ranks import run_ranks
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from mm.config.place import process_place
from mm.ops.attention.api import attention_backward, attention_with_lse
from mm.ops.attention.segments import Segment, Segments
from mm.parallel.context import ContextGroups, build_context_groups, context_attention
from mm.parallel.groups import GroupMaker
from mm.parallel.ring import merge_attention
from mm.supervise.job import Job

MINUTE = datetime.timedelta(minutes=1)
RECOMPUTED = ("ring-4", "ulysses-4", "usp-2x4")
IN_BF16 = ("ring-8", "double-ring-4x2", "usp-2x4")


class Recorder(TorchDispatchMode):
    """What torch dispatches to the collectives and the attention kernels, and when exchanges are awaited."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []
        self.calls: Counter[str] = Counter()
        self.sent_bytes = 0.0
        self.batches: list[list[tuple[str, str]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        if namespace == "c10d":
            self.calls[name] += 1
            if name == "send":
                self.sent_bytes += sum(x.numel() * x.element_size() for x in args[0])
            if name == "alltoall_base_":  # what a rank keeps is not sent
                size = dist.ProcessGroup.unbox(args[2]).size()
                self.sent_bytes += args[1].numel() * args[1].element_size() * (size - 1) / size
        elif "scaled_dot_product" in name:
            self.events.append("compute")
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def recording(self) -> Iterator["Recorder"]:
        real = dist.batch_isend_irecv

        def batch_isend_irecv(messages: list[dist.P2POp]) -> list[Any]:
            first = messages[0]
            what = "dkv" if first.tensor.dtype == torch.float32 else "kv"
            label = f"{what} {'to' if first.op is dist.isend else 'from'} {first.group_peer}"
            self.events.append(f"post {label}")
            self.batches.append([(message.op.__name__, message.group.group_name) for message in messages])
            return [Awaited(work, f"wait {label}", self.events) for work in real(messages)]

        with mock.patch.object(dist, "batch_isend_irecv", batch_isend_irecv), self:
            yield self


class Awaited:
    """A work that notes when it is waited for, once for the works of a batch."""

    def __init__(self, work: dist.Work, event: str, events: list[str]) -> None:
        self.work, self.event, self.events = work, event, events

    def wait(self) -> None:
        if self.events[-1] != self.event:
            self.events.append(self.event)
        self.work.wait()


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("btnk,bsnk->bnts", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bnts,bsnk->btnk", scores.softmax(-1), v)


def draw(num_tokens: int, heads: int, width: int, count: int = 4, batch: int = BATCH) -> list[Tensor]:
    source = torch.Generator().manual_seed(num_tokens)
    shape = (batch, num_tokens, heads, width)
    return [torch.randn(shape, generator=source, dtype=torch.float64) for _ in range(count)]


def run_attention(
    attention: Callable[..., Tensor], inputs: Sequence[Tensor], grad_out: Tensor, *more: Any
) -> list[Tensor]:
    """Output and the gradients of the inputs."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = attention(*inputs, *more)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad_out)]


def of_one_sample(groups: ContextGroups, ulysses_size: int = 1) -> Callable[..., Tensor]:
    """The attention of a rank in a sequence with so many tokens of one sample, given q, k, v and their number."""
    attention = context_attention(groups)

    def of(q: Tensor, k: Tensor, v: Tensor, num_tokens: int) -> Tensor:
        return attention(q, k, v, Segments((Segment(num_tokens, ulysses_size * q.shape[1]),)))

    return of


def exactness(attention: Callable[..., Tensor], cp_rank: int, cp_size: int, num_tokens: int, garbage: float) -> Any:
    """Worst error of out, dq, dk, dv over their largest value, and whether padding got zeros; padding holds garbage."""
    *inputs, grad_out = draw(num_tokens, HEADS, WIDTH)
    expected = run_attention(plain_attention, inputs, grad_out)
    mine = slice(cp_rank * CHUNK, (cp_rank + 1) * CHUNK)
    padding = torch.full((BATCH, cp_size * CHUNK - num_tokens, HEADS, WIDTH), garbage, dtype=torch.float64)
    chunks = [torch.cat((x, padding), dim=1)[:, mine] for x in (*inputs, grad_out)]
    found = run_attention(attention, chunks[:3], chunks[3], num_tokens)
    num_real = min(max(num_tokens - cp_rank * CHUNK, 0), CHUNK)
    errors = [
        float((x[:, :num_real] - y[:, mine]).abs().max() / y.abs().max()) if num_real else 0.0
        for x, y in zip(found, expected, strict=True)
    ]
    return errors, all(bool((x[:, num_real:] == 0).all()) for x in found)


def traffic(attention: Callable[..., Tensor], num_tokens: int) -> dict[str, Any]:
    """Calls, bytes, events of a forward and of its backward in bf16, and the bytes saved between them."""
    inputs = [torch.zeros(BATCH, CHUNK, HEADS, WIDTH, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    saved: list[int] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.nbytes)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), Recorder().recording() as forward:
        out = attention(*inputs, num_tokens)
    with Recorder().recording() as backward:
        out.backward(torch.zeros_like(out))
    return {
        "calls": [dict(forward.calls), dict(backward.calls)],
        "bytes": [forward.sent_bytes, backward.sent_bytes],
        "events": [forward.events, backward.events],
        "batches": [forward.batches, backward.batches],
        "saved": sum(saved),
    }


def run_layout(name: str, layout: Layout, groups: ContextGroups) -> dict[str, Any]:
    cp_rank, full = dist.get_rank() % layout.cp, layout.cp * CHUNK
    attention = of_one_sample(groups, layout.ulysses)

    def recomputed(*args: Any) -> Tensor:
        return checkpoint(attention, *args, use_reentrant=False)

    # no padding; the last chunk all padding and the one before in part; every chunk but the first all padding
    padded = [(full, 0.0), (full - CHUNK - 1, 1e30), (2, float("nan"))]
    exact = [exactness(attention, cp_rank, layout.cp, *case) for case in padded]
    if name in RECOMPUTED:
        exact.append(exactness(recomputed, cp_rank, layout.cp, *padded[1]))
    bf16 = bf16_errors(attention, cp_rank, layout.cp) if name in IN_BF16 else []
    return {"exact": exact, "traffic": traffic(attention, full), "bf16": bf16}


def bf16_errors(attention: Callable[..., Tensor], cp_rank: int, cp_size: int) -> list[float]:
    """Root mean square error of out, dq, dk, dv over the root mean square of the values, for bf16 inputs."""
    tensors = [x.bfloat16() for x in draw(cp_size * 32, HEADS, 16, batch=1)]
    expected = run_attention(plain_attention, [x.double() for x in tensors[:3]], tensors[3].double())
    mine = slice(cp_rank * 32, (cp_rank + 1) * 32)
    found = run_attention(attention, [x[:, mine] for x in tensors[:3]], tensors[3][:, mine], cp_size * 32)
    assert {x.dtype for x in found} == {torch.bfloat16}
    return [float((x - y[:, mine]).norm() / y[:, mine].norm()) for x, y in zip(found, expected, strict=True)]


def all_layouts() -> dict[str, Any]:
    """On every rank of the world: every layout's results, none where the rank is left over."""
    results: dict[str, Any] = {}
    made: dict[int, Any] = {}
    maker = GroupMaker(MINUTE)
    with Job(process_place(), "gloo", torch.device("cpu"), 1):
        for name, layout in LAYOUTS.items():
            if layout.cp not in made:
                made[layout.cp] = maker.make("cp", layout.groups())
            arguments = (layout.groups(), layout.ulysses, layout.window, layout.overlap, maker)
            if dist.get_rank() < layout.cp * len(layout.groups()):
                results[name] = run_layout(name, layout, build_context_groups(made[layout.cp], *arguments))
            else:
                with pytest.raises(ValueError, match="in none of the context-parallel groups"):
                    build_context_groups(made[layout.cp], *arguments)
    results["dry"] = dry_run(DRY)
    return results


def dry_run(layout: Layout) -> dict[str, Any]:
    """One process of 64, with fake collectives and fake tensors."""
    dist.init_process_group("fake", store=FakeStore(), rank=37, world_size=64)
    cp_groups = [range(first, first + layout.cp) for first in range(0, 64, layout.cp)]
    maker = GroupMaker(MINUTE)
    mine = maker.make("cp", cp_groups)
    assert mine is not None
    groups = build_context_groups(mine, cp_groups, layout.ulysses, layout.window, layout.overlap, maker)
    with FakeTensorMode():
        result = traffic(of_one_sample(groups, layout.ulysses), layout.cp * CHUNK)
    dist.destroy_process_group()
    return result


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(WORLD, all_layouts, timeout_s=300)


def of(name: str, ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = [rank[name] for rank in ranks if name in rank]
    assert len(found) == LAYOUTS[name].cp * len(LAYOUTS[name].groups())
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_plain_attention(name: str, ranks: list[dict[str, Any]]) -> None:
    for result in of(name, ranks):
        assert len(result["exact"]) == 3 + (name in RECOMPUTED)
        for errors, padding_is_zero in result["exact"]:
            assert all(error < 1e-11 for error in errors), errors  # also when one is not a number
            assert padding_is_zero


@pytest.mark.parametrize("name", LAYOUTS)
def test_traffic_is_what_the_formulas_say(name: str, ranks: list[dict[str, Any]]) -> None:
    for result in of(name, ranks):
        sent, calls = formulas(LAYOUTS[name])
        assert result["traffic"]["bytes"] == pytest.approx(sent, rel=1e-12)
        assert result["traffic"]["calls"] == calls


@pytest.mark.parametrize("name", [name for name in LAYOUTS if LAYOUTS[name].ring > 1])
def test_only_local_tensors_are_saved(name: str, ranks: list[dict[str, Any]]) -> None:
    """q, k, v and the output in bf16, the log-sum-exp in fp32: as much as on one device, over the number of ranks."""
    for result in of(name, ranks):
        assert result["traffic"]["saved"] == BATCH * CHUNK * HEADS * (4 * WIDTH * 2 + 4)


FORWARD = {
    "ring-4": [
        "post kv to 1", "compute", "wait kv to 1", "post kv to 1", "compute", "wait kv to 1",
        "post kv to 1", "compute", "wait kv to 1", "compute",
    ],
    "double-ring-2x2": [  # the exchange with the next window is posted first and awaited when this window is done
        "post kv to 2", "post kv to 1", "compute", "wait kv to 1", "compute",
        "wait kv to 2", "post kv to 1", "compute", "wait kv to 1", "compute",
    ],
}  # fmt: skip
BACKWARD = {
    "ring-4": [
        "post kv to 1", "compute", "wait kv to 1", "post kv to 1", "compute", "post dkv to 1",
        "wait kv to 1", "post kv to 1", "compute", "wait dkv to 1", "post dkv to 1",
        "wait kv to 1", "compute", "wait dkv to 1", "post dkv to 1", "wait dkv to 1",
    ],
    "double-ring-2x2": [
        "post kv to 2", "post kv to 1", "compute", "wait kv to 1", "compute", "post dkv to 3",
        "wait kv to 2", "post kv to 1", "compute", "wait dkv to 3", "post dkv to 1",
        "wait kv to 1", "compute", "wait dkv to 1", "post dkv to 3", "wait dkv to 3",
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "order"),
    [("ring-4", "ring-4"), ("double-ring-one-window", "ring-4"), ("double-ring-2x2", "double-ring-2x2")],
)
def test_the_next_exchange_is_posted_before_computing(name: str, order: str, ranks: list[dict[str, Any]]) -> None:
    assert ranks[0][name]["traffic"]["events"] == [FORWARD[order], BACKWARD[order]]


def test_overlap_sends_and_receives_on_two_communicators(ranks: list[dict[str, Any]]) -> None:
    """Of an even ring, every rank's sends are all on one communicator and its receives on the other."""
    used = []
    for result in of("ring-8-overlap", ranks):
        batches = [batch for phase in result["traffic"]["batches"] for batch in phase]
        assert all(len(batch) == 1 for batch in batches)
        sends, receives = ({name for ((op, name),) in batches if op == kind} for kind in ("isend", "irecv"))
        assert len(sends) == len(receives) == 1 and sends != receives
        used.append(sends.pop())
    assert used == used[:2] * 4 and used[0] != used[1]
    for result in of("ring-8", ranks):  # without, a message in each direction at a time, on one communicator
        batches = [batch for phase in result["traffic"]["batches"] for batch in phase]
        assert all([op for op, _ in batch] == ["isend", "irecv"] for batch in batches)
        assert len({name for batch in batches for _, name in batch}) == 1


def test_windows_exchange_on_their_own_communicator(ranks: list[dict[str, Any]]) -> None:
    for result in of("double-ring-4x2", ranks):
        outer, inner = (result["traffic"]["batches"][0][i][0][1] for i in (0, 1))
        names = [batch[0][1] for batch in result["traffic"]["batches"][0]]
        assert outer != inner and names == [outer] + [inner] * 6


# Root mean square errors over those of the values. One rounding to bf16 costs about 0.002.
BF16_OUT, BF16_GRADS = 0.0033, 0.0038


@pytest.mark.parametrize("name", IN_BF16)
def test_bf16_is_accumulated_in_fp32(name: str, ranks: list[dict[str, Any]]) -> None:
    for result in of(name, ranks):
        out, *grads = result["bf16"]
        assert out < BF16_OUT
        assert all(error < BF16_GRADS for error in grads)


def test_accumulation_in_bf16_would_be_noticed() -> None:
    """The same blocks, with the running output, or the running gradients, rounded to bf16 after each of them."""
    q, k, v, grad_out = (x.bfloat16() for x in draw(8 * 32, HEADS, 16, batch=1))
    expected, *grads = run_attention(plain_attention, [x.double() for x in (q, k, v)], grad_out.double())
    blocks = [slice(first, first + 32) for first in range(0, 8 * 32, 32)]
    out, lse = torch.zeros_like(q), torch.full((1, HEADS, 8 * 32), float("-inf"))
    for block in blocks:
        merged, lse = merge_attention(out.float(), lse, *attention_with_lse(q, k[:, block], v[:, block]))
        out = merged.bfloat16()
    assert float((out - expected).norm() / expected.norm()) > BF16_OUT
    exact_out, lse = attention_with_lse(q, k, v)
    dq = torch.zeros_like(q)
    for block in blocks:
        dq += attention_backward(grad_out, q, k[:, block], v[:, block], exact_out, lse)[0]
    assert float((dq - grads[0]).norm() / grads[0].norm()) > BF16_GRADS


def test_a_dry_run_counts_the_same(ranks: list[dict[str, Any]]) -> None:
    """USP of 4 x double ring of 2 x 2 as rank 37 of 64: no process, no data, the same calls and bytes."""
    sent, calls = formulas(DRY)
    for rank in ranks:
        assert rank["dry"]["bytes"] == pytest.approx(sent, rel=1e-12)
        assert rank["dry"]["calls"] == calls
        assert rank["dry"]["saved"] == BATCH * CHUNK * HEADS * (4 * WIDTH * 2 + 4)


def test_one_rank_needs_no_groups() -> None:
    alone = ContextGroups(None, None, None, 1)
    attention = of_one_sample(alone)
    errors, padding_is_zero = exactness(attention, 0, 1, CHUNK - 1, float("nan"))
    assert all(error < 1e-11 for error in errors) and padding_is_zero
    for num_tokens in (0, CHUNK + 1):
        with pytest.raises(ValueError, match=f"{num_tokens} tokens in 1 chunks with {CHUNK} places"):
            attention(*draw(CHUNK, HEADS, WIDTH, 3), num_tokens)
    with pytest.raises(ValueError, match=f"segments of {2 * CHUNK} places on 1 ranks with {CHUNK} places each"):
        of_one_sample(alone, 2)(*draw(CHUNK, HEADS, WIDTH, 3), CHUNK)


@pytest.mark.parametrize(
    ("cp_groups", "ulysses", "window", "message"),
    [
        ([range(6)], 4, 1, "6 ranks do not split into Ulysses 4 x windows of 1"),
        ([range(6)], 1, 4, "6 ranks do not split into Ulysses 1 x windows of 4"),
        ([range(2), range(2, 5)], 1, 1, "of one size and ascending"),
        ([[1, 0]], 1, 1, "of one size and ascending"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(cp_groups: Any, ulysses: int, window: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_context_groups(None, cp_groups, ulysses, window, False, GroupMaker(MINUTE))
