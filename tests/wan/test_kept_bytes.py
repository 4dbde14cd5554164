"""What a block keeps for its backward: bytes for each token and unit of width, in bf16, beside diffusers' block."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from mm.activation.offload import Offloader
from mm.activation.recompute import block_runner
from mm.config.model import WanConfig
from mm.config.recompute import Recompute
from mm.device.queues import HostQueues
from mm.doctor import memory_tracker as memory
from mm.doctor.memory_tracker import TrackMemory
from mm.parallel.context import ContextGroups, context_attention
from mm.wan.block import Layer, WanBlock
from mm.wan.compile import compile_blocks
from mm.wan.layers import ModuleFactories
from mm.wan.precision import keep_fp32
from mm.wan.rope import grid_positions

GRID, TOKENS, TEXT = (2, 6, 8), 96, 8
SIZES = {
    "1.3B": WanConfig(hidden_size=1536, ffn_dim=8960, num_heads=12, num_layers=1),
    "14B": WanConfig(hidden_size=5120, ffn_dim=13824, num_heads=40, num_layers=1),
}


def kept_bytes(run: Callable[[], object], parameters: Iterable[nn.Parameter]) -> int:
    """Of the distinct storages that autograd saves and that grow with the tokens; weights are not activations."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own and TOKENS in value.shape:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        alive = run()  # until counted, so that no storage takes the place of another
    del alive
    return sum(kept.values())


def in_bf16(block: WanBlock) -> WanBlock:
    for name, parameter in block.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if keep_fp32(f"blocks.0.{name}") else torch.bfloat16)
    return block


def ours(config: WanConfig) -> float:
    return bytes_of(in_bf16(WanBlock(config, ModuleFactories())), config)


def bytes_of(block: WanBlock, config: WanConfig) -> float:
    width = config.hidden_size
    x = torch.randn(1, TOKENS, width, dtype=torch.bfloat16, requires_grad=True)
    time = torch.randn(1, 6, width, requires_grad=True)
    context = torch.randn(1, TEXT, width, dtype=torch.bfloat16, requires_grad=True)
    positions = grid_positions(GRID, config.head_dim)
    return kept_bytes(lambda: block(x, time, context, positions), block.parameters()) / (TOKENS * width)


@pytest.mark.nightly
def test_a_compiled_block_keeps_as_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    config = WanConfig(hidden_size=192, ffn_dim=384, num_heads=4, num_layers=1)
    found = {}
    for compiled in (False, True):
        block = in_bf16(WanBlock(config, ModuleFactories()))
        if compiled:
            compile_blocks([block], num_graphs=1, tensor_parallel=False)
        found[compiled] = bytes_of(block, config)
    torch.compiler.reset()
    assert found[True] <= found[False]


def of_diffusers(config: WanConfig) -> float:
    width = config.hidden_size
    block = WanTransformerBlock(width, config.ffn_dim, config.num_heads, cross_attn_norm=True).bfloat16()
    for module in (block.norm1, block.norm2, block.norm3):
        module.float()
    block.scale_shift_table.data = block.scale_shift_table.data.float()
    x = torch.randn(1, TOKENS, width, dtype=torch.bfloat16, requires_grad=True)
    time = torch.randn(1, 6, width, requires_grad=True)
    text = torch.randn(1, TEXT, width, dtype=torch.bfloat16, requires_grad=True)
    table = torch.randn(1, TOKENS, 1, config.head_dim)
    return kept_bytes(lambda: block(x, text, time, (table, table)), block.parameters()) / (TOKENS * width)


@pytest.mark.parametrize("size", ["1.3B", pytest.param("14B", marks=pytest.mark.nightly)])
def test_attention_of_training_on_one_rank_keeps_no_more(size: str) -> None:
    parts = ModuleFactories(self_attention=context_attention(ContextGroups(None, None, None, 1)))
    assert bytes_of(in_bf16(WanBlock(SIZES[size], parts)), SIZES[size]) == ours(SIZES[size])


@pytest.mark.parametrize(("size", "most"), [("1.3B", 58), pytest.param("14B", 46, marks=pytest.mark.nightly)])
def test_a_block_saves_nothing_twice(size: str, most: float) -> None:
    found = ours(SIZES[size])
    assert found <= most
    assert of_diffusers(SIZES[size]) > 1.5 * found


MODES: dict[str, tuple[Recompute | None, float]] = {
    "none": (None, 0),
    "full": (Recompute(), 2),
    "keep O": (Recompute(full_layers=0, keep_layers=None), 4),
    "keep q,k,v,O": (Recompute(full_layers=0, keep_layers=None, kept="q,k,v,O"), 10),
    "keep O, offloaded": (Recompute(full_layers=0, keep_layers=None, offload=True), 0),
    "keep q,k,v,O, offloaded": (Recompute(full_layers=0, keep_layers=None, kept="q,k,v,O", offload=True), 0),
}


def alive(config: WanConfig, plan: Recompute | None, num_layers: int, tokens: int) -> tuple[int, int]:
    """Bytes on the device after the forward of so many blocks, and the most there were until the end of backward."""
    with FakeTensorMode(), TrackMemory(memory.ACTIVATIONS) as tracked:
        offloader = None
        if plan is not None and plan.offload:
            offloader = Offloader(HostQueues(), num_layers, 16 * tokens * config.hidden_size)
            tracked.label([offloader.memory], memory.HOST)
        blocks = [in_bf16(WanBlock(config, ModuleFactories())) for _ in range(num_layers)]
        for block in blocks:
            tracked.label(block.parameters(), memory.PARAMETERS)
        x = torch.randn(1, tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        time = torch.randn(1, 6, config.hidden_size, requires_grad=True)
        context = torch.randn(1, TEXT, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        positions = grid_positions((1, 1, tokens), config.head_dim)
        (out,) = block_runner(plan, offloader)([*map(Layer, blocks)], (x * 1,), time, context, positions)
        kept, start = tracked.now(memory.ACTIVATIONS), tracked.mark()
        out.sum().backward()
        return kept, tracked.peak(start)[memory.ACTIVATIONS] - sum(
            p.grad.nbytes for b in blocks for p in b.parameters()
        )


@pytest.mark.parametrize("size", ["1.3B", pytest.param("14B", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.nightly
def test_what_a_further_block_keeps(size: str, mode: str) -> None:
    """Bytes a token and unit of width that one more block adds; attention's statistics are 4 bytes a token and head."""
    config, (plan, expected) = SIZES[size], MODES[mode]

    def slope(of: int) -> float:
        more, few = ([alive(config, plan, layers, tokens)[of] for tokens in (256, 128)] for layers in (4, 3))
        return ((more[0] - more[1]) - (few[0] - few[1])) / (128 * config.hidden_size)

    statistics = 4 * config.num_heads / config.hidden_size if mode in ("keep O", "keep q,k,v,O") else 0
    if plan is None:
        assert slope(0) <= {"1.3B": 58, "14B": 46}[size]
    else:
        assert slope(0) == expected + statistics
        assert slope(1) <= expected + statistics  # in backward no more than in forward
