"""Guard against numbers that are not finite, and reports of losses out of the ordinary.

All ranks decide from the same `StepStatistics`, before the optimizer touches a weight. A step that is not finite is
computed once more with every module watched: the run then names the first module that made a bad number, and says
whether the same numbers came again, which a defect of the data or the model does and one of the hardware hardly ever.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from mm.data.packed import MicroBatch
from mm.diffusion.flow import FlowMatching
from mm.errors import NumericsError
from mm.optim.optimizer import Optimizer
from mm.optim.step_statistics import StepStatistics, of_replicas
from mm.parallel.apply import ParallelModel
from mm.train.run import Run
from mm.train.step import SampleCounts, compute_gradients

logger = logging.getLogger(__name__)

FOLDER = "anomaly"
WINDOW, LEAST = 128, 32
"""A loss is compared with so many before it, and with no fewer than `LEAST`."""
_FAR = 8
"""Median absolute deviations above the median that make a spike."""
_MOST_NAMES = 20


class NumericsGuard:
    """Watches the numbers of a model in training."""

    def __init__(self, run: Run, parallel: ParallelModel, optimizer: Optimizer, flow: FlowMatching) -> None:
        """Watch from now on."""
        self._run, self._parallel, self._flow = run, parallel, flow
        self._names = list(optimizer.shapes)
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._most = run.sections.optimizer.skipped_steps_in_a_row
        self._in_a_row = 0

    def accepted(self, step: int, statistics: StepStatistics, batches: Sequence[MicroBatch]) -> None:
        """Take note of a finite step, and say so where its loss is far above those before."""
        self._in_a_row = 0
        loss = statistics.loss
        if len(self._losses) >= LEAST:
            middle = median(self._losses)
            deviation = median(abs(value - middle) for value in self._losses)
            if deviation > 0 and loss > middle + _FAR * deviation and self._holds_largest(statistics):
                logger.warning(
                    "step %d | loss spike: %.4f, %.0f deviations above the median %.4f of %d steps; the worst is %s",
                    step,
                    loss,
                    (loss - middle) / deviation,
                    middle,
                    len(self._losses),
                    self._told(batches, statistics.losses[self._parallel.mesh.dp_rank], worst_only=True),
                )
        self._losses.append(loss)

    def refused(self, step: int, statistics: StepStatistics, batches: Sequence[MicroBatch], before: int) -> None:
        """Look into a step that is not finite, write the anomaly's files, and go on or stop; every rank calls it.

        Args:
            step, statistics, batches: the step. before: steps of the run that were skipped before it.

        Raises:
            NumericsError: NUM-001 for the loss, NUM-002 for a gradient, where `--on-nonfinite` allows no more steps to
                be skipped.
        """
        losses, modules = self._again(batches, statistics)
        same = torch.equal(losses.nan_to_num(), statistics.losses.nan_to_num())
        bad_parameters = [
            name for name, finite in zip(self._names, statistics.squares.isfinite().tolist(), strict=True) if not finite
        ]
        mesh = self._parallel.mesh
        mine = statistics.losses[mesh.dp_rank]
        bad_losses = not bool(statistics.losses.isfinite().all())
        involved = mesh.tp_rank == mesh.cp_rank == 0 and (not bad_losses or not bool(mine.isfinite().all()))
        report: dict[str, Any] = {}
        if involved:
            report = {
                "step": step,
                "rank": self._run.comm.rank,
                "replica": mesh.dp_rank,
                "pipeline_stage": mesh.pp_rank,
                "dtype": str(self._parallel.dtype).removeprefix("torch."),
                "loss": _number(statistics.loss),
                "grad_norm": _number(statistics.grad_norm),
                "micro_batches": self._described(batches, mine),
                "first_module_not_finite": modules[0] if modules else None,
                "parameters_not_finite": bad_parameters,
                "gradient_norms": self._norms(statistics.squares),
                "computed_again": "the same" if same else "other losses",
                "losses_before": list(self._losses)[-_MOST_NAMES:],
            }
        file = self._write(step, report) if involved else None
        short = {"rank": self._run.comm.rank, "file": file, "module": modules[0] if modules else None}
        short["samples"] = self._told(batches, mine) if involved and bad_losses else None
        everyone = [found for found in self._run.comm.all_gather_object(short) if found["file"] or found["samples"]]
        self._go_on_or_stop(step, statistics, everyone, bad_parameters, before, same=same)

    def _go_on_or_stop(
        self,
        step: int,
        statistics: StepStatistics,
        reports: list[Any],
        bad_parameters: list[str],
        before: int,
        *,
        same: bool,
    ) -> None:
        bad_loss = not math.isfinite(statistics.loss)
        what = f"loss of step {step} is {statistics.loss}" if bad_loss else f"gradient norm of step {step} is"
        what += "" if bad_loss else f" {statistics.grad_norm}"
        told = [f"The {what}; no weight was changed."]
        samples = list(dict.fromkeys(report["samples"] for report in reports if report["samples"]))
        if samples:
            told.append(f"Not finite: {'; '.join(samples)}.")
        else:
            told.append(f"Not finite: the gradients of {_listed(bad_parameters)}.")
        modules = [f"{report['module']} (rank {report['rank']})" for report in reports if report["module"]]
        if modules:
            told.append(f"The first module to make such a number: {modules[0]}.")
        if not same:
            told.append("Computed again it gave other losses: suspect the hardware, or kernels that are not exact.")
        files = [report["file"] for report in reports if report["file"]]
        if files:
            told.append(f"See {files[0]}{f' and {len(files) - 1} more' if len(files) > 1 else ''}.")
        message = " ".join(told)
        if self._in_a_row >= self._most:
            row = f" It is number {self._in_a_row + 1} in a row." if self._in_a_row else ""
            words = self._run.sections.origins
            rate, leave_out = words["optimizer.lr"].name, words["optimizer.on_nonfinite"].with_value("skip:K")
            raise NumericsError(
                "NUM-001" if bad_loss else "NUM-002",
                message + row,
                f"Look at these samples and modules; lower {rate}, or let {leave_out} leave out K such steps.",
            )
        self._in_a_row += 1
        if self._run.reports:
            logger.warning(
                "%s The step is skipped, number %d of at most %d in a row, %d in all",
                message,
                self._in_a_row,
                self._most,
                before + 1,
            )

    def _again(self, batches: Sequence[MicroBatch], statistics: StepStatistics) -> tuple[Tensor, list[str]]:
        """The losses of all replicas computed once more, and this rank's modules whose output was not finite first."""
        parallel = self._parallel
        with _watched([stage.model for stage in parallel.stages]) as modules:
            counts = SampleCounts(statistics.samples or self._run.global_batch_size, statistics.losses.shape[-1])
            losses = compute_gradients(parallel, self._flow, batches, self._run.sections.training.seed, counts)
        parts = parallel.mesh.gather(losses.flatten()).flatten()
        return of_replicas(parallel.mesh.layout, parts, losses.shape), modules

    def _holds_largest(self, statistics: StepStatistics) -> bool:
        """True on the first rank of the replica with the largest loss."""
        mesh = self._parallel.mesh
        largest = int(statistics.losses.flatten(1).amax(dim=1).argmax())
        return mesh.dp_rank == largest and mesh.tp_rank == mesh.cp_rank == mesh.pp_rank == 0

    def _described(self, batches: Sequence[MicroBatch], losses: Tensor) -> list[dict[str, Any]]:
        return [
            {
                "samples": batch["sample"],
                "draws": batch["draw"],
                "timesteps": self._timesteps(batch),
                "losses": [_number(loss) for loss in row[: len(batch["sample"])].tolist()],
            }
            for batch, row in zip(batches, losses, strict=True)
        ]

    def _told(self, batches: Sequence[MicroBatch], losses: Tensor, *, worst_only: bool = False) -> str:
        """Samples with losses that are not finite, or the one with the largest."""
        found = [
            (float(loss), f"{sample} at timestep {timestep:.0f}")
            for batch, row in zip(batches, losses, strict=True)
            for sample, timestep, loss in zip(batch["sample"], self._timesteps(batch), row, strict=False)
        ]
        if worst_only:
            loss, text = max(found)
            return f"sample {text} ({loss:.4f})"
        return "sample " + _listed([text for loss, text in found if not math.isfinite(loss)])

    def _timesteps(self, batch: MicroBatch) -> list[float]:
        seed = self._run.sections.training.seed
        drawn = self._flow.draw_timesteps(seed, batch["sample"], batch["draw"], batch.get("place"))[1]
        values: list[float] = drawn.tolist()
        return values

    def _norms(self, squares: Tensor) -> dict[str, float | str]:
        norms = squares.double().sqrt().tolist()
        return {name: _number(norm) for name, norm in zip(self._names, norms, strict=True)}

    def _write(self, step: int, report: dict[str, Any]) -> str | None:
        """The file's path; None, told, where it cannot be written: no run ends for want of a report."""
        if self._run.sections.checkpoint.save is None:
            return None
        path = Path(self._run.sections.checkpoint.save) / FOLDER / f"step-{step:07d}-rank-{self._run.comm.rank}.json"
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
        except OSError as error:
            logger.warning("%s cannot be written: %s", path, error)
            return None
        return str(path)


@contextlib.contextmanager
def _watched(models: Sequence[nn.Module]) -> Iterator[list[str]]:
    """Names of modules whose output is not finite, in the order in which they were seen; inner ones come first."""
    found: list[str] = []
    with contextlib.ExitStack() as hooks:
        for model in models:
            for name, module in model.named_modules():

                def look(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
                    if isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all():
                        found.append(name or "the whole model")

                hooks.callback(module.register_forward_hook(look).remove)
        yield found


def _number(value: float) -> float | str:
    """JSON has no word for numbers that are not finite."""
    return value if math.isfinite(value) else str(value)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
