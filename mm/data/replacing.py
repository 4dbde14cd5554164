"""Training past feature files that are damaged, the same way on every layout and after every resume.

In the place of a sample whose file is damaged the next one of the epoch's order is trained on (and comes again at its
own place). That depends on the seed, the epoch and the files alone: not on a rank, the layout or what was read before.
So all ranks of a replica read the same, and all replicas get as many batches: the sampler of each is without end. Only
faults of a file's content are passed over. What may be the fault of one machine, a disk that fails or a reader that
hangs or dies, always stops the run: other ranks may have read that very file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mm.config.bad_samples import OnBadSample
from mm.errors import DataError, Problem

FAULTS_OF_A_FEATURE_FILE = frozenset(
    {"DATA-011", "DATA-012", "DATA-013", "DATA-016", "DATA-017", "DATA-048", "DATA-152", "DATA-153"}
)
FAULTS_OF_A_CLIP = frozenset(
    {
        *("DATA-001", "DATA-002", "DATA-003", "DATA-004", "DATA-005", "DATA-006"),
        *("DATA-096", "DATA-097", "DATA-098", "DATA-099"),
        *("DATA-086", "DATA-110", "DATA-175"),
        *("DATA-160", "DATA-161", "DATA-162"),
        *("DATA-248", "DATA-249"),
    }
)
"""Of samples whose features are made while training goes on."""


@dataclass(frozen=True, slots=True)
class Replaced:
    """A sample that was to be trained on, by its id, and what is wrong with its file."""

    sample: str
    problem: Problem


def may_be_replaced(error: DataError) -> bool:
    """Recognise an error about the content of a feature file or a video, which every rank sees alike."""
    return all(problem.id in FAULTS_OF_A_FEATURE_FILE | FAULTS_OF_A_CLIP for problem in error.problems)


def check_replaced(num_replaced: int, consumed_samples: int, num_samples: int, policy: OnBadSample) -> None:
    """Stop where more samples were replaced than the policy allows.

    Every epoch that was begun may have its share, so that a run over a data set with as many bad samples as are allowed
    goes on for ever.

    Args:
        num_replaced: samples replaced since the training began, in all replicas together.
        consumed_samples: samples trained on since, in all replicas together.
        num_samples: of the data set.
        policy: `--on-bad-sample`.

    Raises:
        DataError: DATA-074.
    """
    epochs = -(-consumed_samples // num_samples)
    allowed = epochs * policy.allowed(num_samples)
    if num_replaced > allowed:
        raise DataError(
            "DATA-074",
            f"{num_replaced} of {consumed_samples} samples in {epochs} epochs were damaged and replaced; {policy} of "
            f"{num_samples} samples allows {allowed}.",
            "See the log for their names; mm doctor data lists all of them and writes a list without them.",
        )


def replaced_in_step(
    dp_rank: int, samples: Sequence[str], replaced: Sequence[str], gather: Callable[[object], list[Any]]
) -> int:
    """Number of samples of a step replaced in all replicas, after a check that ranks of a replica read the same.

    Args:
        dp_rank: this rank's replica.
        samples, replaced: ids of its micro-batches' samples in order, and of those that were to be there.
        gather: gives what every rank hands in, on all of them, each of which calls this.

    Raises:
        DataError: DATA-075, on all ranks.
    """
    everyone = gather((dp_rank, list(samples), len(replaced)))
    check_same_samples((replica, read) for replica, read, _ in everyone)
    return sum({replica: count for replica, _, count in everyone}.values())


def check_same_samples(samples_of_ranks: Iterable[tuple[int, Sequence[str]]]) -> None:
    """Stop where ranks of one replica are about to train on different samples, whose parts would be mixed.

    Args:
        samples_of_ranks: of every rank its replica (`dp_rank`) and the ids of its micro-batches' samples in order.

    Raises:
        DataError: DATA-075.
    """
    first: dict[int, list[str]] = {}
    for replica, samples in samples_of_ranks:
        expected = first.setdefault(replica, list(samples))
        if list(samples) != expected:
            differing = [f"{one} and {other}" for one, other in zip(expected, samples, strict=False) if one != other]
            raise DataError(
                "DATA-075",
                f"Ranks of replica {replica} read different samples: {differing[0] if differing else 'another count'}.",
                "A feature file is damaged or missing on some machines only; make their copies equal.",
            )
