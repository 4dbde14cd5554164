"""The training run from start to end: model on the mesh, weights or checkpoint, steps, metrics, checkpoints."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from mm.checkpoint.background import BackgroundSaver
from mm.checkpoint.store import save, writing
from mm.config.recompute import recompute_of
from mm.config.request import Request
from mm.data.loader import FeatureBatch, feature_batches
from mm.data.sampler import BatchPlan
from mm.device.backend import deterministic
from mm.diffusion.flow import FlowMatching
from mm.errors import StoppedError
from mm.parallel.apply import ParallelModel
from mm.parallel.host_pool import make_offloader
from mm.parallel.optimizer import Optimizer
from mm.parallel.recompute import block_runner
from mm.train.adapters import AdapterRun
from mm.train.build import (
    build_model,
    build_optimizer,
    check_sizes,
    describe,
    open_adapters,
    start_or_resume,
    step_shape,
    why_not_compiled,
)
from mm.train.checks import Checks
from mm.train.flops import train_flops
from mm.train.metrics import MetricsLog, StepMetrics
from mm.train.mm_state import save_weights
from mm.train.out_of_memory import MemoryWatch
from mm.train.run import Run
from mm.train.signals import StopRequest
from mm.train.state import Progress, state_of
from mm.train.step import StepResult, train_step

logger = logging.getLogger(__name__)


def train(run: Run) -> Progress:
    """Train until `--train-iters` steps are taken, going on from the newest checkpoint in `--save` if there is one.

    Returns:
        Where the run ended.

    Raises:
        ConfigError: CFG-046 when samples of different sizes would cross a pipeline that was not told so; CFG-049 when
            offload needs more host memory than is free; CFG-068 when blocks would be compiled for too many sizes.
        OutOfMemoryError: MEM-001 when the device has no room for the model or a step.
        CheckpointError, ConfigError, NumericsError: as documented where they arise.
    """
    flags = run.flags
    check_sizes(run)
    watch = MemoryWatch(Request(flags, run.model, run.zero, run.comm.world_size), run.backend, run.comm.rank)
    with ExitStack() as stack:
        stack.enter_context(deterministic(flags.deterministic_mode))
        if flags.save is not None:
            stack.enter_context(writing(Path(flags.save), run.comm))
        checks = Checks.prepare(flags, run.held_out, run.validation, run.mesh, run.backend, run.comm)
        recompute = recompute_of(flags, run.model)
        offloader = make_offloader(
            recompute, run.config, run.mesh, run.backend, step_shape(run), processes_of_node=run.processes_of_node
        )
        watch.pinned_host = 0 if offloader is None else offloader.memory.nbytes
        not_compiled = why_not_compiled(run)
        adapters = open_adapters(run)
        run_blocks = block_runner(recompute, offloader, run.backend.model_code)
        with watch.during("building the model"):
            watch.parallel = parallel = build_model(run, adapters, run_blocks, not_compiled is None)
            watch.optimizer = optimizer = build_optimizer(run, parallel)
        describe(run, recompute, offloader, not_compiled)
        with watch.during("loading weights"):
            progress = start_or_resume(run, adapters, optimizer)
        if progress.step >= flags.train_iters:
            logger.info("step %d of %d is already done; nothing to train", progress.step, flags.train_iters)
            return progress
        log = stack.enter_context(_metrics_log(run, progress))
        stop = stack.enter_context(StopRequest()) if flags.save_on_signal else None
        return _steps(
            run, _Built(adapters, parallel, optimizer, log, watch, checks, _saver(run, stack), stop), progress
        )


def _metrics_log(run: Run, progress: Progress) -> MetricsLog:
    flags = run.flags
    folder = Path(flags.save) if flags.save and run.reports else None
    board = Path(flags.tensorboard_dir) if flags.tensorboard_dir else (folder / "tensorboard" if folder else None)
    return MetricsLog(
        folder,
        board if run.reports else None,
        first_step=progress.step + 1,
        total_steps=flags.train_iters,
        log_interval=flags.log_interval,
        progress_bar=run.reports and not flags.no_progress_bar,
    )


@dataclass(frozen=True)
class _Built:
    """What the steps of a run work with.

    Attributes:
        adapters: None where all parameters are trained. saver: None where the loop itself writes checkpoints.
        stop: None where signals end the process at once.
    """

    adapters: AdapterRun | None
    parallel: ParallelModel
    optimizer: Optimizer
    log: MetricsLog
    watch: MemoryWatch
    checks: Checks
    saver: BackgroundSaver | None
    stop: StopRequest | None


def _steps(run: Run, built: _Built, progress: Progress) -> Progress:
    flags = run.flags
    flow = FlowMatching(run.model.diffusion)
    batches = _batches(run, progress)
    while progress.step < flags.train_iters:
        started = time.monotonic()
        result = train_step(
            built.parallel,
            built.optimizer,
            flow,
            [next(batches) for _ in range(run.num_microbatches)],
            samples=run.global_batch_size,
            seed=flags.seed,
            during=built.watch.during,
        )
        if built.saver is not None:
            built.saver.check()
        progress = Progress(progress.step + 1, progress.consumed_samples + run.global_batch_size)
        built.log.write(_measure(run, result, progress, time.monotonic() - started))
        due = flags.save_interval is not None and progress.step % flags.save_interval == 0
        stopping = built.stop is not None and _any_rank_was_asked(run, built.stop)
        if flags.save is not None and (due or stopping or progress.step == flags.train_iters):
            _save(run, built, Path(flags.save), progress)
        if stopping and progress.step < flags.train_iters:  # a run that is at its end is done, not stopped
            _stop(built, progress)
        with built.watch.during("evaluation and validation"):
            built.checks.after(progress.step, built.parallel, built.log)
    return progress


def _any_rank_was_asked(run: Run, stop: StopRequest) -> bool:
    """Whether a signal has reached any process: all of them stop after the same step."""
    mine = torch.tensor([float(stop.received is not None)], device=run.backend.device)
    return bool(run.mesh.gather(mine).any())


def _stop(built: _Built, progress: Progress) -> None:
    if built.saver is not None:
        built.saver.finish()
    by = built.stop.received if built.stop is not None else None
    raise StoppedError(
        "RUN-001",
        f"Stopped by {by or 'a signal to another process'} after step {progress.step}, which is saved.",
        "Run the same command again; it goes on from there.",
    )


def _batches(run: Run, progress: Progress) -> Iterator[FeatureBatch]:
    flags = run.flags
    loading = run.data.dataloader_param
    return feature_batches(
        run.dataset,
        BatchPlan(run.global_batch_size, flags.micro_batch_size, run.mesh.dp_rank, run.mesh.layout.dp_size),
        text_len=run.config.text_len,
        seed=flags.seed,
        consumed_samples=progress.consumed_samples,
        caption_dropout=run.data.dataset_param.preprocess_parameters.cfg,
        shuffle=loading.shuffle,
        num_workers=flags.num_workers,
        pin_memory=loading.pin_memory and run.backend.kind != "cpu",
    )


def _measure(run: Run, result: StepResult, progress: Progress, seconds: float) -> StepMetrics:
    replica_samples = run.global_batch_size // run.mesh.layout.dp_size
    flops = replica_samples * train_flops(run.config, result.tokens // replica_samples, frozen=run.lora is not None)
    devices_per_replica = run.comm.world_size // run.mesh.layout.dp_size
    return StepMetrics(
        step=progress.step,
        loss=result.loss,
        loss_hex=result.loss.hex(),
        grad_norm=result.grad_norm,
        grad_norm_hex=result.grad_norm.hex(),
        lr=result.lr,
        consumed_samples=progress.consumed_samples,
        tokens_per_s=result.tokens * run.mesh.layout.dp_size / seconds,
        tflops=flops / devices_per_replica / seconds / 1e12,
        peak_memory_gb=run.backend.peak_memory_bytes() / 1e9,
        step_time_s=seconds,
    )


def _save(run: Run, built: _Built, root: Path, progress: Progress) -> None:
    """Write a checkpoint, or begin to where a background saver does so."""
    flags, started = run.flags, time.monotonic()
    if flags.ckpt_format == "torch":
        folder = save_weights(root, progress, flags.seed, built.parallel, built.optimizer, run.comm, flags.keep_latest)
        logger.info("checkpoint %s (weights) written in %.1f s", folder.name, time.monotonic() - started)
        return
    state = state_of(
        built.optimizer,
        progress,
        run.config,
        flags.seed,
        run.comm,
        with_optimizer=not flags.no_save_optim,
        adapters=built.adapters.record if built.adapters is not None else None,
    )
    if built.saver is not None:
        built.saver.start(state.step, state.pieces, state.scalars, flags.keep_latest, state.derived)
        return
    folder = save(root, state.step, state.pieces, state.scalars, run.comm, flags.keep_latest, state.derived)
    logger.info("checkpoint %s written in %.1f s", folder.name, time.monotonic() - started)


def _saver(run: Run, stack: ExitStack) -> BackgroundSaver | None:
    if run.flags.save is None or run.saving is None:
        return None
    return stack.enter_context(BackgroundSaver(Path(run.flags.save), run.saving))
