"""Adapters of a block cut over two tensor-parallel ranks, against one process that has never heard of LoRA.

The one process has plain linears with merged weights W + (alpha / r) B A. Its gradient dW gives those of the adapter by
the chain rule: dA = (alpha / r) B^T dW and dB = (alpha / r) dW A^T.
"""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn

from mm.config.layout import Layout
from mm.config.model import WanConfig
from mm.config.place import process_place
from mm.device.backend import select
from mm.doctor.traffic import CountTraffic
from mm.lora.layer import Adapted, adapter_shapes, add_adapters, is_adapter
from mm.lora.targets import linears_of
from mm.parallel.apply import model_parts
from mm.parallel.mesh import Mesh, build_mesh
from mm.parallel.placement import place
from mm.parallel.tensor import gradient_is_partial
from mm.supervise.job import Job
from mm.wan.block import FeedForward, WanBlock
from mm.wan.layers import ModuleFactories, run_in_order
from mm.wan.rope import grid_positions

CONFIG = WanConfig(hidden_size=48, ffn_dim=72, num_heads=4, num_layers=1)
GRID, TOKENS, TEXT, RANK, ALPHA = (2, 3, 4), 24, 5, 4, 6.0
ATTENTION = [f"{kind}_attn.{letter}" for kind in ("self", "cross") for letter in "qkvo"]
FFN = ["ffn.0", "ffn.2"]

Whole = dict[str, Tensor]
"""Whole tensors by the end of a native name, after `blocks.0.`."""
Errors = dict[str, float]
"""What was compared, and the largest difference beside the largest value."""
Messages = tuple[int, int]
"""What a rank sends with adapters and not without, where all weights are trained; and the other way round."""


