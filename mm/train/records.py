"""Records of what a run measures, the lines of its files (metrics.jsonl, evaluation.jsonl), and reading these."""

from __future__ import annotations

import abc
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

from mm.config.units import GIB, format_bytes
from mm.errors import CheckpointError
from mm.train.running_mean import RunningMean

if TYPE_CHECKING:  # `mm plot` reads these files too, and needs no torch
    from torch import Tensor

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
EVALUATION_FILE = "evaluation.jsonl"
LIVE_FILE = "live.jsonl"
NORMS_FILE = "norms.jsonl"

RowT = TypeVar("RowT")


@dataclass(frozen=True)
class Record(abc.ABC):
    """Measurement after a step; any sink takes any record.

    Attributes:
        step: from 1.
        group: what TensorBoard shows its numbers under.
        file: of the run's folder, which gets it as a line; None where no file does.
    """

    step: int
    group: ClassVar[str]
    file: ClassVar[str | None] = None

    def as_json(self) -> str:
        """The line of `file`, which has a `step`; the fields, unless a record says otherwise."""
        return json.dumps(asdict(self))

    def numbers(self) -> Mapping[str, float]:
        """Numbers that change from record to record, by name, for curves."""
        return {}

    @abc.abstractmethod
    def line(self) -> str | None:
        """Line for people; None where it would be too much."""


@dataclass(frozen=True)
class StepMetrics(Record):
    """One line of metrics.jsonl.

    Attributes:
        step: from 1. loss: weighted, averaged over the global batch. grad_norm: before clipping.
        loss_hex, grad_norm_hex: the same numbers, bit for bit (`float.hex`).
        lr: the rate this step used. consumed_samples: that were trained on up to and with this step.
        tokens_per_s: video tokens of the whole job. tflops: model TFLOP/s of one device (`mm.train.flops`).
        peak_memory_gb: of this process so far, in 10^9 bytes. step_time_s: wall time.
        skipped: the loss or a gradient was not finite, and no weight changed; such numbers are null in the file.
        tokens, token_pairs: sums of the video tokens of the step's samples, and of their squares.
        timesteps, sample_losses: of the first replica's samples, in its order.
        clip_limit: of grad_norm, where it differs from step to step; else, and of a skipped step, None.
        loss_mean: `mm.train.running_mean.RunningMean` up to and with this step. mean_of: losses in it; in no file.
    """

    group = "train"
    file = METRICS_FILE

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
    tokens: int = 0
    token_pairs: int = 0
    timesteps: tuple[float, ...] = ()
    sample_losses: tuple[float, ...] = ()
    clip_limit: float | None = None
    loss_mean: float | None = None
    mean_of: int = 0

    def as_json(self) -> str:
        """One line of metrics.jsonl; JSON has no word for numbers that are not finite, the hex fields have."""
        values = asdict(self)
        del values["mean_of"]
        if self.clip_limit is None:
            del values["clip_limit"]
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

    def with_mean(self, recent: RunningMean) -> StepMetrics:
        """The same with the mean of the last losses, to which this one is added."""
        recent.add(self.loss)
        return replace(self, loss_mean=recent.value, mean_of=recent.count)

    def numbers(self) -> Mapping[str, float]:
        """All that is worth a curve."""
        names = (
            "loss",
            "grad_norm",
            "clip_limit",
            "lr",
            "tokens_per_s",
            "tflops",
            "peak_memory_gb",
            "step_time_s",
            "loss_mean",
        )
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    def line(self) -> None:
        """None: a step a second is too much, and what is left of the run is known to who asks `line_of`."""

    def line_of(self, total_steps: int, eta_s: float) -> str:
        """Line for people about one step in a run of `total_steps` that has `eta_s` seconds left."""
        mean = "" if self.loss_mean is None else f" (mean of {self.mean_of}: {self.loss_mean:.4f})"
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
class StepEvaluation(Record):
    """One line of evaluation.jsonl: the loss on held-out features (`mm.train.callbacks.evaluation`) after a step.

    Attributes:
        loss: mean squared error of the velocity, unweighted, over samples and timesteps.
        loss_at: over samples, at each timestep. num_samples: held out.
    """

    group = "evaluation"
    file = EVALUATION_FILE

    loss: float
    loss_at: dict[int, float]
    num_samples: int

    def numbers(self) -> Mapping[str, float]:
        """The loss and those at each timestep."""
        return {"loss": self.loss, **{f"loss_at_{timestep:03d}": loss for timestep, loss in self.loss_at.items()}}

    def line(self) -> str:
        """The mean alone."""
        return f"step {self.step} | held-out loss {self.loss:.4f} of {self.num_samples} samples"

    @classmethod
    def from_json(cls, line: str) -> StepEvaluation:
        """Read a line; raises as `StepMetrics.from_json`."""
        values = json.loads(line)
        return cls(**{**values, "loss_at": {int(timestep): loss for timestep, loss in dict(values["loss_at"]).items()}})


