"""`mm train`: checks the configuration, joins the processes, trains."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mm.cli.entry import run
from mm.config.base import load
from mm.config.data import load_train_data
from mm.config.flags import parse_flags
from mm.config.layerzero import load_zero
from mm.config.layout import layout_of
from mm.config.output import require_writable_folder
from mm.config.place import process_place
from mm.config.rules import check_training
from mm.config.rules_checks import load_validation
from mm.config.train import RETIRED_TRAIN_FLAGS, PretrainModel, TrainFlags
from mm.stopping import StopRequest

if TYPE_CHECKING:  # torch comes later
    from mm.train.callbacks.base import Callback
    from mm.train.sinks.base import Sink

_KEPT = "Nothing was saved since the newest checkpoint (--save-on-signal saves before it stops)."

SAVING_MINUTES = 24 * 60
"""How long ranks wait for the slowest one's disk in a background save; a process that is gone ends it at once."""


def main(argv: Sequence[str], callbacks: Sequence[Callback] = (), sinks: Sequence[Sink] = ()) -> None:
    """Train; raises what `mm.train.loop.train` raises, and what `StopRequest` does when the process is asked to end.

    Args:
        argv: the words after the command's name. callbacks, sinks: of a script around this command.
    """
    flags = parse_flags(TrainFlags, argv, program="mm train", retired=RETIRED_TRAIN_FLAGS)
    with StopRequest(saves=flags.save_on_signal, kept=_KEPT) as stop:
        _train(flags, stop, callbacks, sinks)


def _train(flags: TrainFlags, stop: StopRequest, callbacks: Sequence[Callback], sinks: Sequence[Sink]) -> None:
    model = load(PretrainModel, Path(flags.mm_model))
    data = load_train_data(Path(flags.mm_data))
    zero = load_zero(flags)
    where = process_place()
    check_training(flags, model, zero, where.world_size)
    _require_places(flags)
    validation = load_validation(flags, model)
    eval_data = load_train_data(Path(flags.eval_data)) if flags.eval_data is not None else None
    layout = layout_of(flags, model, zero, where.world_size)

    # Only now torch: a configuration mistake is told in a fraction of a second, before any device is touched.
    from mm.checkpoint.comm import Comm, ProcessGroupComm, SingleProcess
    from mm.data.dataset import open_features
    from mm.device.backend import deterministic, select
    from mm.lora.plan import plan_of
    from mm.ops.elementwise.dispatch import choice_of
    from mm.parallel.mesh import build_mesh
    from mm.supervise.job import Job
    from mm.supervise.mailbox import Mailbox
    from mm.supervise.watchdog import ANSWER_S, Watchdog
    from mm.train.loop import train
    from mm.train.run import Run, watch_limits

    if where.rank != 0:
        logging.getLogger().setLevel(logging.WARNING)
    lora = plan_of(flags, model.predictor.wan())
    dataset = open_features(data, model.predictor.wan())
    held_out = open_features(eval_data, model.predictor.wan()) if eval_data is not None else None
    backend = select(flags.device, where.local_rank, where.world_size)
    timeout = flags.distributed_timeout_minutes
    configuration = {
        "elementwise operators": choice_of(backend.device).name,
        "flags": flags.model_dump(mode="json"),
        flags.mm_model: model.model_dump(mode="json"),
        flags.mm_data: data.model_dump(mode="json"),
        flags.eval_data or "held-out features": eval_data.model_dump(mode="json") if eval_data else None,
        flags.validation_config or "validation": validation.model_dump(mode="json") if validation else None,
        flags.layerzero_config or "zero_config.yaml": zero.model_dump(mode="json") if zero else None,
    }
    save = Path(flags.save) if flags.save is not None else None
    with (
        deterministic(flags.deterministic_mode),
        Job(where, backend.collective, backend.device, timeout, configuration) as job,
        Watchdog(
            Mailbox(job.notices(ANSWER_S), where.rank, where.world_size, job.remember),
            watch_limits(flags),
            save / "hang" if save is not None else None,
            sampling=flags.straggler_interval is not None,
        ) as watch,
        build_mesh(layout, timeout, backend.kind) as mesh,
    ):
        comm: Comm = SingleProcess()
        saving: Comm | None = comm if flags.async_save else None
        if where.world_size > 1:
            comm = ProcessGroupComm(device=backend.device)
            saving = ProcessGroupComm(job.host_group(SAVING_MINUTES)) if flags.async_save else None
        progress = train(
            Run(
                flags,
                model,
                data,
                zero,
                dataset,
                mesh,
                backend,
                comm,
                watch,
                stop if flags.save_on_signal else None,
                where.local_world_size,
                lora=lora,
                saving=saving,
                held_out=held_out,
                validation=validation,
            ),
            callbacks,
            sinks,
        )
    logging.getLogger(__name__).info("done: step %d, %d samples", progress.step, progress.consumed_samples)


def _require_places(flags: TrainFlags) -> None:
    for name, folder in (("--save", flags.save), ("--tensorboard-dir", flags.tensorboard_dir)):
        if folder is not None:
            require_writable_folder(folder, name)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
