"""Refuses, by name, ranks that were started with another configuration or other code than rank 0.

Ranks that disagree do not fail: they hang in a collective, or train with two learning rates. So the ranks compare
themselves over the job's key-value store, before any process group exists. A rank exchanges a few short values with the
store, whatever the size of the job; texts of the length of a configuration travel only when there is a difference.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import platform
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mm.errors import ConfigError, Problem, raise_all
from mm.supervise.messages import Messages

SAME_START = "Start every node from the same checkout and environment, with the same script, flags and files."
CHECK_NODES = (
    "Read the logs of the missing ranks; check NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT and MM_JOB_SECRET on every "
    "node, and that no firewall closes the port."
)
ALL_CAME = "all came"
LEAVING_S = 10  # for the slowest rank to read why the job ends; a rank that is gone must not keep the others longer
NAMED = 3  # differences named for each part, and groups of ranks


def fingerprint(config: Mapping[str, Any]) -> dict[str, str]:
    """Texts, by name, that must be equal on all ranks.

    Args:
        config: parts of the configuration by name, such as `flags` or `pretrain_model.json`: a mapping or list that
            JSON can hold, or the text of a file. JSON is compared by value, other text line by line.

    Returns:
        The parts of `config`, and of this process `code` (a digest for each file of this package) and the versions of
        torch, megatron-core and Python.
    """
    parts = {
        **config,
        "code": file_digests(Path(__file__).parents[1]),
        "torch": torch.__version__,
        "megatron-core": importlib.metadata.version("megatron-core"),
        "python": platform.python_version(),
    }
    return {name: json.dumps(_parsed(value), sort_keys=True) for name, value in parts.items()}


def file_digests(package: Path) -> dict[str, str]:
    """SHA-256 (its first 12 hex digits) of every Python file of a package, by path from the package's parent."""
    return {
        path.relative_to(package.parent).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        for path in sorted(package.rglob("*.py"))
    }


def agree(messages: Messages, rank: int, world_size: int, mine: Mapping[str, str], timeout: datetime.timedelta) -> None:
    """Return on every rank when all have come and equal rank 0; else raise on every rank that has come.

    Args:
        messages: of the ranks of this start, with names that no `agree` has used before (a store's prefix a start).
        mine: this rank's `fingerprint`.
        timeout: how long a rank waits for the others.

    Raises:
        ConfigError: CFG-090 when ranks differ from rank 0; names the ranks, their hosts, what differs and both values.
            CFG-091 when ranks have not come within the timeout, or the store was lost.
    """
    try:
        messages.append("come", [rank, socket.gethostname()])
        messages.count("number come", 1)
        mine = {**mine, "number of processes": json.dumps(world_size)}
        _compare_with_rank_0(messages, rank, mine, world_size, timeout)
        if messages.count("compared", 1) >= world_size:
            messages.claim("verdict", ALL_CAME)
        verdict = _wait(messages, "verdict", world_size, timeout) or messages.read("verdict")
        problems = _differing(messages)
        if verdict != ALL_CAME:
            problems.append(Problem("CFG-091", str(verdict), CHECK_NODES))
        if problems:
            _leave_together(messages)
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError("CFG-091", f"Rank {rank} lost the job's store while joining: {reason}", CHECK_NODES) from None
    raise_all(ConfigError, problems)


def _compare_with_rank_0(
    messages: Messages, rank: int, mine: Mapping[str, str], world_size: int, timeout: datetime.timedelta
) -> None:
    text = json.dumps(mine)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    if rank == 0:
        messages.write("text", text)
        messages.write("host", socket.gethostname())
        messages.write("digest", digest)
        return
    of_rank_0 = _wait(messages, "digest", world_size, timeout)
    if of_rank_0 in (None, digest):
        return
    # Ranks of one node usually differ alike: what differs is written once for all that have this digest.
    messages.claim(f"differs {digest}", "; ".join(differences(mine, json.loads(messages.wait("text", timeout)))))
    messages.append("differing", [rank, socket.gethostname(), digest])


