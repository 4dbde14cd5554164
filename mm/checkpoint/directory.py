"""The folder of a run's checkpoints: names, the tracker, which checkpoint is the latest, and what may be deleted.

<root>/iter_0001000/                       a committed checkpoint: manifest.json and its shards, or files in the MM
                                           format with mm_record.json beside the first of them
<root>/iter_0001000/.tracker_done          the tracker has named it, so a tracker naming an older one is a choice; in
                                           the MM format it is beside mm_record.json
<root>/latest_checkpointed_iteration.txt   the tracker, as Megatron writes it: the step as text
<root>/.tmp-iter_0001000-<id>/             being written
<root>/.replaced-iter_0001000-<id>/        the older checkpoint of a step that is being saved again
<root>/.trash-iter_0000500-<id>/           being deleted
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from uuid import uuid4

from mm.checkpoint import fault
from mm.checkpoint.comm import Comm, SingleProcess, on_every_rank, on_rank_zero
from mm.checkpoint.files import remove_folder, replace_text, sync_folder
from mm.checkpoint.lock import DEFAULT_TIMES, Lock, Times, locked
from mm.checkpoint.record import Kind, files_of, kind_of, record_folder
from mm.checkpoint.safetensor_file import hash_file
from mm.config.run.experts import HIGH, LOW
from mm.config.run.origins import Origins
from mm.errors import CheckpointError, ResumeError

log = logging.getLogger(__name__)

TRACKER_NAME = "latest_checkpointed_iteration.txt"
MARKER_NAME = ".tracker_done"
Policy = Literal["newest", "strict"]
Verify = Literal["size", "full"]

_COMMITTED = re.compile(r"iter_(\d{7})|\.replaced-iter_(\d{7})-[0-9a-f]{12}")
_LEFTOVER = re.compile(rf"\.(tmp|trash)-(iter_\d{{7}}|{re.escape(TRACKER_NAME)}|lock)-[0-9a-f]{{12}}")


@dataclass(frozen=True)
class Candidate:
    """A folder whose name says that it is a committed checkpoint; whether it is complete is another question."""

    step: int
    path: Path

    @property
    def announced(self) -> bool:
        """True once the tracker has named it."""
        return (record_folder(self.path) / MARKER_NAME).exists()


def folder_name(step: int) -> str:
    """`1000` -> `iter_0001000`. ValueError outside the seven digits that Megatron's layout has."""
    if not 0 <= step < 10**7:
        raise ValueError(f"step {step} does not fit into seven digits")
    return f"iter_{step:07d}"


def step_of(folder: Path) -> int | None:
    """The inverse of `folder_name`; None for a folder of another name."""
    match = re.fullmatch(r"iter_(\d{7})", folder.name)
    return None if match is None else int(match[1])


def candidates(root: Path) -> list[Candidate]:
    """Checkpoint folders in `root`, newest first; a step's own folder comes before one that it replaces."""
    found = []
    for entry in root.iterdir() if root.is_dir() else ():
        match = _COMMITTED.fullmatch(entry.name)
        if match and entry.is_dir():
            found.append(Candidate(int(match[1] or match[2]), entry))
    return sorted(found, key=lambda c: (c.step, not c.path.name.startswith(".")), reverse=True)


def find_latest(
    root: Path,
    policy: Policy = "newest",
    *,
    verify: Verify = "size",
    comm: Comm | None = None,
    beside: Sequence[Path] = (),
) -> Path | None:
    """The checkpoint to resume from, the same on every rank, or None where nothing was ever committed.

    It is the newest complete one, unless the user has written an older step into the tracker.

    Args:
        root: the folder of the run's checkpoints; it need not exist.
        policy: "newest" falls back to the next older one when one is damaged, with a warning; "strict" raises.
        verify: "size" checks the manifest and the files' sizes; "full" also the files' hashes, shared among the ranks.
        comm: the ranks.
        beside: folders of the same run, whose checkpoint of the same step must be complete too.

    Raises:
        CheckpointError: CKPT-013 when there are checkpoints and none is complete, or, if strict, when the one to use
            is damaged or the tracker is unusable; CKPT-131 where no step is in all the folders although one has some.
    """
    comm = comm or SingleProcess()
    names: list[list[str]] = on_rank_zero(comm, lambda: _of_one_step([root, *beside], policy))
    for name, *others in names:
        folders = [root / name, *(folder / other for folder, other in zip(beside, others, strict=True))]
        problem = next(filter(None, (_problem(folder, verify, comm) for folder in folders)), None)
        if problem is None:
            return root / name
        if policy == "strict":
            raise _unusable(root, problem)
        if comm.rank == 0:
            log.warning("%s Trying the one before it.", problem)
    if names:
        raise _unusable(root, f"None of the {len(names)} checkpoints in {root} is complete.")
    return None


