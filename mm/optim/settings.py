"""Settings of the update of weights: the optimizer, its numbers, the schedule, clipping, the average."""

from __future__ import annotations

from dataclasses import dataclass

from mm.config.optimizer import OptimizerName


@dataclass(frozen=True)
class UpdateSettings:
    """An optimizer, its schedule, with lengths in samples, and the average; the fields are the flags of the same names.

    Attributes:
        adam_eps: None for an optimizer without.
        initial_clip_ratio, abnormal_clip_samples: see `mm.optim.clipping`; None where the limit never changes.
        fused: update each parameter in one kernel, where the optimizer has one. Else an accelerator may compute step by
            step on lists of all parameters, with a temporary of the whole shard, and the CPU on one parameter after the
            other. The CPU's kernel is not asked for in training: its last bits depend on where a shard begins, and so
            on the layout.
    """

    lr: float
    min_lr: float
    lr_decay_style: str
    lr_warmup_init: float
    warmup_samples: int
    decay_samples: int
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_eps: float | None
    clip_grad: float
    initial_clip_ratio: float = 1.0
    abnormal_clip_samples: int | None = None
    ema_decay: float | None = None
    fused: bool = False
    optimizer: OptimizerName = "adamw"

    @property
    def betas(self) -> tuple[float, float]:
        """Pair of beta1 and beta2."""
        return self.adam_beta1, self.adam_beta2
