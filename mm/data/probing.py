"""Sizes and lengths of media: each file is opened once, by several processes, and what it holds is kept on disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial

from mm.data.image import probe_image
from mm.data.metadata import Kind, VideoSample
from mm.data.probe_cache import ProbeCache, identity_of, identity_of_object
from mm.data.remote.media import reading
from mm.data.video import Reader, probe
from mm.data.workers import Outcome, Parcel, read_in_order
from mm.errors import DataError


@dataclass(frozen=True, slots=True)
class MediaFacts:
    """Facts of a video or image.

    Attributes:
        num_frames: frames that a decode from the start shows; 1 of an image.
        height, width: of the picture, upright and in square pixels.
    """

    num_frames: int
    height: int
    width: int


@dataclass(frozen=True)
class _Probe:
    """Work of a reader: facts of one file."""

    reader: Reader

    def __call__(self, sample: VideoSample, /) -> Parcel:
        remote = sample.object_of(sample.file)
        facts = reading([] if remote is None else [remote], partial(self._facts, sample))
        return Parcel({}, asdict(facts))

    def describe(self, sample: VideoSample, /) -> str:
        return sample.where

    def _facts(self, sample: VideoSample) -> MediaFacts:
        if sample.kind == "image":
            return MediaFacts(1, *probe_image(sample.file))
        info = probe(sample.file, self.reader)
        return MediaFacts(info.num_frames, *info.shown_size)


@dataclass(slots=True)
class _Wanted:
    """A sample whose facts are wanted, its file's identity before it is opened, and what the cache knows."""

    sample: VideoSample
    identity: str | None
    known: MediaFacts | None


def probe_samples(
    samples: Iterable[VideoSample], cache: ProbeCache, *, reader: Reader, num_workers: int, time_limit: float
) -> Iterator[tuple[VideoSample, MediaFacts | DataError]]:
    """Facts of samples' files, in order; of those that the cache knows without opening them.

    A file that cannot be read is asked again each time. One that changes while it is read is not kept.

    Args:
        samples: which. cache: what is known, and where the rest goes.
        reader: as extraction has it. num_workers, time_limit: processes that open files, seconds for each.

    Yields:
        Each sample with its facts, or with the error that `mm.data.video.probe`, `mm.data.image.probe_image` or
        `mm.data.workers.read_in_order` gives.
    """
    waiting: deque[_Wanted] = deque()

    def unknown() -> Iterator[VideoSample]:
        for sample in samples:
            identity = _identity(sample)
            found = None if identity is None else cache.get(identity)
            waiting.append(_Wanted(sample, identity, None if found is None else MediaFacts(*found)))
            if found is None:
                yield sample

    outcomes = read_in_order(_Probe(reader), unknown(), num_workers=num_workers, time_limit=time_limit, buffer_bytes=0)
    with closing(outcomes):
        for _, outcome in outcomes:
            while (known := waiting[0].known) is not None:
                yield waiting.popleft().sample, known
            asked = waiting.popleft()
            facts = _facts(outcome)
            unchanged = asked.identity if asked.identity == _identity(asked.sample) else None
            if isinstance(facts, MediaFacts) and unchanged is not None:
                cache.put(unchanged, (facts.num_frames, facts.height, facts.width))
            yield asked.sample, facts
    for asked in waiting:
        if asked.known is not None:
            yield asked.sample, asked.known


def count_sizes(facts: Iterable[tuple[VideoSample, MediaFacts | DataError]]) -> list[dict[str, int | str]]:
    """The kinds, lengths and sizes among samples, the commonest first, those that cannot be read left out."""
    counts: dict[tuple[Kind, MediaFacts], int] = {}
    for sample, found in facts:
        if isinstance(found, MediaFacts):
            counts[sample.kind, found] = counts.get((sample.kind, found), 0) + 1
    order: Sequence[tuple[tuple[Kind, MediaFacts], int]] = sorted(
        counts.items(), key=lambda item: (-item[1], item[0][0], tuple(asdict(item[0][1]).values()))
    )
    return [{"kind": kind, **asdict(size), "samples": count} for (kind, size), count in order]


def _identity(sample: VideoSample) -> str | None:
    """Identity of a sample's file, or of the object that it is a copy of; None where it is not there."""
    remote = sample.object_of(sample.file)
    return identity_of(sample.file) if remote is None else identity_of_object(remote)


def _facts(outcome: Outcome) -> MediaFacts | DataError:
    return outcome if isinstance(outcome, DataError) else MediaFacts(**outcome.facts)
