"""What the steps of a run work with, built from its configuration: model on the mesh, optimizer, starting weights."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

from mm.activation.host_pool import StepShape
from mm.activation.offload import Offloader
from mm.checkpoint.comm import on_rank_zero
from mm.checkpoint.directory import holds_checkpoints, require_kind, require_whole
from mm.checkpoint.record import kind_of
from mm.checkpoint.store import find_latest
from mm.checkpoint.weights import open_weights
from mm.config.recompute import Recompute
from mm.config.step import DataSettings, StepSettings, step_settings
from mm.device.backend import free_host_bytes
from mm.errors import ConfigError
from mm.lora.plan import starting_values
from mm.ops.attention.api import attention_name
from mm.optim.algorithms.make import ALGORITHMS
from mm.optim.make import make_optimizer
from mm.optim.optimizer import Optimizer
from mm.parallel.apply import ParallelModel, ValueOf, apply
from mm.train.adapters import AdapterRun, load_adapters, open_base
from mm.train.describe import start_table
from mm.train.resuming import Resuming, update_settings
from mm.train.run import Run, data_parallel_options, training_dtype
from mm.train.state import Progress, load_state, load_weights, saved_bytes
from mm.wan.compile import graphs_needed, most_graphs, probe
from mm.wan.initial import initial_value
from mm.wan.layers import BlockRunner

logger = logging.getLogger(__name__)

GIB = 2**30


def check_sizes(run: Run) -> None:
    """Refuse a run whose samples cannot travel through its pipeline, or be compiled for.

    Raises:
        ConfigError: CFG-046, CFG-068.
    """
    sizes = len(run.dataset.shapes())
    if run.mesh.layout.pp_size > 1 and sizes > 1 and not run.flags.variable_seq_lengths:
        raise ConfigError(
            "CFG-046",
            f"The features have {sizes} different sizes, and a pipeline sends tensors of one size.",
            "Add --variable-seq-lengths, or train on features of one size.",
        )
    _check_compiled_sizes(run)


def _check_compiled_sizes(run: Run) -> None:
    sizes, pipeline = len(_token_counts(run)), run.mesh.layout.pp_size > 1
    needed = graphs_needed(sizes, pipeline)
    if run.flags.compile_blocks and needed > most_graphs():
        raise ConfigError(
            "CFG-068",
            f"The features have {sizes} different numbers of tokens; --compile-blocks may need {needed} graphs of a "
            f"function for them, and torch keeps {most_graphs()}.",
            "Remove it, or train on features of fewer sizes.",
        )


def why_not_compiled(run: Run) -> str | None:
    """None where blocks are compiled; else why not, empty where it was not asked for. The same on every rank."""
    if not run.flags.compile_blocks:
        return ""
    failures = run.comm.all_gather_object(probe(run.backend.device, training_dtype(run.flags)))
    rank, reason = next(((rank, failure) for rank, failure in enumerate(failures) if failure is not None), (0, None))
    if reason is not None and run.reports:
        logger.warning("blocks run uncompiled: compiling one does not work on rank %d: %s", rank, reason)
    return reason


def open_adapters(run: Run) -> AdapterRun | None:
    """Read the base model's record and plan the adapters; None where all parameters are trained."""
    path = run.flags.load_base_model
    return None if run.lora is None or path is None else open_base(run.lora, Path(path), run.config, run.comm)


def build_model(run: Run, adapters: AdapterRun | None, run_blocks: BlockRunner, compiled: bool) -> ParallelModel:
    """Put the model on the mesh, with adapters if there are any; values are drawn where none will be loaded."""
    flags = run.flags
    value_of: ValueOf | None = None
    if adapters is not None:
        value_of = starting_values(adapters.plan, adapters.base, flags.seed)
    elif flags.init_from_scratch:
        value_of = partial(initial_value, seed=flags.seed)
    return apply(
        run.config,
        run.mesh,
        run.backend,
        data_parallel_options(flags),
        training_dtype(flags),
        value_of,
        run.zero,
        run_blocks,
        len(_token_counts(run)) if compiled else None,
        adapters.plan.extension() if adapters is not None else None,
    )


def settings_of(run: Run) -> StepSettings:
    """What the steps of a run mean, the same on all ranks; every rank calls it. Rank 0 speaks for the data sets."""

    def identified() -> list[Any]:
        return [None if dataset is None else [len(dataset), dataset.identity()] for dataset in data_sets]

    data_sets = (run.dataset, run.held_out)
    found = on_rank_zero(run.comm, identified)
    features, held_out = (None if one is None else DataSettings(num_samples=one[0], identity=one[1]) for one in found)
    assert features is not None  # noqa: S101  a run has features
    features = features.model_copy(update={"shuffle": run.data.dataloader_param.shuffle})
    return step_settings(
        run.flags,
        run.model.diffusion,
        run.data,
        dp_size=run.mesh.layout.dp_size,
        features=features,
        held_out=held_out,
    )


