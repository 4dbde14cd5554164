"""The memory of background saves: what the saver asks for is what the dry run and the start of a run count."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from traffic_rows import WAN, Row, row

from mm.checkpoint.background import PAGE, BackgroundSaver
from mm.checkpoint.comm import SingleProcess
from mm.checkpoint.store import writing
from mm.config.place import process_place
from mm.config.run.origins import Origins
from mm.config.step import StepSettings
from mm.device.backend import select
from mm.doctor import dry_run
from mm.errors import ConfigError
from mm.optim.make import make_optimizer
from mm.parallel.apply import apply
from mm.parallel.mesh import build_mesh
from mm.parallel.placement import whole_shapes
from mm.supervise.job import Job
from mm.train.build import require_memory_for_saving
from mm.train.pieces import saved_bytes
from mm.train.state import Progress, state_of


def predicted(case: Row, rank: int, *, save_optimizer: bool = True, ema_decay: float | None = None) -> int:
    job = dry_run.DryRunJob(
        case.wan, case.layout, case.options, case.zero, case.dtype, case.latent, 1, 1,
        ema_decay=ema_decay, async_save=True, save_optimizer=save_optimizer,
    )  # fmt: skip
    return dry_run.dry_run(job, rank).save_bytes


@pytest.mark.parametrize("distopt", [False, True])
@pytest.mark.parametrize(("save_optimizer", "ema_decay"), [(True, None), (True, 0.9), (False, None)])
def test_the_saver_asks_for_what_was_counted(
    tmp_path: Path, distopt: bool, save_optimizer: bool, ema_decay: float | None
) -> None:
    case, asked, backend = row(1, distopt=distopt), list[int](), select("cpu")

    def host_memory(num_bytes: int) -> torch.Tensor:
        asked.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)

    with Job(process_place(), "gloo", backend.device, 2), build_mesh(case.layout, 2, "cpu") as mesh:
        parallel = apply(case.wan, mesh, backend, case.options, case.dtype, None)
        optimizer = make_optimizer(parallel, replace(dry_run._SETTINGS, ema_decay=ema_decay))
        counted = saved_bytes(optimizer, with_optimizer=save_optimizer)
        assert not any(shard.inner.state.get(shard.key) for shard in optimizer.shards)  # moments were not made for it
        comm = SingleProcess()
        nothing = StepSettings.model_construct()
        state = state_of(optimizer, Progress(1), case.wan, 0, comm, steps=nothing, with_optimizer=save_optimizer)
        with writing(tmp_path, comm), BackgroundSaver(tmp_path, comm, host_memory) as saves:
            saves.start(1, state.pieces, state.scalars)
    assert asked == [counted] == [predicted(case, 0, save_optimizer=save_optimizer, ema_decay=ema_decay)]
    kinds = 1 + 2 * save_optimizer + (ema_decay is not None)
    sizes = [4 * math.prod(shape) for shape in whole_shapes(case.wan).values()]
    assert counted == kinds * sum(math.ceil(size / PAGE) * PAGE for size in sizes)


def test_a_node_without_that_memory_is_told_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    case, backend = row(1), select("cpu")
    sections = SimpleNamespace(checkpoint=SimpleNamespace(save_optimizer=True), adapters=None, origins=Origins())
    run = SimpleNamespace(sections=sections, processes_of_node=4)
    with Job(process_place(), "gloo", backend.device, 2), build_mesh(case.layout, 2, "cpu") as mesh:
        optimizer = make_optimizer(apply(case.wan, mesh, backend, case.options, case.dtype, None), dry_run._SETTINGS)
        need = saved_bytes(optimizer, with_optimizer=True)
        monkeypatch.setattr("mm.train.build.free_host_bytes", lambda: 4 * need)
        assert require_memory_for_saving(run, optimizer) == need  # type: ignore[arg-type]
        monkeypatch.setattr("mm.train.build.free_host_bytes", lambda: 4 * need - 1)
        with pytest.raises(ConfigError, match="CFG-185"):
            require_memory_for_saving(run, optimizer)  # type: ignore[arg-type]


def test_no_rank_is_taken_for_the_one_that_was_looked_at_before() -> None:
    """Shards of layer-zero differ between ranks, and torch keeps shapes by mesh, where two ranks have equal ones."""
    wan = WAN.model_copy(update={"hidden_size": 192})  # shapes that no other test has asked for
    case = replace(row(4, zero=4), wan=wan)
    second, first = (predicted(case, rank) for rank in (1, 0))
    assert first > second > 0  # the first has the only row of head.modulation


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(row(4), marks=pytest.mark.nightly),
        row(4, distopt=True),
        pytest.param(row(4, zero=4), marks=pytest.mark.nightly),
        pytest.param(row(4, tp_size=2, pp_size=2).with_layers(2), marks=pytest.mark.nightly),
    ],
    ids=lambda case: case.id,
)
def test_all_ranks_together_have_the_state_once(case: Row) -> None:
    whole = sum(12 * math.prod(shape) for shape in whole_shapes(case.wan).values())
    ranks = [predicted(case, rank) for rank in range(4)]
    assert whole <= sum(ranks) <= 1.2 * whole  # pages
