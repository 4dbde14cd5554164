"""The update of an accelerator is AdamW and takes no memory beside what it updates."""

from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch
from traffic_rows import SETTINGS, WAN

from mm.config.layerzero import ZeroConfig
from mm.config.layout import Layout
from mm.config.place import process_place
from mm.device.backend import select
from mm.doctor import memory_tracker as memory
from mm.doctor.fake_job import FakeTensors, fake_job
from mm.doctor.memory_tracker import TrackMemory
from mm.optim.make import make_optimizer
from mm.optim.optimizer import is_decayed, norm_of
from mm.parallel.apply import DataParallelOptions, apply
from mm.parallel.mesh import build_mesh
from mm.supervise.job import Job
from mm.wan.initial import initial_value


@dataclass(frozen=True)
class Kept:
    """How parameters are kept: by DDP, cut by its distributed optimizer, or by layer-zero."""

    options: DataParallelOptions = field(default_factory=DataParallelOptions)
    zero: bool = False


KEPT = {
    "ddp": Kept(),
    "distributed": Kept(DataParallelOptions(use_distributed_optimizer=True)),
    "layer-zero": Kept(zero=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_the_update_makes_no_temporaries(kept: Kept, dtype: torch.dtype) -> None:
    """Counted at torch's dispatcher, where the default on accelerators makes the second moments' roots of all."""
    backend = select("cpu")
    layout = Layout(4, zero3_size=4 if kept.zero else None)
    with (
        fake_job(1, layout.world_size),
        build_mesh(layout, 1, backend.kind) as mesh,
        FakeTensors(),
        TrackMemory(memory.OPTIMIZER) as tracked,
    ):
        zero = ZeroConfig(zero3_size=4) if kept.zero else None
        parallel = apply(WAN, mesh, backend, kept.options, dtype, None, zero=zero)
        optimizer = make_optimizer(parallel, replace(SETTINGS, fused=True))
        for shard in optimizer.shards:
            shard.state()
        optimizer.reduce_gradients()
        tracked.kind = memory.ACTIVATIONS
        start = tracked.mark()
        optimizer.apply_gradients(norm=2.0)  # above the limit: clipped
        kept_bytes = sum(shard.master.nbytes for shard in optimizer.shards)
        made = tracked.peak(start).get(memory.ACTIVATIONS, 0)
    assert kept_bytes > 2**17
    assert made <= 16 * len(optimizer.shards)  # scalars


@pytest.mark.parametrize("kept", [KEPT["ddp"], KEPT["distributed"]], ids=["ddp", "distributed"])
def test_the_fused_update_is_adamw(kept: Kept) -> None:
    """Against the formula in fp64, over three updates, with clipping and decay."""
    backend = select("cpu")
    settings = replace(SETTINGS, fused=True, clip_grad=0.5)
    with Job(process_place(), "gloo", backend.device, 2), build_mesh(Layout(), 2, "cpu") as mesh:
        parallel = apply(WAN, mesh, backend, kept.options, torch.float32, partial(initial_value, seed=0))
        optimizer = make_optimizer(parallel, settings)
        weights = [shard.master.double() for shard in optimizer.shards]
        decayed = [settings.weight_decay * is_decayed(shard.name, parallel.all_parameters()[shard.name])
                   for shard in optimizer.shards]  # fmt: skip
        first, second = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
        draw = torch.Generator().manual_seed(0)
        for step in range(1, 4):
            optimizer.reduce_gradients()
            for shard in optimizer.shards:
                shard.gradient.copy_(1e-3 * torch.randn(len(shard.gradient), generator=draw))
            norm = norm_of(optimizer.gradient_squares(torch.empty(0))[0])
            gradients = [shard.gradient.double() * min(1.0, 0.5 / (norm + 1e-6)) for shard in optimizer.shards]
            optimizer.update(norm, samples=1)
            for weight, decay, m, v, gradient in zip(weights, decayed, first, second, gradients, strict=True):
                m.lerp_(gradient, 1 - settings.adam_beta1)
                v.lerp_(gradient.square(), 1 - settings.adam_beta2)
                size = (v / (1 - settings.adam_beta2**step)).sqrt() + settings.adam_eps
                weight.mul_(1 - settings.lr * decay).sub_(settings.lr * m / (1 - settings.adam_beta1**step) / size)
        assert optimizer.steps_made() == 3
        for shard, weight in zip(optimizer.shards, weights, strict=True):
            torch.testing.assert_close(shard.master.double(), weight, rtol=1e-6, atol=1e-7)