def _of_one_step(roots: Sequence[Path], policy: Policy) -> list[list[str]]:
    """Names of the candidates of each step that is in all the folders, one for each folder, best first.

    A run that was killed between two folders has a newer one in the first: it goes on from the step before.

    Raises:
        CheckpointError: CKPT-131.
    """
    first, *others = [_in_order(root, policy) for root in roots]
    if not others:
        return [[one.path.name] for one in first]
    by_step = [{one.step: one.path.name for one in reversed(found)} for found in others]
    common = [
        [one.path.name, *(of[one.step] for of in by_step)] for one in first if all(one.step in of for of in by_step)
    ]
    steps = [sorted({one.step for one in found}) for found in (first, *others)]
    if not common and any(steps):
        told = "; ".join(
            f"{root} has {', '.join(map(str, of)) or 'none'}" for root, of in zip(roots, steps, strict=True)
        )
        raise CheckpointError(
            "CKPT-131",
            f"No step is in both experts' folders: {told}.",
            "Restore what is missing, or move both folders away to start anew.",
        )
    if len(set(map(tuple, steps))) > 1:
        log.warning("The folders %s hold different steps; only those in all of them count.", ", ".join(map(str, roots)))
    return common


def require_whole(path: Path, verify: Verify, comm: Comm | None = None) -> None:
    """Check one checkpoint folder that the user has named; arguments as for `find_latest`.

    Raises:
        CheckpointError: CKPT-012 when it is damaged, the same on every rank.
    """
    problem = _problem(path, verify, comm or SingleProcess())
    if problem is not None:
        raise CheckpointError("CKPT-012", problem, "Use another checkpoint of the same run.")


@contextmanager
def writing(root: Path, comm: Comm | None = None, times: Times = DEFAULT_TIMES) -> Iterator[Lock | None]:
    """Prepare `root` for a run that saves into it, and keep other jobs out while inside. Enter it before `find_latest`.

    Rank 0 creates the folder, takes its lock, deletes what a killed run left, and completes the announcement of a
    checkpoint that a killed run had just committed.

    Args:
        root: the folder. comm: the ranks. times: of the lock.

    Yields:
        The lock, which saves into the folder ask for (`mm.checkpoint.store.save`); None on other ranks than 0.

    Raises:
        CheckpointError: CKPT-034 when another job holds the folder, CKPT-031 when it cannot be written.
    """
    with ExitStack() as stack:
        held: list[Lock] = []

        def prepare() -> None:
            root.mkdir(parents=True, exist_ok=True)
            held.append(stack.enter_context(locked(root, times)))
            _recover(root)

        on_rank_zero(comm or SingleProcess(), prepare)
        yield held[0] if held else None


def commit(root: Path, temporary: Path, step: int) -> Path:
    """Give a complete temporary folder its name: the moment from which the checkpoint exists.

    A checkpoint of the same step, saved before the user went back, is moved aside first and stays loadable under its
    `.replaced-` name until the new one exists.
    """
    final = root / folder_name(step)
    replaced = root / f".replaced-{final.name}-{uuid4().hex[:12]}"
    if final.exists():
        final.rename(replaced)
        fault.point("save.old_moved_away")
    try:
        temporary.rename(final)
    except OSError:
        if replaced.exists():
            replaced.rename(final)
        raise
    sync_folder(root)
    fault.point("save.committed")
    return final


def announce(root: Path, checkpoint: Path, step: int) -> None:
    """Write the step into the tracker, then mark the checkpoint as announced."""
    replace_text(root / TRACKER_NAME, str(step), before_replacing="save.tracker_drafted")
    fault.point("save.tracker_written")
    described = record_folder(checkpoint)
    (described / MARKER_NAME).touch()
    sync_folder(described)
    fault.point("save.marked")


def retain(root: Path, step: int, keep_latest: int | None) -> None:
    """Delete checkpoints older than the newest `keep_latest` (None keeps all) and those that were replaced.

    Only complete checkpoints count and only complete ones are deleted, so that torn folders can never push a good one
    out. Those newer than `step`, left behind when the user went back, neither count nor are deleted.
    """
    complete = [c for c in candidates(root) if c.step <= step and _size_problem(c.path) is None]
    steps = sorted({c.step for c in complete}, reverse=True)
    kept = steps if keep_latest is None else steps[: max(keep_latest, 1)]
    for candidate in complete:
        own = root / folder_name(candidate.step)
        if candidate.step not in kept or (candidate.path != own and own.exists()):
            _discard(root, candidate)


def holds_checkpoints(path: Path) -> bool:
    """Recognise a folder of training checkpoints of any format."""
    return any(kind_of(candidate.path) is not None for candidate in candidates(path))


