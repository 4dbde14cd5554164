"""Building of a run's parts from its configuration: model on the mesh, optimizer, starting weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mm.activation.host_pool import StepShape
from mm.activation.offload import Offloader
from mm.checkpoint.comm import Comm, on_rank_zero
from mm.checkpoint.directory import Verify, require_kind
from mm.checkpoint.expert_band import require_band
from mm.checkpoint.files import replace_text, writing_errors
from mm.checkpoint.formats.found import Wanted
from mm.checkpoint.identify import Found, identify, latest_checkpoint
from mm.config.recompute import Recompute
from mm.config.run.file import resolved, whole_file
from mm.config.run.origins import RUN_FILE
from mm.config.run.training import TrainingRun
from mm.config.step import DataSettings, StepSettings, step_settings
from mm.data.dataset import FeatureDataset
from mm.data.packing import check_budget, most_places
from mm.data.planning import describe_plan, sources_of
from mm.data.sampler import BatchPlan
from mm.device.backend import free_host_bytes
from mm.errors import ConfigError
from mm.lora.plan import starting_values
from mm.ops.attention.api import attention_name
from mm.optim.algorithms.make import ALGORITHMS
from mm.optim.make import make_optimizer
from mm.optim.optimizer import Optimizer
from mm.parallel.apply import ParallelModel, ValueOf, apply
from mm.train.adapters import AdapterRun, load_adapters, open_base, start_masters
from mm.train.describe import start_table
from mm.train.pieces import saved_bytes
from mm.train.resuming import Resuming, update_settings
from mm.train.run import Run, data_parallel_options, expected_model, training_dtype
from mm.train.state import Progress, load_state, load_weights
from mm.wan.compile import graphs_needed, most_graphs, try_compiling
from mm.wan.initial import initial_value
from mm.wan.layers import BlockRunner

logger = logging.getLogger(__name__)

GIB = 2**30


def check_sizes(run: Run) -> None:
    """Refuse a run whose samples cannot be packed, travel through its pipeline, or be compiled for.

    Raises:
        ConfigError: CFG-046, CFG-068. DataError: DATA-077.
    """
    budget = run.sections.data.pack_tokens
    if budget is not None:
        check_budget(run.dataset, budget, run.sections.origins["data.pack_tokens"].with_value(budget))
        return
    of_batches = run.sections.data.mixture.sizes(run.sections.data.micro_batch_size)
    sizes = max(len(run.dataset.shapes()), len(of_batches))
    if run.mesh.layout.pp_size > 1 and sizes > 1 and not run.sections.parallel.variable_sizes:
        add = run.sections.origins["parallel.variable_sizes"].with_value(True)
        raise ConfigError(
            "CFG-046",
            f"Features or micro-batches have {sizes} different sizes, and a pipeline sends tensors of one size.",
            f"Add {add}, or train on features and micro-batches of one size.",
        )
    _check_compiled_sizes(run)


def _check_compiled_sizes(run: Run) -> None:
    sizes, pipeline = len(_token_counts(run)), run.mesh.layout.pp_size > 1
    needed = graphs_needed(sizes, pipeline)
    if run.sections.memory.compile_blocks and needed > most_graphs():
        compiled = run.sections.origins["memory.compile_blocks"].with_value(True)
        raise ConfigError(
            "CFG-068",
            f"The features have {sizes} different numbers of tokens; {compiled} may need {needed} graphs of a "
            f"function for them, and torch keeps {most_graphs()}.",
            "Remove it, or train on features of fewer sizes.",
        )


def why_not_compiled(run: Run) -> str | None:
    """None where blocks are compiled; else why not, empty where it was not asked for. The same on every rank."""
    if not run.sections.memory.compile_blocks:
        return ""
    failures = run.comm.all_gather_object(try_compiling(run.backend.device, training_dtype(run.sections)))
    rank, reason = next(((rank, failure) for rank, failure in enumerate(failures) if failure is not None), (0, None))
    if reason is not None and run.reports:
        logger.warning("blocks run uncompiled: compiling one does not work on rank %d: %s", rank, reason)
    return reason


def open_adapters(run: Run) -> AdapterRun | None:
    """Read the base model's record and plan the adapters; None where all parameters are trained; CFG-293."""
    adapters = run.sections.adapters
    if run.trained.lora is None or adapters is None:
        return None
    parts = run.trained.parts.shapes if run.trained.parts is not None else ()
    opened = open_base(run.trained.lora, Path(adapters.base), expected_model(run.sections), run.comm, parts=parts)
    _require_band(run, opened.base.path)
    return opened


