"""Messages of saving and loading: gather, broadcast, barrier. Objects travel as JSON, never pickled."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist

from mm.checkpoint.files import writing_errors
from mm.errors import CheckpointError, ConfigError, DataError, MMError, Problem, ResumeError, raise_all


class Comm(Protocol):
    """The ranks that save or load together. Objects are whatever JSON can hold."""

    @property
    def rank(self) -> int:
        """This process among `world_size`."""

    @property
    def world_size(self) -> int:
        """Number of processes."""

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Every rank's object, in rank order, on every rank."""

    def broadcast_object(self, obj: Any) -> Any:
        """Rank 0's object on every rank; what the others pass is ignored."""

    def barrier(self) -> None:
        """Wait until every rank is here."""


class SingleProcess:
    """A job of one process."""

    rank = 0
    world_size = 1

    def all_gather_object(self, obj: Any) -> list[Any]:
        """A list of one."""
        return [obj]

    def broadcast_object(self, obj: Any) -> Any:
        """The object itself."""
        return obj

    def barrier(self) -> None:
        """Nobody to wait for."""


class ProcessGroupComm:
    """`Comm` over a torch.distributed group. JSON text travels as byte tensors.

    Args:
        group: the ranks; None is the default group. Use a gloo group, so that saving never waits on device streams.
        device: where the byte tensors live; a backend without CPU tensors needs its own device here.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, device: torch.device | None = None) -> None:
        self._group = group
        self._device = device or torch.device("cpu")
        self.rank: int = dist.get_rank(group)
        self.world_size: int = dist.get_world_size(group)

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Every rank's object; shorter texts are padded to the longest, which is what a tensor collective needs."""
        mine = self._encode(obj)
        lengths = [torch.zeros(1, dtype=torch.int64, device=self._device) for _ in range(self.world_size)]
        dist.all_gather(lengths, torch.tensor([mine.numel()], device=self._device), group=self._group)
        longest = int(max(length.item() for length in lengths))
        padded = torch.zeros(longest, dtype=torch.uint8, device=self._device)
        padded[: mine.numel()] = mine
        gathered = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(gathered, padded, group=self._group)
        return [self._decode(t[: int(n.item())]) for t, n in zip(gathered, lengths, strict=True)]

    def broadcast_object(self, obj: Any) -> Any:
        """Rank 0's object."""
        source = 0 if self._group is None else dist.get_global_rank(self._group, 0)
        text = self._encode(obj) if self.rank == 0 else torch.empty(0, dtype=torch.uint8, device=self._device)
        length = torch.tensor([text.numel()], dtype=torch.int64, device=self._device)
        dist.broadcast(length, source, group=self._group)
        if self.rank != 0:
            text = torch.empty(int(length.item()), dtype=torch.uint8, device=self._device)
        dist.broadcast(text, source, group=self._group)
        return self._decode(text)

    def barrier(self) -> None:
        """An all-gather of nothing: works on every backend alike, and leaves no device chosen behind."""
        self.all_gather_object(None)

    def _encode(self, obj: Any) -> torch.Tensor:
        text = json.dumps(obj, allow_nan=False).encode()
        return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(self._device)

    def _decode(self, text: torch.Tensor) -> Any:
        return json.loads(bytes(text.cpu().numpy()))


def on_every_rank(comm: Comm, action: Callable[[], Any]) -> list[Any]:
    """Run `action` on every rank and return all results (JSON) on every rank.

    A rank that fails does not leave the others waiting: all raise the error of the first rank that failed.

    Raises:
        MMError: what the first failing rank raised; CKPT-033 on the other ranks when it was no `MMError`.
    """
    result, failure = _attempt(action)
    reports = comm.all_gather_object(_report(result, failure))
    if failure is not None and not isinstance(failure, MMError):
        raise failure
    for rank, report in enumerate(reports):
        _raise_reported(report, rank)
    return [report["result"] for report in reports]


def on_rank_zero(comm: Comm, action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0 and return its result (JSON) on every rank; its error is raised on every rank."""
    result, failure = _attempt(action) if comm.rank == 0 else (None, None)
    report = comm.broadcast_object(_report(result, failure))
    if failure is not None:
        raise failure
    _raise_reported(report, 0)
    return report["result"]


def _attempt(action: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        with writing_errors():
            return action(), None
    except Exception as error:
        return None, error


def _report(result: Any, failure: Exception | None) -> dict[str, Any]:
    if failure is None:
        return {"result": result}
    if isinstance(failure, MMError):
        problems = [[p.id, p.message, p.remedy] for p in failure.problems]
        return {"problems": problems, "type": type(failure).__name__}
    return {"problems": None, "text": f"{type(failure).__name__}: {failure}"}


def _raise_reported(report: dict[str, Any], rank: int) -> None:
    if "result" in report:
        return
    if report["problems"] is None:
        raise CheckpointError(
            "CKPT-033", f"Rank {rank} failed with {report['text']}.", "See the traceback in that rank's output."
        )
    types = {kind.__name__: kind for kind in (ConfigError, DataError, CheckpointError, ResumeError)}
    raise_all(types.get(report["type"], CheckpointError), [Problem(*problem) for problem in report["problems"]])