def random_like(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> Whole:
    """The same on every rank; matrices such that signals keep their size."""
    random = torch.Generator().manual_seed(11)
    return {
        name: torch.randn(*shape, generator=random, dtype=dtype) / (shape[-1] ** 0.5 if len(shape) == 2 else 4)
        + float("norm" in name and name.endswith("weight"))
        for name, shape in shapes.items()
    }


def error(value: Tensor, expected: Tensor) -> float:
    return ((value - expected).abs().max() / expected.abs().max()).item()


class Holder(nn.Module):
    """Gives a module the place that it has in a model, `blocks.0.<name>`; no name: it is the block."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        block = module if not name else nn.ModuleDict({name: module})
        self.blocks = nn.ModuleDict({"0": block})


def compare(
    mesh: Mesh, make: Callable[[ModuleFactories], nn.Module], name: str, adapted: list[str], dtype: torch.dtype,
    run: Callable[[nn.Module, tuple[Tensor, ...]], Tensor], inputs: tuple[Tensor, ...], cut: list[bool],
) -> tuple[Errors, Messages]:  # fmt: skip
    """Errors of outputs and gradients on this rank, and what adapters change in what is sent.

    `cut` says which inputs a rank has only its tokens of, with sequence parallelism; the output is as the first.
    """
    single = Holder(make(ModuleFactories()), name).to(dtype)
    bare = Holder(make(model_parts(mesh, run_in_order)), name).to(dtype)
    ours = Holder(make(model_parts(mesh, run_in_order)), name).to(dtype)
    targets = {f"blocks.0.{target}": Adapted(RANK, ALPHA) for target in adapted}
    add_adapters(ours, targets)
    shapes = {n: tuple(p.shape) for n, p in single.named_parameters()}
    shapes |= adapter_shapes(linears_of(shapes), targets)
    whole = random_like(shapes, dtype)
    placements = {n: place(n, shape, mesh.tp_rank, mesh.layout.tp_size) for n, shape in shapes.items()}
    scale = ALPHA / RANK
    with torch.no_grad():
        for n, p in (*bare.named_parameters(), *ours.named_parameters()):
            p.data = placements[n].of(whole[n])
        for n, p in single.named_parameters():
            a, b = whole.get(n.replace("weight", "lora_A")), whole.get(n.replace("weight", "lora_B"))
            merged = n.endswith("weight") and a is not None and b is not None
            p.copy_(whole[n] + scale * b @ a if merged else whole[n])

    tokens = slice(None)
    if mesh.layout.sequence_parallel:
        share = TOKENS // mesh.layout.tp_size
        tokens = slice(mesh.tp_rank * share, (mesh.tp_rank + 1) * share)
    theirs = tuple(value.clone().requires_grad_() for value in inputs)
    local = [value[:, tokens] if is_cut else value for value, is_cut in zip(inputs, cut, strict=True)]
    mine = tuple(value.clone().requires_grad_() for value in local)

    expected = run(single, theirs)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5), dtype=dtype)
    (expected * weight).sum().backward()
    traffic = []
    for holder in (bare, ours):
        for value in mine:
            value.grad = None
        with CountTraffic({}) as count:
            found = run(holder, mine)
            (found * weight[:, tokens]).sum().backward()
        traffic.append(Counter(count.calls))

    errors = {"output": error(found, expected[:, tokens])}
    for index, (one, other, is_cut) in enumerate(zip(mine, theirs, cut, strict=True)):
        errors[f"gradient of input {index}"] = error(*input_gradients(one, other, is_cut, tokens, mesh))
    gradients = dict(single.named_parameters())
    for n, p in ours.named_parameters():
        assert (p.grad is not None) == is_adapter(n), n
        if p.grad is None:
            continue
        module, half = n.rsplit(".", 1)
        whole_weight = gradients[f"{module}.weight"].grad
        a, b = whole[f"{module}.lora_A"], whole[f"{module}.lora_B"]
        right = scale * (b.T @ whole_weight if half == "lora_A" else whole_weight @ a.T)
        if gradient_is_partial(n, mesh.layout.sequence_parallel):
            dist.all_reduce(p.grad, group=mesh.groups.tp)
        errors[n] = error(p.grad, placements[n].of(right))
    return errors, ((traffic[1] - traffic[0]).total(), (traffic[0] - traffic[1]).total())


def input_gradients(one: Tensor, other: Tensor, is_cut: bool, tokens: slice, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """Ours and the expected one. What every rank has whole with sequence parallelism gets a part from each."""
    if is_cut:
        return one.grad, other.grad[:, tokens]
    total = one.grad.clone()
    dist.all_reduce(total, group=mesh.groups.tp)
    return total, other.grad


def feed_forward(mesh: Mesh) -> tuple[Errors, Messages]:
    """A column and a row linear in fp64."""
    x = torch.randn(2, TOKENS, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def run(holder: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        return holder.get_submodule("blocks.0.ffn")(*inputs)

    return compare(mesh, lambda parts: FeedForward(CONFIG, parts), "ffn", FFN, torch.float64, run, (x,), [True])


def block(mesh: Mesh, adapted: list[str]) -> tuple[Errors, Messages]:
    """A whole block in fp32; its text is whole on every rank."""
    random = torch.Generator().manual_seed(2)
    x = torch.randn(2, TOKENS, 48, generator=random)
    context = torch.randn(2, TEXT, 48, generator=random)
    time = torch.randn(2, 6, 48, generator=random)

    def run(holder: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        return holder.get_submodule("blocks.0")(inputs[0], time, inputs[1], grid_positions(GRID, CONFIG.head_dim))

    return compare(
        mesh, lambda parts: WanBlock(CONFIG, parts), "", adapted, torch.float32, run, (x, context), [True, False]
    )


def on_this_rank(sequence_parallel: bool) -> dict[str, tuple[Errors, Messages]]:
    backend = select("cpu")
    layout = Layout(2, tp_size=2, sequence_parallel=sequence_parallel)
    with Job(process_place(), backend.collective, backend.device, 2), build_mesh(layout, 2, "cpu") as mesh:
        return {
            "feed-forward": feed_forward(mesh),
            "all": block(mesh, ATTENTION + FFN),
            "some": block(mesh, ["self_attn.k", "cross_attn.o", "ffn.2"]),
        }


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp2", "tp2 sp"])
def test_two_ranks_give_the_values_and_gradients_of_one_process(sequence_parallel: bool):
    for found in run_ranks(2, on_this_rank, sequence_parallel):
        for case, (errors, (more, fewer)) in found.items():
            # frozen linears without an adapter (cross_attn.q, ffn.0) do not ask for their whole input in backward
            assert (more, fewer) == (0, 2 if case == "some" and sequence_parallel else 0), case
            halves = sum(is_adapter(name) for name in errors)
            assert halves == {"feed-forward": 4, "all": 20, "some": 6}[case]
            worst = max(errors.items(), key=lambda item: item[1])
            assert worst[1] <= (1e-12 if case == "feed-forward" else 1e-5), (case, worst)