def build_model(run: Run, adapters: AdapterRun | None, run_blocks: BlockRunner, compiled: bool) -> ParallelModel:
    """Put the model on the mesh, with adapters if there are any; values are drawn where none will be loaded."""
    seed = run.sections.training.seed
    value_of: ValueOf | None = None
    if adapters is not None:
        value_of = starting_values(adapters.plan, adapters.base, seed)
    elif run.sections.checkpoint.from_scratch:
        value_of = partial(initial_value, seed=seed)
    return apply(
        run.config,
        run.mesh,
        run.backend,
        data_parallel_options(run.sections),
        training_dtype(run.sections),
        value_of,
        zero=run.sections.parallel.layerzero,
        run_blocks=run_blocks,
        compiled_for=len(_token_counts(run)) if compiled else None,
        extension=run.trained.extension(),
    )


def settings_of(run: Run) -> StepSettings:
    """Meaning of a run's steps, the same on all ranks; every rank calls it. Rank 0 speaks for the data sets."""

    def identified() -> list[Any]:
        return [None if dataset is None else [len(dataset), dataset.identity()] for dataset in data_sets]

    data_sets = (run.dataset, run.held_out)
    found = on_rank_zero(run.comm, identified)
    features, held_out = (None if one is None else DataSettings(num_samples=one[0], identity=one[1]) for one in found)
    assert features is not None  # noqa: S101  a run has features
    return settings_with(run.sections, run.dataset, run.mesh.layout.dp_size, features, held_out)


def settings_with(
    sections: TrainingRun, dataset: FeatureDataset, dp_size: int, features: DataSettings, held_out: DataSettings | None
) -> StepSettings:
    """Meaning of a run's steps.

    Args:
        sections, dataset, dp_size: the run. features, held_out: sizes and identities of its data sets.
    """
    data = sections.data
    batches = BatchPlan(sections.samples_of_step(dp_size), data.micro_batch_size)
    plan = describe_plan(dataset, data.mixture, batches, shuffle=data.shuffle, min_bucket=data.min_bucket)
    features = features.model_copy(update={"shuffle": data.shuffle, "plan": plan})
    return step_settings(sections, dp_size=dp_size, features=features, held_out=held_out)


def build_optimizer(parallel: ParallelModel, steps: StepSettings) -> Optimizer:
    """The optimizer and its schedule."""
    fused = parallel.backend.kind != "cpu" and ALGORITHMS[steps.optimizer.optimizer].fused
    return make_optimizer(parallel, update_settings(steps, fused=fused))


def require_memory_for_saving(run: Run, optimizer: Optimizer) -> int:
    """The host memory that background saves take on this process, from the first one on.

    Raises:
        ConfigError: CFG-185 when this process's share of the node's free memory is smaller.
    """
    with_optimizer, with_frozen = run.sections.checkpoint.save_optimizer, run.sections.adapters is None
    need = saved_bytes(optimizer, with_optimizer=with_optimizer, with_frozen=with_frozen)
    free = free_host_bytes() // run.processes_of_node
    if need > free:
        background, share = (
            run.sections.origins[path].with_value(True)
            for path in ("checkpoint.in_background", "parallel.distributed_optimizer")
        )
        raise ConfigError(
            "CFG-185",
            f"{background} needs {need / GIB:.1f} GiB of host memory on this process for a copy of what it saves, and "
            f"{free / GIB:.1f} GiB are free for it.",
            f"Leave it out, add {share}, which spreads the copy over the replicas, or start fewer processes on the "
            "node.",
        )
    return need


def step_shape(run: Run) -> StepShape:
    """Sizes of a step, for the pool of offload."""
    data, dtype, counts = run.sections.data, training_dtype(run.sections), _token_counts(run)
    if data.pack_tokens is None:
        size, tokens = max(_micro_batches(run), key=math.prod)
        return StepShape(size, tokens, run.num_microbatches, dtype)
    places = most_places(counts, data.pack_tokens, run.global_batch_size, run.mesh.layout.token_parts)
    return StepShape(1, places, run.num_microbatches, dtype)


def _micro_batches(run: Run) -> Iterator[tuple[int, int]]:
    """Samples of the micro-batches of each source, and the most tokens of one of them."""
    data = run.sections.data
    for source in sources_of(run.dataset, data.mixture, data.micro_batch_size, shuffle=data.shuffle):
        yield source.micro_batch_size, max(source.part.token_counts())