def require_kind(root: Path, kind: Kind, words: Origins, comm: Comm | None = None) -> None:
    """Refuse to save in one format into a folder with checkpoints of the other.

    Raises:
        ResumeError: CKPT-050.
    """

    def check() -> None:
        found = {kind_of(c.path) for c in candidates(root)} - {None, kind}
        if found:
            word, load, save = (words[f"checkpoint.{name}"] for name in ("format", "load", "save"))
            raise ResumeError(
                "CKPT-050",
                f"{root} holds checkpoints of {word.with_value(found.pop())}, and this run saves {kind}.",
                f"Give {word.name} as before, or name that folder with {load.name} and another one with {save.name}.",
            )

    on_rank_zero(comm or SingleProcess(), check)


def require_experts_folder(root: Path, *, experts: bool) -> None:
    """Refuse a folder with checkpoints of one transformer for a run of two experts, and the reverse.

    Raises:
        ResumeError: CKPT-133.
    """
    of_experts = [root / name for name in (HIGH, LOW) if holds_checkpoints(root / name)]
    if experts and candidates(root):
        found = f"{root} holds checkpoints of one transformer, and this run trains two experts"
    elif not experts and of_experts:
        found = f"{of_experts[0]} holds checkpoints of an expert, and this run, which saves into {root}, trains one"
    else:
        return
    raise ResumeError("CKPT-133", f"{found}.", "Give another folder to save into, or go on as before.")


def require_replaceable(root: Path, step: int) -> None:
    """Refuse to replace a folder of this step's name that this program did not write.

    Raises:
        CheckpointError: CKPT-020.
    """
    final = root / folder_name(step)
    if final.exists() and kind_of(final) is None:
        raise CheckpointError(
            "CKPT-020", f"{final} exists and is no training checkpoint.", "Move it away or save into another folder."
        )


def _in_order(root: Path, policy: Policy) -> list[Candidate]:
    """Candidates to try, best first: the one that the tracker and the markers point to, then older ones."""
    found = candidates(root)
    text = _tracker_text(root)
    if text is None or text == "release":  # `release` is a converted checkpoint of the MM format beside ours
        return found
    named = int(text) if re.fullmatch(r"\d{1,7}", text) else None
    if named is None or all(c.step != named for c in found):
        problem = f'{root / TRACKER_NAME} holds "{text[:40]}", which names no checkpoint there.'
        if policy == "strict" or not found:
            raise _unusable(root, problem)
        log.warning("%s Using the newest checkpoint.", problem)
        return found
    # A newer checkpoint without the marker was committed by a run that died before it could write the tracker.
    start = max([named, *(c.step for c in found if c.step > named and not c.announced)])
    if found[0].step > start:
        log.warning("%s names step %d, older than step %d: going back to it.", TRACKER_NAME, start, found[0].step)
    return [c for c in found if c.step <= start]


def _tracker_text(root: Path) -> str | None:
    try:
        return (root / TRACKER_NAME).read_text(encoding="utf-8", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):  # `root` may be one file of weights
        return None


def _problem(path: Path, verify: Verify, comm: Comm) -> str | None:
    """Reason why a checkpoint cannot be used, on every rank, or None."""
    problem: str | None = on_rank_zero(comm, lambda: _size_problem(path))
    if problem is None and verify == "full":
        problem = next(filter(None, on_every_rank(comm, lambda: _hash_problem(path, comm))), None)
    return problem


def _size_problem(path: Path) -> str | None:
    try:
        files_of(path)
    except CheckpointError as error:
        return error.problems[0].message
    return None


def _hash_problem(path: Path, comm: Comm) -> str | None:
    """Compare the hashes of this rank's share of the files."""
    files = sorted(files_of(path).items())
    for name, record in files[comm.rank :: comm.world_size]:
        if hash_file(path / name) != record.sha256:
            return f"The checkpoint {path} is not complete: the bytes of {name} differ from those that were written."
    return None


def _recover(root: Path) -> None:
    """Clean up behind a killed run; the lock is held, so nothing here is in use.

    A folder loses its name first: an owner that stood still and was taken for dead cannot commit it any more.
    """
    for entry in list(root.iterdir()):
        match = _LEFTOVER.fullmatch(entry.name)
        if match and entry.is_dir():
            log.info("Deleting %s, left by an interrupted run.", entry)
            remove_folder(entry.rename(root / f".trash-{match[2]}-{uuid4().hex[:12]}"))
        elif match:
            entry.unlink()
    newest = next(iter(candidates(root)), None)
    if newest and not newest.announced and _size_problem(newest.path) is None:
        announce(root, newest.path, newest.step)


def _discard(root: Path, candidate: Candidate) -> None:
    """Delete a checkpoint: it stops being one by a rename, before the slow part."""
    trash = root / f".trash-{folder_name(candidate.step)}-{uuid4().hex[:12]}"
    candidate.path.rename(trash)
    fault.point("save.trashed")
    remove_folder(trash)


def _unusable(root: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        "CKPT-013",
        problem,
        f"Restore it, or write the step of a complete checkpoint into {root / TRACKER_NAME}, or use another folder.",
    )
