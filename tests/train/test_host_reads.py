"""A step makes the host wait for the device once, and copies nothing to it that is waited for."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from host_reads import CountHostReads
from programs import Forked, as_script

from mm.config.diffusion import DiffusionConfig
from mm.config.layout import Layout
from mm.config.model import WanConfig
from mm.config.place import process_place
from mm.data.loader import FeatureBatch
from mm.device.backend import select
from mm.diffusion.flow import FlowMatching
from mm.optim.make import make_optimizer
from mm.optim.optimizer import Optimizer
from mm.optim.settings import UpdateSettings
from mm.parallel.apply import DataParallelOptions, ParallelModel, apply
from mm.parallel.mesh import build_mesh
from mm.supervise.job import Job
from mm.train.step import train_step
from mm.wan.initial import initial_value

WAN = WanConfig(text_dim=16, text_len=8, hidden_size=48, ffn_dim=96, num_heads=2, num_layers=2, freq_dim=16)
SETTINGS = UpdateSettings(
    lr=1e-3, min_lr=0.0, lr_decay_style="constant", lr_warmup_init=0.0, warmup_samples=0, decay_samples=1000,
    weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, clip_grad=1.0, fused=True,
)  # fmt: skip


@contextmanager
def engine(dtype: torch.dtype, options: DataParallelOptions) -> Iterator[tuple[ParallelModel, Optimizer]]:
    backend = select("cpu")
    with (
        Job(process_place(), backend.collective, backend.device, 2),
        build_mesh(Layout(1, stages=((2,),)), 2, "cpu") as mesh,
    ):
        parallel = apply(WAN, mesh, backend, options, dtype, partial(initial_value, seed=0))
        yield parallel, make_optimizer(parallel, SETTINGS)


def batch(draw: int, dtype: torch.dtype) -> FeatureBatch:
    generator = torch.Generator().manual_seed(draw)
    return FeatureBatch(
        latents=torch.randn(1, 16, 2, 8, 8, generator=generator).to(dtype),
        text=torch.randn(1, 8, 16, generator=generator).to(dtype),
        sample=["a"],
        draw=[draw],
        features={},
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [DataParallelOptions(), DataParallelOptions(use_distributed_optimizer=True, overlap_grad_reduce=True)],
    ids=["ddp", "distributed"],
)
@pytest.mark.parametrize("accumulated", [1, 3])
def test_one_read_a_step(dtype: torch.dtype, options: DataParallelOptions, accumulated: int) -> None:
    with engine(dtype, options) as (parallel, optimizer):
        flow = FlowMatching(DiffusionConfig())
        for step in range(3):
            batches = [batch(step * accumulated + i, dtype) for i in range(accumulated)]
            host = [flow.sigmas, flow.timesteps, flow.weights]
            with CountHostReads(host) as counted:
                result = train_step(parallel, optimizer, flow, batches, samples=accumulated, seed=0)
            assert result.updated
            assert counted.reads == ["cpu"]


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What is copied from host to device in a micro-batch of a size that was seen before, by task and stage."""
    folder = tmp_path_factory.mktemp("copies")
    process = Forked(as_script, str(Path(__file__).with_name("copies_on_fake_device.py")), folder=folder)
    assert process.wait() == 0, process.said()
    found: dict[str, dict[str, Any]] = json.loads(process.said("stdout").splitlines()[-1])
    return found


@pytest.mark.nightly
@pytest.mark.parametrize("noise", ["ahead", "now"])
@pytest.mark.parametrize(
    ("stage", "number"),
    # latents, noise, the three drawn numbers of a sample; the text; image features and the condition
    [("t2v whole", 4), ("t2v first", 4), ("t2v last", 3), ("i2v whole", 6), ("i2v first", 6), ("i2v last", 3)],
)
def test_no_copy_of_a_micro_batch_is_waited_for(
    copies: dict[str, dict[str, Any]], stage: str, number: int, noise: str
) -> None:
    assert copies[f"{stage} {noise}"] == {"asynchronous": number, "blocking": [], "reads": 0}


@pytest.mark.nightly
def test_the_message_of_a_step_is_the_one_that_is_waited_for(copies: dict[str, dict[str, Any]]) -> None:
    """Where the gradients' sums of squares go is copied too; the numbers of all ranks are read."""
    assert copies["message"] == {"asynchronous": 1, "blocking": [], "reads": 1}


def test_the_counter_counts() -> None:
    value, host = torch.ones(3), torch.ones(2)
    with CountHostReads([host]) as counted:
        assert float(host.sum()) == 2
        copied = value.cpu()
        assert float(copied.double().mean() * host[0]) == 1
    assert counted.reads == ["cpu"]
    with CountHostReads([host]) as counted:
        assert (value + host[0]).sum() > 0
        value[0].item()
        value.tolist()
        float((value * 2).max())
    assert counted.reads == ["_local_scalar_dense", "_local_scalar_dense", "tolist", "_local_scalar_dense"]
