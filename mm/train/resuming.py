"""Going on from a checkpoint: steps must mean what they meant when it was made, unless the user says otherwise."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mm.config.run.training import TrainingRun
from mm.config.step import Change, StepSettings, changes, trains_the_same
from mm.errors import Problem
from mm.optim.optimizer import learning_rates
from mm.optim.settings import UpdateSettings

logger = logging.getLogger(__name__)

_DENSE = 1000  # steps to come whose rates are compared one by one, and as many spread over the others


def update_settings(steps: StepSettings, *, fused: bool = False) -> UpdateSettings:
    """The optimizer, its schedule in samples and the average, as the settings of a run have them."""
    schedule, samples = steps.schedule, steps.global_batch_size
    numbers = dict(steps.optimizer)
    start, ratio = numbers.pop("abnormal_clip_start"), numbers.pop("initial_clip_ratio")
    return UpdateSettings(
        lr=schedule.lr,
        min_lr=schedule.min_lr,
        lr_decay_style=schedule.lr_decay_style,
        lr_warmup_init=schedule.lr_warmup_init,
        warmup_samples=schedule.lr_warmup_iters * samples,
        decay_samples=schedule.lr_decay_iters * samples,
        **numbers,
        initial_clip_ratio=1.0 if ratio is None else ratio,
        abnormal_clip_samples=None if start is None else start * samples,
        ema_decay=steps.ema_decay,
        fused=fused,
    )


@dataclass(frozen=True)
class Resuming:
    """A run that goes on from checkpoints.

    Attributes:
        steps: what its steps mean. sections: what was asked for. dp_size: replicas.
        reports: whether this rank logs.
    """

    steps: StepSettings
    sections: TrainingRun
    dp_size: int
    reports: bool

    def problems(self, path: Path, before: StepSettings | None, step: int, consumed_samples: int) -> list[Problem]:
        """The changes that make the steps to come other ones and that the user did not ask for; others are logged.

        Args:
            path: the checkpoint. before: what it records; None in those of earlier versions.
            step, consumed_samples: where it stands.

        Returns:
            One CFG-160 for each value, with both, CFG-161 where the samples to come begin inside of a micro-batch, and
            CFG-423 alone where other parameters were trained.
        """
        if not trains_the_same(before, self.steps):
            return [self._other_parameters(path, before)]
        if before is None:
            self._warn(
                "%s does not record its batch, schedule, objective and data; whether they have changed is not known",
                path,
            )
            return list(self._begins_between(path, consumed_samples))
        if step >= self.sections.training.steps:
            return []
        refused = list[Problem]()
        if before.data.order == self.steps.data.order:  # another plan is a change of its own, and begins anew
            refused += self._begins_between(path, consumed_samples)
        for change in self._in_effect(before, step, consumed_samples):
            text = f"{change}{self._consequence(change, before, step, consumed_samples)}"
            if change.kind is None or change.kind in self.sections.checkpoint.resume_changed:
                self._warn("going on from %s with a change: %s", path, text)
            else:
                refused.append(
                    Problem("CFG-160", f"Resuming {path} would change its steps: {text}.", self._remedy(change))
                )
        return refused

    def _other_parameters(self, path: Path, before: StepSettings | None) -> Problem:
        """CFG-423: what was frozen has neither masters nor the optimizer's state, so nothing can allow the change."""
        words = self.sections.origins
        word, load, save = (words[of].name for of in ("training.trainable", "checkpoint.load", "checkpoint.save"))
        then, now = (None if side is None else side.trainable for side in (before, self.steps))
        was, today = (" ".join(one) if one else "absent" for one in (then, now))
        keep = f"Give {word} {' '.join(then)}" if then else f"Remove {word}"
        return Problem(
            "CFG-423",
            f"Resuming {path} would train other parameters: {word} was {was}, and is {today}.",
            f"{keep} to go on as before; or start from its weights alone, with {load}, "
            f"{words['checkpoint.weights_only'].with_value(True)} and a new {save}.",
        )

    def _begins_between(self, path: Path, consumed: int) -> Iterator[Problem]:
        """CFG-161 where whole micro-batches do not make up the samples that were trained on.

        The next one would begin before or after them, and so take samples twice or leave some out.
        """
        size, word = self.sections.data.micro_batch_size, self.sections.origins["data.micro_batch_size"]
        if consumed % size:
            fits = max(one for one in range(1, size) if consumed % one == 0)
            message = f"{path} stands at sample {consumed}, of which micro-batches of {size} are no whole number"
            remedy = f"Give {word.with_value(fits)}, or another number that divides {consumed}."
            yield Problem("CFG-161", f"{message}: some samples would come twice.", remedy)

    def _in_effect(self, before: StepSettings, step: int, consumed: int) -> Iterator[Change]:
        then, now = (self._rates(steps, step, consumed) for steps in (before, self.steps))
        for change in changes(before, self.steps, self.sections.origins):
            if change.kind == "average" and not self.sections.checkpoint.load_average:
                continue
            if change.kind == "schedule" and then == now:
                continue  # such as a longer run at a constant rate
            yield change

    def _rates(self, steps: StepSettings, step: int, consumed: int) -> list[float]:
        """The learning rates of the steps to come under some settings."""
        left = self.sections.training.steps - step
        stride = max(1, (left - _DENSE) // _DENSE)
        offsets = [*range(min(left, _DENSE)), *range(_DENSE, left, stride), left - 1]
        samples = [consumed + offset * steps.global_batch_size for offset in offsets]
        return learning_rates(update_settings(steps), samples)

    def _consequence(self, change: Change, before: StepSettings, step: int, consumed: int) -> str:
        if change.kind not in ("batch", "schedule"):
            return ""
        (then, *_, then_last), (now, *_, now_last) = (
            self._rates(steps, step, consumed) for steps in (before, self.steps)
        )
        if (then, then_last) == (now, now_last):
            return ""
        return (
            f" (learning rate of step {step + 1}: {then:.6g}, now {now:.6g}; of step {self.sections.training.steps}: "
            f"{then_last:.6g}, now {now_last:.6g})"
        )

    def _remedy(self, change: Change) -> str:
        words = self.sections.origins
        start = f"{words['checkpoint.load'].name} and {words['checkpoint.weights_only'].with_value(True)}"
        keep = f"Give {change.name.partition(' (default: ')[0]} {change.before} to go on as before"
        if change.kind == "batch":
            keep = self._keep_batch(int(change.before))
        elif change.name.startswith("the data set"):
            keep = f"Name the features that it was trained on, or start from its weights alone with {start}"
        elif change.kind == "precision":
            keep = f"Let {change.name} be {change.before} to go on as before"
        elif change.kind in ("objective", "data"):
            keep = f"Set {change.name} to {change.before} to go on as before"
        anew = ""
        if change.name == words["optimizer.name"].name:  # no state fits the other one
            anew = f" and {words['checkpoint.load_optimizer'].with_value(False)}"
        changed = words["checkpoint.resume_changed"].name
        return f"{keep}; to change it on purpose, add {changed} {change.kind}{anew}."

    def _keep_batch(self, samples: int) -> str:
        """The values that keep a global batch on the replicas that there are."""
        words, size = self.sections.origins, self.sections.data.micro_batch_size
        batch = words["data.global_batch_size"].with_value(samples)
        if samples % self.dp_size:
            return (
                f"Start it on a number of replicas that divides {samples}, which {self.dp_size} does not, with {batch}"
            )
        mine = samples // self.dp_size
        micro_batch = max(one for one in range(1, size + 1) if mine % one == 0)
        part = words["data.micro_batch_size"]
        smaller = "" if micro_batch == size else f" {part.with_value(micro_batch)}"
        script = "" if micro_batch == size else f"MBS={micro_batch} "
        scripts = "" if part.file else f" (in the scripts {script}GRAD_ACC_STEP={mine // micro_batch})"
        return f"Give {batch}{smaller}{scripts} to go on as before"

    def _warn(self, text: str, *values: object) -> None:
        if self.reports:
            logger.warning(text, *values)
