"""The training run from start to end: model on the mesh, weights or checkpoint, steps, metrics, checkpoints."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from mm.activation.host_pool import make_offloader
from mm.activation.recompute import block_runner
from mm.checkpoint.background import BackgroundSaver
from mm.checkpoint.lock import Lock
from mm.checkpoint.store import writing
from mm.config.bad_samples import parse_on_bad_sample
from mm.config.recompute import recompute_of
from mm.config.request import Request
from mm.data.loader import FeatureBatch, feature_batches
from mm.data.replacing import check_replaced, replaced_in_step
from mm.data.sampler import BatchPlan
from mm.device.queues import queues_of
from mm.diffusion.flow import FlowMatching
from mm.errors import StoppedError
from mm.optim.optimizer import Optimizer
from mm.optim.replica_hash import require_equal_replicas
from mm.parallel.apply import ParallelModel
from mm.supervise.limits import OPENING
from mm.train.build import (
    build_model,
    build_optimizer,
    check_sizes,
    describe,
    open_adapters,
    require_memory_for_saving,
    settings_of,
    start_or_resume,
    step_shape,
    why_not_compiled,
)
from mm.train.checkpointing import Checkpointing
from mm.train.checks import Check, Checks
from mm.train.flops import train_flops
from mm.train.memory_breakdown import Phase
from mm.train.metrics import MetricsLog, StepMetrics
from mm.train.numerics import NumericsGuard
from mm.train.out_of_memory import MemoryWatch
from mm.train.run import Run
from mm.train.state import Progress
from mm.train.step import StepResult, train_step
from mm.train.stragglers import Stragglers

logger = logging.getLogger(__name__)


def train(run: Run) -> Progress:
    """Train until `--train-iters` steps are taken, going on from the newest checkpoint in `--save` if there is one.

    Returns:
        Where the run ended.

    Raises:
        ConfigError: CFG-046 when samples of different sizes would cross a pipeline that was not told so; CFG-049 or
            CFG-185 when offload or background saves need more host memory than is free; CFG-068 when blocks would be
            compiled for too many sizes.
        OutOfMemoryError: MEM-001 when the device has no room for the model or a step.
        CheckpointError, ConfigError, NumericsError: as documented where they arise.
    """
    flags = run.flags
    check_sizes(run)
    steps = settings_of(run)
    memory = MemoryWatch(Request(flags, run.model, run.zero, run.comm.world_size), run.backend, run.comm.rank)
    during = partial(_during, run, memory)
    with ExitStack() as stack:
        with run.watch.during(OPENING):
            lock = stack.enter_context(writing(Path(flags.save), run.comm)) if flags.save is not None else None
        checks = Checks.prepare(flags, run.held_out, run.validation, run.mesh, run.backend, run.comm)
        recompute = recompute_of(flags, run.model)
        offloader = make_offloader(
            recompute, run.config, run.mesh, run.backend, step_shape(run), processes_of_node=run.processes_of_node
        )
        memory.pinned_host = 0 if offloader is None else offloader.memory.nbytes
        not_compiled = why_not_compiled(run)
        adapters = open_adapters(run)
        run_blocks = block_runner(recompute, offloader, run.backend.model_code)
        with during("building the model"):
            memory.parallel = parallel = build_model(run, adapters, run_blocks, not_compiled is None)
            memory.optimizer = optimizer = build_optimizer(parallel, steps)
        describe(run, recompute, offloader, not_compiled)
        with during("loading weights"):
            progress = start_or_resume(run, adapters, optimizer, steps)
        missed = checks.missed(progress.step) if progress.step > 0 else frozenset[Check]()
        if progress.step >= flags.train_iters and not missed:
            logger.info("step %d of %d is already done; nothing to train", progress.step, flags.train_iters)
            return progress
        log = stack.enter_context(_metrics_log(run, progress))
        with during("evaluation and validation"):
            checks.run(missed, progress.step, parallel, log)
        saves = None
        if flags.save is not None:
            root, background = Path(flags.save), _background_saver(run, optimizer, memory, lock, stack)
            saves = Checkpointing(run, root, steps, parallel, optimizer, adapters, background, lock)
        # closed here: readers that are left would outlive the error that ends the steps, and hold the process up
        batches = stack.enter_context(closing(_batches(run, progress)))
        return _steps(run, _Built(parallel, optimizer, log, during, checks, saves), batches, progress)


@contextmanager
def _during(run: Run, memory: MemoryWatch, phase: Phase) -> Iterator[None]:
    """Enter this around a phase: who hangs in it is named, and who runs out of memory in it."""
    with run.watch.during(phase), memory.during(phase):
        yield


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
        during: makes what to enter for each phase. saves: None without `--save`.
    """

    parallel: ParallelModel
    optimizer: Optimizer
    log: MetricsLog
    during: Callable[[Phase], AbstractContextManager[None]]
    checks: Checks
    saves: Checkpointing | None


