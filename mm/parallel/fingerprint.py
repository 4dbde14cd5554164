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
from torch.distributed.distributed_c10d import Store

from mm.errors import ConfigError, Problem, raise_all

SAME_START = "Start every node from the same checkout and environment, with the same script, flags and files."
CHECK_NODES = (
    "Read the logs of the missing ranks; check NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT on every node, and that "
    "no firewall closes the port."
)
ALL_CAME = "all came"
LEAVING_S = 10  # for the slowest rank to read why the job ends; a rank that is gone must not keep the others longer
NAMED = 3  # differences named for each part, and groups of ranks


def fingerprint(config: Mapping[str, Any]) -> dict[str, str]:
    """What must be equal on all ranks, as texts by name.

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


def agree(store: Store, rank: int, world_size: int, mine: Mapping[str, str], timeout: datetime.timedelta) -> None:
    """Return on every rank when all have come and equal rank 0; else raise on every rank that has come.

    Args:
        store: shared by the ranks of this start and not used for an `agree` before (a `PrefixStore` for each start).
        mine: this rank's `fingerprint`.
        timeout: how long a rank waits for the others.

    Raises:
        ConfigError: CFG-090 when ranks differ from rank 0; names the ranks, their hosts, what differs and both values.
            CFG-091 when ranks have not come within the timeout, or the store was lost.
    """
    try:
        _append(store, "come", f"{rank} {socket.gethostname()}")
        store.add("number come", 1)
        _compare_with_rank_0(store, rank, {**mine, "number of processes": json.dumps(world_size)}, world_size, timeout)
        if store.add("compared", 1) >= world_size:
            store.compare_set("verdict", "", ALL_CAME)
        _wait(store, "verdict", world_size, timeout)
        problems = _differing(store)
        verdict = store.get("verdict").decode()
        if verdict != ALL_CAME:
            problems.append(Problem("CFG-091", verdict, CHECK_NODES))
        if problems:
            _leave_together(store)
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError("CFG-091", f"Rank {rank} lost the job's store while joining: {reason}", CHECK_NODES) from None
    raise_all(ConfigError, problems)


def _compare_with_rank_0(
    store: Store, rank: int, mine: Mapping[str, str], world_size: int, timeout: datetime.timedelta
) -> None:
    text = json.dumps(mine)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    if rank == 0:
        store.set("text", text)
        store.set("host", socket.gethostname())
        store.set("digest", digest)
        return
    if not _wait(store, "digest", world_size, timeout) or store.get("digest").decode() == digest:
        return
    # Ranks of one node usually differ alike: what differs is written once for all that have this digest.
    store.set(f"differs {digest}", "; ".join(differences(mine, json.loads(store.get("text")))))
    _append(store, "differing", f"{rank} {socket.gethostname()} {digest}")


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


def _wait(store: Store, key: str, world_size: int, timeout: datetime.timedelta) -> bool:
    """Wait for a key. The first rank to run out of time decides for all: it writes the verdict that ranks are missing.

    A later one reads that verdict at once, so that no two ranks think differently about who has come.
    """
    try:
        store.wait([key], timeout)
    except dist.DistStoreError:
        came = _roll(store, "come")
        missing = sorted(set(range(world_size)) - {rank for rank, _ in came})
        what = f"{_ranks(missing)} of {world_size} did not come" if missing else "some ranks came and then stopped"
        found = f"Within {timeout.total_seconds():g} s {what}. There: {_ranks_and_hosts(came)}."
        store.compare_set("verdict", "", found)
        return False
    return True


def _differing(store: Store) -> list[Problem]:
    """One problem for each group of ranks that differ from rank 0 alike."""
    if not store.check(["differing"]):
        return []
    groups: dict[str, list[tuple[int, str]]] = {}
    for rank, rest in _roll(store, "differing"):
        host, digest = rest.split()
        groups.setdefault(digest, []).append((rank, host))
    host_of_rank_0 = store.get("host").decode()
    return [
        Problem(
            "CFG-090",
            f"Started differently from rank 0 ({host_of_rank_0}): {_ranks_and_hosts(group)}, with "
            f"{store.get(f'differs {digest}').decode()}{_and_more(len(groups) - NAMED, 'kinds of difference')}.",
            SAME_START,
        )
        for digest, group in list(groups.items())[:NAMED]
    ]


def _leave_together(store: Store) -> None:
    """Wait until all that have come know why the job ends: the first to leave may take the store with it."""
    if store.add("left", 1) >= store.add("number come", 0):
        store.set("all left", "")
    with contextlib.suppress(dist.DistError):
        store.wait(["all left"], datetime.timedelta(seconds=LEAVING_S))


def _append(store: Store, key: str, line: str) -> None:
    store.append(key, f"{line}\n")  # type: ignore[attr-defined]  # missing from torch's stubs


def _roll(store: Store, key: str) -> list[tuple[int, str]]:
    """The lines that ranks have appended to a key, as (rank, rest of the line), by rank."""
    lines = store.get(key).decode().splitlines()
    return sorted((int(rank), rest) for rank, rest in (line.split(maxsplit=1) for line in lines))


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
    """Both values as they are, or of long ones the place where they begin to differ."""
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
