"""megatron-core's DDP, schedule and optimizers on the CPU against a plain PyTorch loop on one process."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ranks import run_ranks

from mm.config.model import WanConfig
from mm.config.place import place
from mm.device.backend import Backend, select
from mm.errors import NumericsError
from mm.parallel.apply import DataParallelOptions, apply, forward_backward
from mm.parallel.launch import Job
from mm.parallel.mesh import Mesh, MeshSizes, build_mesh
from mm.parallel.optimizer import AdamWSettings, Optimizer
from mm.wan.model import WanModel

TINY = WanConfig(text_dim=16, text_len=8, hidden_size=48, ffn_dim=64, num_heads=4, num_layers=2, freq_dim=32)
STEPS, GLOBAL_BATCH = 3, 4
SETTINGS = AdamWSettings(
    lr=1e-2, min_lr=1e-3, lr_decay_style="linear", lr_warmup_init=0.0, warmup_samples=0,
    decay_samples=STEPS * GLOBAL_BATCH, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, clip_grad=0.5,
)  # fmt: skip


def samples(step: int) -> list[dict[str, torch.Tensor]]:
    source = torch.Generator().manual_seed(step)
    return [
        {
            "latents": torch.randn(1, 16, 2, 4, 4, generator=source),
            "timestep": torch.rand(1, generator=source) * 1000,
            "text": torch.randn(1, 8, 16, generator=source),
            "target": torch.randn(1, 16, 2, 4, 4, generator=source),
        }
        for _ in range(GLOBAL_BATCH)
    ]


def new_model() -> WanModel:
    model = WanModel(TINY)
    model.init_weights(seed=7)
    with torch.no_grad():  # Wan starts its head at zero, which would hide every gradient behind it
        model.head.head.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return model


def loss_of(model: Any, sample: dict[str, torch.Tensor]) -> torch.Tensor:
    return (model(sample["latents"], sample["timestep"], sample["text"]) - sample["target"]).square().mean()


def plain_loop() -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """The reference: torch's AdamW, torch's clipping, no weight decay on vectors and biases."""
    model = new_model()
    decayed = [p for n, p in model.named_parameters() if p.dim() > 1 and not n.endswith(".bias")]
    others = [p for n, p in model.named_parameters() if p.dim() == 1 or n.endswith(".bias")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    losses, norms = [], []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 - (1e-2 - 1e-3) * step / STEPS
        optimizer.zero_grad()
        batch_losses = [loss_of(model, sample) for sample in samples(step)]
        (sum(batch_losses) / GLOBAL_BATCH).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        losses.append(float(sum(batch_losses).detach()) / GLOBAL_BATCH)
    return losses, norms, {name: parameter.detach() for name, parameter in model.named_parameters()}


OPTIONS = {
    "ddp": DataParallelOptions(),
    "distributed-optimizer": DataParallelOptions(use_distributed_optimizer=True),
    "distributed-optimizer-overlap": DataParallelOptions(True, True, True),
}


def engine_rows() -> dict[str, Any]:
    """Every row of OPTIONS on one rank of one job: starting processes is what costs."""
    backend = select("cpu")
    with Job(place(), backend.collective, backend.device, 1), build_mesh(MeshSizes(), 1) as mesh:
        return {name: engine_loop(options, mesh, backend) for name, options in OPTIONS.items()}


def engine_loop(options: DataParallelOptions, mesh: Mesh, backend: Backend) -> tuple[list[float], list[float], Any]:
    parallel = apply(new_model(), mesh, backend, options, torch.float32)
    optimizer = Optimizer(parallel, SETTINGS)
    losses, norms = [], []
    for step in range(STEPS):
        mine: Iterator[dict[str, torch.Tensor]] = iter(samples(step)[mesh.dp_rank :: mesh.dp_size])

        def forward_step(module: Any, mine: Iterator[dict[str, torch.Tensor]] = mine) -> Any:
            loss = loss_of(module, next(mine))
            return loss, lambda output: (output, output.detach().clone())

        reported = forward_backward(parallel, forward_step, GLOBAL_BATCH // mesh.dp_size)
        losses += mesh.average_over_data([sum(map(float, reported)) / len(reported)])
        norms.append(optimizer.step(GLOBAL_BATCH))
    optimizer.masters_to_model()  # with overlap, the last update is gathered only when the next forward needs it
    weights = {name: parameter.detach().tolist() for name, parameter in parallel.named_parameters().items()}
    return losses, norms, weights


def step_with_a_bad_gradient() -> tuple[str, bool]:
    """One rank's loss is finite and its gradient is not; returns the error's id and whether any weight changed."""
    backend = select("cpu")
    with Job(place(), backend.collective, backend.device, 1), build_mesh(MeshSizes(), 1) as mesh:
        parallel = apply(new_model(), mesh, backend, DataParallelOptions(use_distributed_optimizer=True), torch.float32)
        optimizer = Optimizer(parallel, SETTINGS)
        before = {name: parameter.detach().clone() for name, parameter in parallel.named_parameters().items()}

        def forward_step(module: Any) -> Any:
            loss = loss_of(module, samples(0)[0])
            if mesh.dp_rank == mesh.dp_size - 1:  # the root of zero is zero, its slope is not a number
                loss = loss + (0 * module.module.model.head.head.bias.sum()).abs().sqrt()
            assert bool(torch.isfinite(loss))
            return loss, lambda output: (output, output.detach().clone())

        forward_backward(parallel, forward_step, 1)
        try:
            optimizer.step(1)
        except NumericsError as error:
            after = parallel.named_parameters()
            return error.id, any(not torch.equal(before[name], after[name]) for name in before)
        return "no error", True


def test_a_gradient_that_is_not_finite_stops_every_rank_and_changes_no_weight() -> None:
    assert run_ranks(2, step_with_a_bad_gradient) == [("NUM-002", False)] * 2


@pytest.fixture(scope="module", params=[1, 2], ids=["dp1", "dp2"])
def rows_of_all_ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks(request.param, engine_rows)


@pytest.mark.parametrize("layout", OPTIONS)
def test_equals_plain_pytorch(layout: str, rows_of_all_ranks: list[dict[str, Any]]) -> None:
    expected_losses, expected_norms, expected_weights = plain_loop()
    for losses, norms, weights in (rows[layout] for rows in rows_of_all_ranks):
        assert losses == pytest.approx(expected_losses, rel=1e-6)
        assert norms == pytest.approx(expected_norms, rel=1e-5)
        assert weights.keys() == expected_weights.keys()
        for name, value in expected_weights.items():
            # AdamW divides a gradient by its own size, so the rounding of a near-zero gradient moves its weight by a
            # part of lr (1e-2); a missed or doubled update would move it by all of it.
            difference = (torch.tensor(weights[name]) - value).abs().max()
            assert difference <= 1e-4, f"{name} differs by {difference:.2e}"
    assert expected_losses[-1] < expected_losses[0]