def _token_counts(run: Run) -> set[int]:
    return run.dataset.token_counts()


def describe(run: Run, recompute: Recompute | None, offloader: Offloader | None, not_compiled: str | None) -> None:
    """Log what the run is made of, a line each."""
    rows = start_table(
        run.sections,
        run.mesh.layout,
        run.dataset,
        global_batch_size=run.global_batch_size,
        device=f"{run.backend.name()} ({run.backend.collective})",
        attention=attention_name(
            run.backend.device, training_dtype(run.sections), run.config.head_dim, max(_token_counts(run))
        ),
        recompute=recompute,
        offloader=offloader,
        not_compiled=not_compiled,
        trained=run.trained,
    )
    for name, value in rows.items():
        logger.info("%-11s %s", name, value)


def start_or_resume(run: Run, adapters: AdapterRun | None, optimizer: Optimizer, steps: StepSettings) -> Progress:
    """Resume from `--save`, else from training checkpoints in `--load`, else start from the weights there.

    Raises:
        ConfigError: CFG-160 where that would change what steps mean, and what `load_state` and `load_weights` raise.
    """
    found, goes_on = starting_point(run.sections, run.comm, run.sections.checkpoint.verify, run.beside)
    if adapters is not None and adapters.record.parts and not goes_on:
        start_masters(adapters, optimizer, run.sections.training.seed)
    if found is None:
        return Progress()
    if not goes_on or run.sections.experts is not None:  # else a changed band is told as any other change
        _require_band(run, found.path)
    if goes_on:
        return _resume(run, found, adapters, optimizer, steps)
    if adapters is not None:
        load_adapters(found, adapters, optimizer, run.sections.origins)
    else:
        load_weights(found, optimizer, expected_model(run.sections), run.comm)
    return Progress()


def _require_band(run: Run, path: Path) -> None:
    objective, words = run.sections.objective, run.sections.origins
    on_rank_zero(run.comm, lambda: require_band(path, objective, words))


def starting_point(
    sections: TrainingRun, comm: Comm, verify: Verify, beside: Sequence[Path] = ()
) -> tuple[Found | None, bool]:
    """Find what a run starts from, if anything, and whether it goes on from there as a run; every rank calls it.

    Args:
        sections: the run. comm: the ranks. verify: how much of a checkpoint is looked at.
        beside: folders of the run's other experts, which must hold the same step.

    Raises:
        ConfigError, CheckpointError, DataError: what `require_kind`, `latest_checkpoint` and `identify` raise.
    """
    start = sections.checkpoint
    if start.save is not None:
        require_kind(Path(start.save), start.format, sections.origins, comm)
        latest = latest_checkpoint(Path(start.save), comm, start.resume_policy, verify, beside)
        if latest is not None:
            return latest, True
    if start.load is None:
        return None, False
    wanted: Wanted = "model" if sections.adapters is None else "adapters"
    found = identify(start.load, comm, wanted=wanted, policy=start.resume_policy, verify=verify)
    return found, found.of_run and not start.weights_only


def _resume(run: Run, found: Found, adapters: AdapterRun | None, optimizer: Optimizer, steps: StepSettings) -> Progress:
    start = run.sections.checkpoint
    progress = load_state(
        found,
        optimizer,
        expected_model(run.sections),
        run.sections.training.seed,
        run.comm,
        resuming=_resuming(run, steps),
        with_optimizer=start.load_optimizer,
        with_average=start.load_average,
        any_seed=not start.same_seed,
        adapters=adapters.record if adapters is not None else None,
    )
    logger.info("going on from %s: step %d, %d samples", found.path, progress.step, progress.trained_samples)
    return progress


def write_run_file(run: Run) -> None:
    """Write run.yaml beside the checkpoints, so that the run can be gone on with, and read; every rank calls it.

    Raises:
        CheckpointError: CKPT-031 where it cannot be written.
    """
    save = run.sections.checkpoint.save
    if save is None:
        return
    path, text = Path(save) / RUN_FILE, whole_file(resolved(run.sections))

    def write() -> None:
        with writing_errors():
            replace_text(path, text)

    on_rank_zero(run.comm, write)


def _resuming(run: Run, steps: StepSettings) -> Resuming:
    return Resuming(
        steps,
        run.sections,
        run.mesh.layout.dp_size,
        reports=run.reports,
    )