def build_optimizer(parallel: ParallelModel, steps: StepSettings) -> Optimizer:
    """The optimizer and its schedule."""
    fused = parallel.backend.kind != "cpu" and ALGORITHMS[steps.optimizer.optimizer].fused
    return make_optimizer(parallel, update_settings(steps, fused=fused))


def require_memory_for_saving(run: Run, optimizer: Optimizer) -> int:
    """The host memory that background saves take on this process, from the first one on.

    Raises:
        ConfigError: CFG-185 when this process's share of the node's free memory is smaller.
    """
    need = saved_bytes(optimizer, with_optimizer=not run.flags.no_save_optim)
    free = free_host_bytes() // run.processes_of_node
    if need > free:
        raise ConfigError(
            "CFG-185",
            f"--async-save needs {need / GIB:.1f} GiB of host memory on this process for a copy of what it saves, and "
            f"{free / GIB:.1f} GiB are free for it.",
            "Leave it out, add --use-distributed-optimizer, which spreads the copy over the replicas, or start fewer "
            "processes on the node.",
        )
    return need


def step_shape(run: Run) -> StepShape:
    """Sizes of a step, for the pool of offload."""
    dtype = training_dtype(run.flags)
    return StepShape(run.flags.micro_batch_size, max(_token_counts(run)), run.num_microbatches, dtype)


def _token_counts(run: Run) -> set[int]:
    return {sample.num_tokens for sample in run.dataset.samples}


def describe(run: Run, recompute: Recompute | None, offloader: Offloader | None, not_compiled: str | None) -> None:
    """Log what the run is made of, a line each."""
    rows = start_table(
        run.flags,
        run.config,
        run.mesh.layout,
        run.zero,
        run.dataset,
        run.global_batch_size,
        device=f"{run.backend.name()} ({run.backend.collective})",
        attention=attention_name(
            run.backend.device, training_dtype(run.flags), run.config.head_dim, max(_token_counts(run))
        ),
        recompute=recompute,
        offloader=offloader,
        not_compiled=not_compiled,
        lora=run.lora,
    )
    for name, value in rows.items():
        logger.info("%-11s %s", name, value)


def start_or_resume(run: Run, adapters: AdapterRun | None, optimizer: Optimizer, steps: StepSettings) -> Progress:
    """Resume from `--save`, else from training checkpoints in `--load`, else start from the weights there.

    Raises:
        ConfigError: CFG-160 where that would change what steps mean, and what `load_state` and `load_weights` raise.
    """
    flags = run.flags
    record = adapters.record if adapters is not None else None
    # A folder of weights may have numbered folders too, as MindSpeed-MM's have; those of training are described.
    load = flags.load if flags.load is not None and holds_checkpoints(Path(flags.load)) else None
    if flags.save is not None:
        require_kind(Path(flags.save), flags.ckpt_format, run.comm)
    for folder in (flags.save, None if flags.finetune else load):
        latest = _latest(run, Path(folder)) if folder is not None else None
        if latest is None:
            continue
        progress = load_state(
            latest,
            optimizer,
            run.config,
            flags.seed,
            run.comm,
            resuming=_resuming(run, steps),
            with_optimizer=not flags.no_load_optim,
            with_average=not flags.no_load_ema,
            any_seed=flags.no_load_rng,
            adapters=record,
        )
        logger.info("going on from %s: step %d, %d samples", latest, progress.step, progress.consumed_samples)
        return progress
    if flags.load is not None:
        start = _checked(run, Path(flags.load))
        if adapters is not None:
            load_adapters(start, adapters, optimizer)
        else:
            load_weights(open_weights(start), optimizer, run.config)
    return Progress()


def _resuming(run: Run, steps: StepSettings) -> Resuming:
    flags = run.flags
    return Resuming(
        steps,
        flags.train_iters,
        flags.resume_changed,
        flags.micro_batch_size,
        run.mesh.layout.dp_size,
        averaged=not flags.no_load_ema,
        reports=run.reports,
    )


def _latest(run: Run, folder: Path) -> Path | None:
    """The checkpoint to take of a run's folder, or None where there is none."""
    return find_latest(folder, run.flags.resume_policy, verify=run.flags.verify_checkpoint, comm=run.comm)


def _checked(run: Run, path: Path) -> Path:
    """What to start from: of a run's folder its latest checkpoint, checked as one that is gone on from."""
    if not holds_checkpoints(path):
        return path
    if kind_of(path) is not None:
        require_whole(path, run.flags.verify_checkpoint, run.comm)
        return path
    return _latest(run, path) or path
