"""What a run tells: metrics.jsonl (one object a step), TensorBoard, console lines and a progress bar."""

from __future__ import annotations

import io
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from mm.config.units import GIB, format_bytes
from mm.errors import CheckpointError
from mm.train.running_mean import RunningMean

if TYPE_CHECKING:  # `mm plot` reads these files too, and needs no model
    from mm.train.evaluation import Evaluation

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
EVALUATION_FILE = "evaluation.jsonl"

RowT = TypeVar("RowT")


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl.

    Attributes:
        step: from 1. loss: weighted, averaged over the global batch. grad_norm: before clipping.
        loss_hex, grad_norm_hex: the same numbers, bit for bit (`float.hex`).
        lr: the rate this step used. consumed_samples: up to and with this step.
        tokens_per_s: video tokens of the whole job. tflops: model TFLOP/s of one device (`mm.train.flops`).
        peak_memory_gb: of this process so far, in 10^9 bytes. step_time_s: wall time.
        skipped: the loss or a gradient was not finite, and no weight changed; such numbers are null in the file.
        timesteps, sample_losses: of the first replica's samples, in its order.
        loss_mean: `mm.train.running_mean.RunningMean` up to and with this step.
    """

    step: int
    loss: float
    loss_hex: str
    grad_norm: float
    grad_norm_hex: str
    lr: float
    consumed_samples: int
    tokens_per_s: float
    tflops: float
    peak_memory_gb: float
    step_time_s: float
    skipped: bool = False
    timesteps: tuple[float, ...] = ()
    sample_losses: tuple[float, ...] = ()
    loss_mean: float | None = None

    def as_json(self) -> str:
        """One line of metrics.jsonl; JSON has no word for numbers that are not finite, the hex fields have."""
        values = asdict(self)
        for name in ("loss", "grad_norm"):
            values[name] = values[name] if math.isfinite(values[name]) else None
        values["sample_losses"] = [loss if math.isfinite(loss) else None for loss in self.sample_losses]
        return json.dumps(values, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> StepMetrics:
        """Read a line.

        Raises:
            ValueError, TypeError: for one that `as_json` did not write.
        """
        values = json.loads(line)
        for name in ("loss", "grad_norm"):
            values[name] = math.nan if values[name] is None else values[name]
        for name in ("timesteps", "sample_losses"):
            values[name] = tuple(math.nan if value is None else value for value in values.get(name, ()))
        if len(values["timesteps"]) != len(values["sample_losses"]):
            raise ValueError("it has not one timestep for each of the sample_losses")
        return cls(**values)

    @property
    def peak_memory_gib(self) -> float:
        """`peak_memory_gb` in GiB."""
        return self.peak_memory_gb * 1e9 / GIB

    def line(self, total_steps: int, eta_s: float, mean_of: int) -> str:
        """The console line; `mean_of` steps are in the mean."""
        mean = "" if self.loss_mean is None else f" (mean of {mean_of}: {self.loss_mean:.4f})"
        return (
            f"step {self.step}/{total_steps} | loss {self.loss:.4f}{mean} | grad norm {self.grad_norm:.3f} | "
            f"lr {self.lr:.2e} | {_short(self.tokens_per_s)} tokens/s | {self.tflops:.3g} TFLOP/s | "
            f"peak {format_bytes(self.peak_memory_gib * GIB)} | ETA {_clock(eta_s)}"
        )


def read_metrics(path: Path) -> list[StepMetrics]:
    """Read metrics.jsonl; a last line cut off by a kill is left out.

    Raises:
        CheckpointError: CKPT-070 when the file is missing or a line before the last is damaged.
    """
    return _read_lines(path, StepMetrics.from_json)


@dataclass(frozen=True)
class StepEvaluation:
    """One line of evaluation.jsonl: the `mm.train.evaluation.Evaluation` of a step."""

    step: int
    loss: float
    loss_at: dict[int, float]
    num_samples: int

    def as_json(self) -> str:
        """One line of evaluation.jsonl."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> StepEvaluation:
        """Read a line; raises as `StepMetrics.from_json`."""
        values = json.loads(line)
        return cls(**{**values, "loss_at": {int(timestep): loss for timestep, loss in dict(values["loss_at"]).items()}})


def read_evaluations(path: Path) -> list[StepEvaluation]:
    """Read evaluation.jsonl as `read_metrics` reads its file, with the same errors."""
    return _read_lines(path, StepEvaluation.from_json)


def _read_lines(path: Path, read: Callable[[str], RowT]) -> list[RowT]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError("CKPT-070", f"{path} cannot be read ({error}).", "Name a run's folder.") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(read(line))
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise CheckpointError(
                "CKPT-070", f"{path} line {number} is damaged ({error}).", "Remove that line."
            ) from None
    return rows