def _steps(run: Run, built: _Built, batches: Iterator[FeatureBatch], progress: Progress) -> Progress:
    flags = run.flags
    flow = FlowMatching(run.model.diffusion)
    guard = NumericsGuard(run, built.parallel, built.optimizer, flow, progress.skipped_steps)
    stragglers = Stragglers(run.watch, run.mesh, run.backend)
    if run.stop is not None:
        run.stop.begin_steps()
    while progress.step < flags.train_iters:
        started, step = time.monotonic(), progress.step + 1
        run.watch.begin_step(step)
        with built.during("waiting for data"):
            mine = [next(batches) for _ in range(run.num_microbatches)]
        replaced = progress.replaced_samples + _replaced(run, mine, progress)
        result = train_step(
            built.parallel,
            built.optimizer,
            flow,
            mine,
            samples=run.global_batch_size,
            seed=flags.seed,
            during=built.during,
            on_nonfinite=partial(guard.refused, step, batches=mine),
            asked_to_stop=partial(_is_asked_to_stop, run),
        )
        if result.updated:
            guard.accepted(step, result.outcome, mine)
        if built.saves is not None:
            built.saves.look()
        progress = Progress(step, progress.consumed_samples + run.global_batch_size, guard.skipped, replaced)
        built.log.write(_measure(run, result, progress, flow, mine, time.monotonic() - started))
        if run.comm.world_size > 1 and _is_due(flags.straggler_interval, step):
            stragglers.compare(step)
        if _is_due(flags.check_replica_hash_interval, step):
            require_equal_replicas(built.parallel, step)
        last, stopping = step == flags.train_iters, result.outcome.asked_to_stop
        saved = False
        if _is_due(flags.save_interval, step) or stopping or last:
            saved = _save(built, progress, may_fail=not (stopping or last))
        due = frozenset[Check]() if stopping and not last else built.checks.due(step)
        with built.during("evaluation and validation"):
            built.checks.run(due, step, built.parallel, built.log)
        if due:  # they take minutes, in which a signal may have come to some
            stopping = any(run.comm.all_gather_object(_is_asked_to_stop(run)))
        if stopping and not last:  # a run that is at its end is done, not stopped
            if not saved:
                _save(built, progress, may_fail=False)
            _stop(run, built, progress)
    if built.saves is not None:
        built.saves.finish()
    return progress


def _is_due(interval: int | None, step: int) -> bool:
    return interval is not None and step % interval == 0


def _is_asked_to_stop(run: Run) -> bool:
    return run.stop is not None and run.stop.received is not None


def _save(built: _Built, progress: Progress, *, may_fail: bool) -> bool:
    """Whether there is a checkpoint of this step now, or about to be one."""
    if built.saves is None:
        return False
    with built.during("saving"):
        return built.saves.save(progress, may_fail=may_fail)


def _stop(run: Run, built: _Built, progress: Progress) -> None:
    if built.saves is not None:
        built.saves.finish()
    by = None
    if run.stop is not None:
        by = run.stop.received
        run.stop.saved()
    raise StoppedError(
        "RUN-001",
        f"Stopped by {by or 'a signal to another process'} after step {progress.step}, which is saved.",
        "Run the same command again; it goes on from there.",
    )


def _replaced(run: Run, batches: Sequence[FeatureBatch], progress: Progress) -> int:
    """How many samples of the step were replaced in all replicas; an error where --on-bad-sample allows fewer."""
    policy = parse_on_bad_sample(run.flags.on_bad_sample)
    if not policy.skips:
        return 0
    samples = [sample for batch in batches for sample in batch["sample"]]
    instead_of = [sample for batch in batches for sample in batch.get("replaced", [])]
    replaced = replaced_in_step(run.mesh.dp_rank, samples, instead_of, run.comm.all_gather_object)
    consumed = progress.consumed_samples + run.global_batch_size
    check_replaced(progress.replaced_samples + replaced, consumed, len(run.dataset), policy)
    return replaced


def _batches(run: Run, progress: Progress) -> Generator[FeatureBatch]:
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
        read_timeout=flags.read_timeout,
        on_bad_sample=parse_on_bad_sample(flags.on_bad_sample),
        pin_memory=loading.pin_memory and run.backend.kind != "cpu",
        with_noise=run.mesh.pp_rank in (0, run.mesh.layout.pp_size - 1),  # stages between do not see it
    )


def _measure(
    run: Run,
    result: StepResult,
    progress: Progress,
    flow: FlowMatching,
    batches: Sequence[FeatureBatch],
    seconds: float,
) -> StepMetrics:
    replica_samples = run.global_batch_size // run.mesh.layout.dp_size
    flops = replica_samples * train_flops(run.config, result.tokens // replica_samples, frozen=run.lora is not None)
    devices_per_replica = run.comm.world_size // run.mesh.layout.dp_size
    outcome = result.outcome
    drawn = [flow.draw_timesteps(run.flags.seed, batch["sample"], batch["draw"])[1] for batch in batches]
    return StepMetrics(
        step=progress.step,
        loss=outcome.loss,
        loss_hex=outcome.loss.hex(),
        grad_norm=outcome.grad_norm,
        grad_norm_hex=outcome.grad_norm.hex(),
        lr=result.lr,
        consumed_samples=progress.consumed_samples,
        tokens_per_s=result.tokens * run.mesh.layout.dp_size / seconds,
        tflops=flops / devices_per_replica / seconds / 1e12,
        peak_memory_gb=run.backend.peak_memory_bytes() / 1e9,
        step_time_s=seconds,
        skipped=not result.updated,
        timesteps=tuple(round(t, 3) for t in torch.cat(drawn).tolist()),
        sample_losses=tuple(outcome.losses[run.mesh.dp_rank].flatten().tolist()),
    )


def _background_saver(
    run: Run, optimizer: Optimizer, memory: MemoryWatch, lock: Lock | None, stack: ExitStack
) -> BackgroundSaver | None:
    if run.flags.save is None or run.saving is None:
        return None
    memory.pinned_host += require_memory_for_saving(run, optimizer)
    saver = BackgroundSaver(Path(run.flags.save), run.saving, queues_of(run.backend).host_memory, lock)
    return stack.enter_context(saver)
