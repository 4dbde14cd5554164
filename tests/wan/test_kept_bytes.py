"""What a block keeps for its backward: bytes for each token and unit of width, in bf16, beside diffusers' block."""

from collections.abc import Callable, Iterable

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor, nn

from mm.config.model import WanConfig
from mm.wan.block import WanBlock
from mm.wan.layers import Parts
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


def ours(config: WanConfig) -> float:
    block = WanBlock(config, Parts())
    for name, parameter in block.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if keep_fp32(f"blocks.0.{name}") else torch.bfloat16)
    width = config.hidden_size
    x = torch.randn(1, TOKENS, width, dtype=torch.bfloat16, requires_grad=True)
    time = torch.randn(1, 6, width, requires_grad=True)
    context = torch.randn(1, TEXT, width, dtype=torch.bfloat16, requires_grad=True)
    positions = grid_positions(GRID, config.head_dim)
    return kept_bytes(lambda: block(x, time, context, positions), block.parameters()) / (TOKENS * width)


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


@pytest.mark.parametrize(("size", "most"), [("1.3B", 58), ("14B", 46)])
def test_a_block_saves_nothing_twice(size: str, most: float) -> None:
    found = ours(SIZES[size])
    assert found <= most
    assert of_diffusers(SIZES[size]) > 1.5 * found