class MetricsLog:
    """Writes a run's metrics on the one rank that reports; a context manager that closes its files.

    A disk that refuses them is told, and does not end the run.
    """

    def __init__(
        self,
        folder: Path | None,
        tensorboard: Path | None,
        *,
        first_step: int,
        total_steps: int,
        log_interval: int,
        progress_bar: bool,
    ) -> None:
        self._total_steps = total_steps
        self._log_interval = log_interval
        self._folder = folder
        self._recent = RunningMean()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            before = _keep_before(folder / METRICS_FILE, read_metrics, first_step)
            self._recent = RunningMean(float.fromhex(row.loss_hex) for row in before)
            _keep_before(folder / EVALUATION_FILE, read_evaluations, first_step)
        self._board = SummaryWriter(str(tensorboard), purge_step=first_step) if tensorboard is not None else None
        self._bar = tqdm(
            total=total_steps,
            initial=first_step - 1,
            unit="step",
            disable=not progress_bar or None,
            dynamic_ncols=True,
        )
        self._redirect = logging_redirect_tqdm()
        self._seconds: list[float] = []
        self._lost = 0

    def __enter__(self) -> MetricsLog:
        self._redirect.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        self._redirect.__exit__(kind, error, trace)
        with self._board_errors():
            if self._board is not None:
                self._board.close()

    def write(self, metrics: StepMetrics) -> None:
        """Record one step everywhere, with the mean of the last losses."""
        self._recent.add(metrics.loss)
        metrics = replace(metrics, loss_mean=self._recent.value)
        if self._folder is not None:
            self._append(self._folder / METRICS_FILE, metrics.as_json())
        names = ("loss", "grad_norm", "lr", "tokens_per_s", "tflops", "peak_memory_gb", "step_time_s", "loss_mean")
        numbers = {name: getattr(metrics, name) for name in names}
        self._show_numbers("train", {n: value for n, value in numbers.items() if value is not None}, metrics.step)
        self._seconds = [*self._seconds[-49:], metrics.step_time_s]
        eta = sum(self._seconds) / len(self._seconds) * (self._total_steps - metrics.step)
        self._bar.set_postfix(loss=f"{metrics.loss:.4f}", refresh=False)
        self._bar.update(1)
        if metrics.step % self._log_interval == 0 or metrics.step == self._total_steps:
            logger.info(metrics.line(self._total_steps, eta, self._recent.count))

    def write_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Record a loss on held-out features: a line of evaluation.jsonl, TensorBoard, a console line."""
        if self._folder is not None:
            self._append(self._folder / EVALUATION_FILE, StepEvaluation(step, **asdict(evaluation)).as_json())
        at = {f"loss_at_{timestep:03d}": loss for timestep, loss in evaluation.loss_at.items()}
        self._show_numbers("evaluation", {"loss": evaluation.loss, **at}, step)
        logger.info("step %d | held-out loss %.4f of %d samples", step, evaluation.loss, evaluation.num_samples)

    def write_clips(self, step: int, clips: Mapping[str, Tensor], fps: int) -> None:
        """Show rendered clips in TensorBoard, by name; uint8 [F, H, W, 3] each."""
        values = []
        for name, frames in clips.items():
            image = Summary.Image(
                height=frames.shape[1], width=frames.shape[2], colorspace=3, encoded_image_string=_gif(frames, fps)
            )
            values.append(Summary.Value(tag=f"validation/{name}", image=image))
        self._show(values, step)

    def _show_numbers(self, group: str, numbers: Mapping[str, float], step: int) -> None:
        finite = {name: number for name, number in numbers.items() if math.isfinite(number)}
        self._show([Summary.Value(tag=f"{group}/{name}", simple_value=number) for name, number in finite.items()], step)

    def _show(self, values: Sequence[Any], step: int) -> None:
        """Write `Summary.Value`s to TensorBoard."""
        with self._board_errors():
            if self._board is not None:
                self._board._get_file_writer().add_summary(Summary(value=values), step)

    @contextmanager
    def _board_errors(self) -> Iterator[None]:
        """TensorBoard's writer cannot go on after an error."""
        try:
            yield
        except OSError as error:
            logger.error("TensorBoard's file cannot be written (%s); training goes on without it", error)
            self._board = None

    def _append(self, path: Path, line: str) -> None:
        """A line at the end of a file, whole or not at all."""
        size = None
        try:
            size = path.stat().st_size if path.exists() else 0
            with path.open("a") as file:
                file.write(line + "\n")
        except OSError as error:
            with suppress(OSError):  # half a line in the middle of the file would make it unreadable
                if size is not None:
                    os.truncate(path, size)
            if self._lost == 0:
                logger.error("%s cannot be written (%s); training goes on, lines are lost", path, error)
            self._lost += 1
            return
        if self._lost > 0:
            logger.warning("%s is written again; %d lines are lost", path, self._lost)
        self._lost = 0


def _gif(frames: Tensor, fps: int) -> bytes:
    """A looping GIF, which is how TensorBoard shows a clip; its own writer needs a further package for it."""
    images = [Image.fromarray(frame) for frame in frames.numpy()]
    out = io.BytesIO()
    images[0].save(out, "GIF", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
    return out.getvalue()


StepRowT = TypeVar("StepRowT", StepMetrics, StepEvaluation)


def _keep_before(path: Path, read: Callable[[Path], Sequence[StepRowT]], first_step: int) -> list[StepRowT]:
    """Drop lines of steps that will run again, as after a kill between two checkpoints, and a line cut off by it.

    Returns:
        The rows that are kept.
    """
    if not path.exists():
        return []
    rows, text = read(path), path.read_text()
    again = [row for row in rows if row.step >= first_step]
    if again:
        logger.warning("%s: steps %d to %d will run again; their lines are removed", path, first_step, again[-1].step)
    kept = "".join(f"{line}\n" for row, line in zip(rows, text.splitlines(), strict=False) if row.step < first_step)
    if kept != text:  # what is appended would else go on in the middle of a line that is cut off
        temporary = path.with_suffix(".tmp")
        temporary.write_text(kept)
        os.replace(temporary, path)
    return [row for row in rows if row.step < first_step]


def _short(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 10_000 else f"{value:.0f}"


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours:d}:{minute:02d}:{second:02d}"