def differences(mine: Mapping[str, str], of_rank_0: Mapping[str, str]) -> list[str]:
    """One text for each part of two fingerprints that differs: what differs in it, with both values."""
    found = []
    for part in {**of_rank_0, **mine}:
        here, there = (dict(_leaves(json.loads(side.get(part, "{}")))) for side in (mine, of_rank_0))
        unequal = [name for name in {**there, **here} if here.get(name) != there.get(name)]
        named = ", ".join(
            f"{name} is {a}, on rank 0 {b}"
            for name in unequal[:NAMED]
            for a, b in [_excerpts(here.get(name, "absent"), there.get(name, "absent"))]
        )
        if unequal:
            found.append(f"{part}: {named}{_and_more(len(unequal) - NAMED)}")
    return found


def _wait(messages: Messages, name: str, world_size: int, timeout: datetime.timedelta) -> Any | None:
    """Wait for a message. The first rank to run out of time decides for all: it claims the verdict that ranks miss.

    A later one reads that verdict at once, so that no two ranks think differently about who has come.
    """
    try:
        return messages.wait(name, timeout)
    except dist.DistStoreError:
        came = _roll(messages, "come")
        missing = sorted(set(range(world_size)) - {rank for rank, _ in came})
        what = f"{_ranks(missing)} of {world_size} did not come" if missing else "some ranks came and then stopped"
        found = f"Within {timeout.total_seconds():g} s {what}. There: {_ranks_and_hosts(came)}."
        messages.claim("verdict", found)
        return None


def _differing(messages: Messages) -> list[Problem]:
    """One problem for each group of ranks that differ from rank 0 alike."""
    groups: dict[str, list[tuple[int, str]]] = {}
    for rank, host, digest in sorted(messages.roll("differing")):
        groups.setdefault(digest, []).append((rank, host))
    return [
        Problem(
            "CFG-090",
            f"Started differently from rank 0 ({messages.read('host')}): {_ranks_and_hosts(group)}, with "
            f"{messages.read(f'differs {digest}')}{_and_more(len(groups) - NAMED, 'kinds of difference')}.",
            SAME_START,
        )
        for digest, group in list(groups.items())[:NAMED]
    ]


def _leave_together(messages: Messages) -> None:
    """Wait until all that have come know why the job ends: the first to leave may take the store with it."""
    if messages.count("left", 1) >= messages.count("number come", 0):
        messages.claim("all left", True)
    with contextlib.suppress(dist.DistError):
        messages.wait("all left", datetime.timedelta(seconds=LEAVING_S))


def _roll(messages: Messages, name: str) -> list[tuple[int, str]]:
    """The entries (rank, host) of a roll, by rank."""
    return sorted((rank, host) for rank, host in messages.roll(name))


def _parsed(value: Any) -> Any:
    """The value that is compared: of text that holds a JSON object or list its value, of other text its lines."""
    if not isinstance(value, str):
        return value
    with contextlib.suppress(ValueError):
        parsed = json.loads(value)
        if isinstance(parsed, (dict, list)):
            return parsed
    lines = value.splitlines()
    return {f"line {number}": line for number, line in enumerate(lines, 1)} if len(lines) > 1 else value


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every value that contains no other, as JSON, by its path: `predictor.num_layers`, `dataset[0].path`."""
    if isinstance(value, dict) and (value or not name):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{name}[{index}]")
    else:
        yield name or "it", json.dumps(value, ensure_ascii=False)


def _excerpts(a: str, b: str) -> tuple[str, ...]:
    """Text of both values as they are, or of long ones the place where they begin to differ."""
    if max(len(a), len(b)) <= 120:
        return a, b
    equal = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    start = max(0, equal - 40)
    return tuple(f"{'...' * (start > 0)}{x[start : start + 100]}{'...' * (len(x) > start + 100)}" for x in (a, b))


def _ranks_and_hosts(group: list[tuple[int, str]]) -> str:
    hosts = sorted({host for _, host in group})
    return f"{_ranks([rank for rank, _ in group])} ({', '.join(hosts[:NAMED])}{_and_more(len(hosts) - NAMED)})"


def _ranks(ranks: list[int]) -> str:
    """`rank 3`, or `ranks 0 to 3, 8, 12 to 15`, from ranks in order."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    shown = 2 * NAMED
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(texts[:shown])}{_and_more(sum(map(len, runs[shown:])))}"


def _and_more(number: int, of_what: str = "") -> str:
    return f" and {number} more {of_what}".rstrip() if number > 0 else ""