@dataclass(frozen=True)
class RenderedClips(Record):
    """Clips that were rendered with the model as it is after a step.

    Attributes:
        paths: of all of them. clips: those that this node sees, by name, uint8 [F, H, W, 3]. fps: of the clips.
    """

    group = "validation"

    paths: Sequence[Path]
    clips: Mapping[str, Tensor]
    fps: int

    def line(self) -> str:
        """Line for people: how many there are, and where."""
        return f"step {self.step} | {len(self.paths)} clips in {self.paths[0].parent}"


@dataclass(frozen=True)
class ParameterNorms(Record):
    """One line of norms.jsonl: L2 norms of whole parameters, in the model's order.

    Attributes:
        gradients: before clipping, by native names. weights: of fp32 masters, after the step.
        model: the expert that the step has trained; empty where one model is trained.
    """

    group = "norms"
    file = NORMS_FILE

    gradients: Mapping[str, float]
    weights: Mapping[str, float]
    model: str = ""

    def as_json(self) -> str:
        """The line; null for a norm that is not finite."""
        norms = {
            kind: {name: norm if math.isfinite(norm) else None for name, norm in getattr(self, kind).items()}
            for kind in ("gradients", "weights")
        }
        return json.dumps({"step": self.step, **({"model": self.model} if self.model else {}), **norms})

    def numbers(self) -> Mapping[str, float]:
        """A curve for each: `gradients/blocks.0.self_attn.q.weight`."""
        start = f"{self.model}/" if self.model else ""
        kinds = {"gradients": self.gradients, "weights": self.weights}
        return {f"{start}{kind}/{name}": norm for kind, norms in kinds.items() for name, norm in norms.items()}

    def line(self) -> None:
        """None: a number for each parameter is too much."""


@dataclass(frozen=True)
class LiveSamples(Record):
    """One line of live.jsonl: samples of a step by where their features came from, of all replicas.

    Attributes:
        encoded: made in this step. kept: of these, those that were kept; the others are made again when they come
            again. read: those that had been kept before.
    """

    group = "live"
    file = LIVE_FILE

    encoded: int
    kept: int
    read: int

    def numbers(self) -> Mapping[str, float]:
        """All of them."""
        return {"encoded": self.encoded, "kept": self.kept, "read": self.read}

    def line(self) -> None:
        """None: the last line of the run says it for all steps."""


def read_live(path: Path) -> list[LiveSamples]:
    """Read live.jsonl as `read_metrics` reads its file, with the same errors."""
    return _read_lines(path, lambda line: LiveSamples(**json.loads(line)))


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


def drop_repeated_steps(folder: Path, first_step: int) -> list[StepMetrics]:
    """Take a run's files back to where its checkpoint is: lines from `first_step` on are removed, as they come again.

    Returns:
        The rows of metrics.jsonl that are kept.

    Raises:
        CheckpointError: CKPT-070 for a damaged file.
    """
    before = _keep_before(folder / METRICS_FILE, read_metrics, first_step)
    _keep_before(folder / EVALUATION_FILE, read_evaluations, first_step)
    _keep_before(folder / LIVE_FILE, read_live, first_step)
    return before


StepRowT = TypeVar("StepRowT", bound=Record)


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
