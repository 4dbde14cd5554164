"""Compares the weights that replicas hold, bit for bit (`--check-replica-hash-interval`)."""

from __future__ import annotations

from collections.abc import Sequence

from mm.optim.replica_hash import require_equal_replicas
from mm.train.callbacks.base import Callback, Every, StepDone
from mm.train.records import Record


class ReplicaHash(Callback):
    """Ends the run where a device or a link has changed bits."""

    def __init__(self, interval: int) -> None:
        self.every = Every(interval)

    def after_step(self, done: StepDone) -> Sequence[Record]:
        """Compare.

        Raises:
            ReplicaError: NUM-003, on every rank.
        """
        for model in done.models.each():
            require_equal_replicas(model.parallel, done.step)
        return ()
