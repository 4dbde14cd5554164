"""Layer-zero: parameters sharded over groups of ranks and gathered layer by layer, on PyTorch's FSDP2.

The ranks that hold the same parameters form groups of `zero3_size`. Inside a group every rank keeps 1/zero3_size of
each parameter in fp32 and gathers a block in the training dtype when it runs (ZeRO-3, Rajbhandari et al. 2020, arXiv
1910.02054). Across the groups parameters are replicated and gradients are added up; `--use-distributed-optimizer`
shards the optimizer across the groups too.

Parameters that must stay fp32 in a module of another dtype (modulation and norm3 of a block, 8 D of its 8 D^2 + 4 D F;
the LayerNorms of the image embedding) are not sharded: FSDP2 gathers a module in one dtype. They are replicated, and
their gradients are averaged once a step. So are parameters that are added to a frozen model; its own are sharded in the
training dtype, as no gradient is ever added to them. Where some of its own are trained, a block has shards of both
dtypes, and gathers all of them in the training dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from mm.config.layerzero import ZeroConfig
from mm.parallel.stage import WanStage
from mm.wan.precision import keep_fp32

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def shard_stage(
    stage: WanStage, mesh: DeviceMesh, zero: ZeroConfig, device: torch.device, added: Collection[str] = ()
) -> FSDPModule:
    """Shard a stage that lies on the meta device, and give it memory on `device`.

    Args:
        stage: with fp32 parameters, where they are trained; frozen ones may be of the training dtype.
        mesh: (replicate, shard), the ranks that hold the same parameters.
        zero: the configuration.
        device: of this process.
        added: native names of parameters that were added to a frozen model (`mm.parallel.trainable_extension`);
            replicated, because they are trained in fp32 beside what is gathered in the training dtype.
    """
    axes = mesh if mesh["replicate"].size() > 1 else mesh["shard"]
    reduce_dtype = _DTYPES[zero.reduce_dtype]
    low = MixedPrecisionPolicy(param_dtype=stage.dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
    model = stage.model
    replicated = {
        parameter for name, parameter in model.named_parameters() if name in added or is_replicated(name, zero)
    }
    blocks = [fully_shard(block, mesh=axes, mp_policy=low, ignored_params=replicated) for block in stage.blocks]
    for name, module in model.named_children():
        if name not in ("blocks", "vace_blocks") and name not in (zero.ignored_modules or ()):
            fully_shard(module, mesh=axes, mp_policy=exact if keep_fp32(name) else low, ignored_params=replicated)
    root = fully_shard(stage, mesh=axes, mp_policy=low, ignored_params=replicated)
    if zero.forward_prefetch:
        _prefetch_forward(blocks)
    stage.to_empty(device=device)
    return root


def is_replicated(name: str, zero: ZeroConfig) -> bool:
    """Tell whether the parameter of this native name is whole on every rank although layer-zero shards the others."""
    top = name.split(".")[0]
    return top in (zero.ignored_modules or ()) or (keep_fp32(name) and not keep_fp32(top))


def local_rows(parameter: nn.Parameter | Tensor) -> tuple[Tensor, int]:
    """Rows of a parameter that this rank keeps, and the first one's index; a parameter that is not sharded is whole."""
    if not isinstance(parameter, DTensor):
        return parameter.data, 0
    _, offsets = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local().detach(), offsets[0]


def _prefetch_forward(blocks: list[FSDPModule]) -> None:
    """Gather a block while the one before it computes; in backward FSDP2 does so by itself."""
    for block, following in itertools.pairwise(blocks):
        block.set_modules_to_forward_prefetch([following])
