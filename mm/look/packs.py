"""The first sequences of a training that packs, as its replicas compute them, and the samples that share each."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import count, islice

from mm.data.dataset import FeatureDataset
from mm.data.loader import FeatureBatch
from mm.data.sampler import DealtStep
from mm.look.facts import LookedBatch
from mm.look.samples import Drawing, Viewer, read_batches


def looked_packs(dataset: FeatureDataset, drawing: Drawing, viewer: Viewer, most: int) -> Iterator[LookedBatch]:
    """The first sequences: of each step those of the first replica, then of the next.

    Args:
        dataset: the features. drawing: what is drawn of them, in packs. viewer: makes what is shown of a sample.
        most: sequences.

    Raises:
        ConfigError, DataError: what `mm.data.loader.feature_batches` raises, and of shards `ShardStore.listed`.
    """
    yield from islice(_all_packs(dataset, drawing, viewer), most)


def _all_packs(dataset: FeatureDataset, drawing: Drawing, viewer: Viewer) -> Iterator[LookedBatch]:
    replicas = drawing.batches.dp_size
    with ExitStack() as stack:
        readers = [stack.enter_context(closing(_packs_of(dataset, drawing, rank))) for rank in range(replicas)]
        for step in count(drawing.first_step):
            if drawing.steps is not None and step > drawing.steps:
                return
            for rank, reader in enumerate(readers):
                for number, of_replica, samples in next(reader, iter(())):
                    yield LookedBatch(
                        step=step,
                        number=rank * of_replica + number,
                        count=replicas * of_replica,
                        replica=rank if replicas > 1 else None,
                        source="",
                        samples=[viewer.sample(sample, 0) for sample in samples],
                        replaced=[name for sample in samples for name in sample.get("replaced", [])],
                        budget=drawing.batches.pack_tokens,
                    )


def _packs_of(
    dataset: FeatureDataset, drawing: Drawing, rank: int
) -> Generator[Iterator[tuple[int, int, list[FeatureBatch]]]]:
    """Steps of one replica: of each sequence its number, how many there are, and its samples, read when asked for."""
    dealt = deque[DealtStep]()
    with closing(read_batches(dataset, drawing, replace(drawing.batches, dp_rank=rank), dealt)) as read:
        for first in read:
            yield _sequences(first, read, dealt.popleft().sizes)


def _sequences(
    first: FeatureBatch, read: Iterator[FeatureBatch], sizes: tuple[int, ...]
) -> Iterator[tuple[int, int, list[FeatureBatch]]]:
    for number, size in enumerate(sizes, start=1):
        begun = [first] if number == 1 else []
        yield number, len(sizes), [*begun, *islice(read, size - len(begun))]
