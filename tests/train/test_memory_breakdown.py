"""The memory of a rank by kind, against the bytes that each element of the model takes."""

import math
from dataclasses import replace

import pytest
import torch
from ranks import run_ranks

from mm.config.layerzero import ZeroConfig
from mm.config.layout import Layout, even_stages
from mm.config.model import WanConfig
from mm.config.optimizer import OptimizerName
from mm.config.place import process_place
from mm.device.backend import select
from mm.optim.make import make_optimizer
from mm.optim.settings import UpdateSettings
from mm.parallel.apply import DataParallelOptions, apply
from mm.parallel.layerzero import is_replicated
from mm.parallel.mesh import build_mesh
from mm.parallel.placement import whole_shapes
from mm.supervise.job import Job
from mm.train.memory_breakdown import MemoryBreakdown, measure
from mm.wan.precision import keep_fp32

WAN = WanConfig(text_dim=16, text_len=8, hidden_size=96, ffn_dim=192, num_heads=12, num_layers=2, freq_dim=32)
ZERO = ZeroConfig(zero3_size=2)
SETTINGS = UpdateSettings(
    lr=1.0, min_lr=0.0, lr_decay_style="constant", lr_warmup_init=0.0, warmup_samples=0, decay_samples=1,
    weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, clip_grad=1.0,
)  # fmt: skip
RUNS: list[tuple[torch.dtype, bool, ZeroConfig | None, float | None, OptimizerName]] = [
    (torch.float32, False, None, None, "adamw"),
    (torch.bfloat16, False, None, None, "adamw"),
    (torch.bfloat16, True, None, None, "adamw"),
    (torch.bfloat16, False, ZERO, None, "adamw"),
    (torch.float32, False, None, 0.9, "adamw"),
    (torch.bfloat16, True, None, 0.9, "adamw"),
    (torch.float32, False, None, None, "lion"),
    (torch.bfloat16, True, None, 0.9, "lion"),
    (torch.bfloat16, False, ZERO, None, "lion"),
]


def splits_of_a_rank() -> list[tuple[MemoryBreakdown, MemoryBreakdown]]:
    """Before and after the optimizer has its state, for each run."""
    backend, found = select("cpu"), []
    with Job(process_place(), "gloo", torch.device("cpu"), 1):
        for dtype, distributed, zero, decay, name in RUNS:
            layout = Layout(world_size=2, stages=even_stages(2, 1), zero3_size=zero.zero3_size if zero else None)
            with build_mesh(layout, 1, "cpu") as mesh:
                options = DataParallelOptions(use_distributed_optimizer=distributed)
                parallel = apply(WAN, mesh, backend, options, dtype, None, zero=zero)
                optimizer = make_optimizer(parallel, replace(SETTINGS, optimizer=name, ema_decay=decay))
                whole = {"peak": 10**9, "program": 10**8, "models": [(parallel, optimizer)]}
                before = measure("forward and backward", 0, **whole)
                for shard in optimizer.shards:
                    shard.state()
                found.append((before, measure("forward and backward", 0, **whole)))
    return found


def test_bytes_of_every_kind() -> None:
    """Sums over both ranks. In megatron-core's buffers every parameter begins at a multiple of 64 elements."""
    sizes = {name: math.prod(shape) for name, shape in whole_shapes(WAN).items()}
    every = sum(sizes.values())
    exact = sum(size for name, size in sizes.items() if keep_fp32(name))
    copied = sum(size for name, size in sizes.items() if is_replicated(name, ZERO))
    low, padding = every - exact, 2 * 4 * 64 * len(sizes)
    expected = [  # parameters, gradients, masters and their average, moments
        (2 * 4 * every, 2 * 4 * every, 0, 2 * 8 * every),
        (2 * (2 * low + 4 * exact), 2 * 4 * every, 2 * 4 * low, 2 * 8 * every),
        (2 * (2 * low + 4 * exact), 2 * 4 * every, 4 * low, 8 * every),
        (4 * (every + copied), 0, 0, 8 * (every + copied)),  # gradients are there only from backward to update
        (2 * 4 * every, 2 * 4 * every, 4 * every, 2 * 8 * every),
        (2 * (2 * low + 4 * exact), 2 * 4 * every, 4 * low + 4 * every, 8 * every),
        (2 * 4 * every, 2 * 4 * every, 0, 2 * 4 * every),
        (2 * (2 * low + 4 * exact), 2 * 4 * every, 4 * low + 4 * every, 4 * every),
        (4 * (every + copied), 0, 0, 4 * (every + copied)),
    ]
    for first, second, wanted in zip(*run_ranks(2, splits_of_a_rank), expected, strict=True):
        before, after = zip(first, second, strict=True)
        told = [sum(getattr(s, kind) for s in before) for kind in ("parameters", "gradients", "optimizer")]
        assert told == pytest.approx(wanted[:3], abs=padding)
        assert sum(split.moments_to_come for split in before) == pytest.approx(wanted[3], abs=padding)
        assert sum(split.optimizer for split in after) == pytest.approx(wanted[2] + wanted[3], abs=padding)
        assert all(split.moments_to_come == 0 for split in after)
        assert all(split.held == 10**9 for split in (*before, *after))
