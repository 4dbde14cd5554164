"""Reading a whole data set to find what is bad in it, before extraction or training does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from mm.config.data import DataSource, StoreSource
from mm.config.model import WanConfig
from mm.config.run.data import FeatureSet
from mm.config.run.extraction import SourceClip
from mm.config.tasks.task import Task
from mm.data.clips import CheckClip, check_announced_length
from mm.data.dataset import FeatureDataset, checked_sources, local_store, read_sample
from mm.data.listing import FeatureStore, RowChecker
from mm.data.metadata import VideoSample
from mm.data.place import FeaturePlace
from mm.data.recipe import Recipe
from mm.data.sources.checking import iterate_rows
from mm.data.store.catalog import is_sharded
from mm.data.store.opened import open_shards
from mm.data.tables import TableRow, open_table
from mm.data.workers import Parcel, Work, read_in_order
from mm.errors import DataError, Problem

JobT = TypeVar("JobT")
Done = Callable[[int], None]
_Names = tuple[str | None, str | None]


@dataclass(frozen=True, slots=True)
class BadSample:
    """A row of a data set that cannot be used.

    Attributes:
        data_set, row: which data set (0, 1, ...) and which row of it (1, 2, ...).
        sample, file: the sample's id and its file; None where the row does not tell.
        error, reason: the id of its first problem, and all of them in words.
    """

    data_set: int
    row: int
    sample: str | None
    file: str | None
    error: str
    reason: str


@dataclass(frozen=True)
class CheckedList:
    """One data set: its rows (None for those that stand in no table), and which of them are bad."""

    source: DataSource | StoreSource
    rows: list[TableRow | None] = field(default_factory=list)
    bad: dict[int, BadSample] = field(default_factory=dict)

    def add(self, data_set: int, number: int, names: _Names, problems: Sequence[Problem]) -> None:
        """Note a bad row; `names` are the sample's id and its file."""
        reason = " ".join(problem.message for problem in problems)
        self.bad[number] = BadSample(data_set, number, *names, problems[0].id, reason)

    def clean(self) -> str | None:
        """A table with the rows that can be used, as they stood; None where none can, or there is no table."""
        good = [row for number, row in enumerate(self.rows, start=1) if number not in self.bad and row is not None]
        annotation = self.source.annotation
        return open_table(annotation, "DATA-060").text_of(good) if good and annotation is not None else None


@dataclass(frozen=True, slots=True)
class CheckedData:
    """All data sets of a data file, each row read.

    Attributes:
        lists: the data sets.
        not_with_decord: videos for which decord is asked and which PyAV reads.
        good: the samples of videos and images that can be used.
    """

    lists: Sequence[CheckedList]
    not_with_decord: int = 0
    good: Sequence[VideoSample] = ()

    @property
    def num_samples(self) -> int:
        """Rows of all data sets."""
        return sum(len(checked.rows) for checked in self.lists)

    @property
    def bad(self) -> list[BadSample]:
        """The bad ones in their order."""
        return [checked.bad[number] for checked in self.lists for number in sorted(checked.bad)]

    def by_error(self) -> dict[str, int]:
        """Number of samples with each error id."""
        return dict(sorted(Counter(sample.error for sample in self.bad).items()))


def check_videos(
    sources: Sequence[DataSource],
    preprocess: SourceClip,
    seed: int,
    *,
    task: Task | None = None,
    quick: bool,
    num_workers: int,
    time_limit: float,
    done: Done,
) -> CheckedData:
    """Check every row of annotation files, and read every clip as extraction would.

    Args:
        sources, preprocess, seed: as extraction has them. task: where it is known.
        quick: count the frames of a video and decode its first ones only.
        num_workers, time_limit: processes that read, seconds for each clip.
        done: told after each row how many there are in all.

    Raises:
        DataError: DATA-060 for an annotation file of which no row can be told.
    """
    lists = [CheckedList(source) for source in sources]
    jobs: list[_RowToRead[VideoSample]] = []
    for row in iterate_rows(sources, task):
        checked = lists[row.source]
        checked.rows.append(row.row)
        problems = list(row.problems)
        if row.sample is not None and not problems:
            problems += _problems_of(check_announced_length, row.sample, preprocess)
        if row.sample is not None and not problems:
            jobs.append(_RowToRead(row.source, row.number, row.sample.id, row.sample.where, row.sample))
        else:
            names: _Names = (row.sample.id, row.sample.where) if row.sample is not None else (None, None)
            checked.add(row.source, row.number, names, problems)
    media = () if task is None else task.media
    readers = _read_all(CheckClip(preprocess, seed, quick, media), jobs, lists, num_workers, time_limit, done)
    good = [job.what for job in jobs if job.number not in lists[job.data_set].bad]
    return CheckedData(lists, readers["pyav"] if preprocess.reader == "decord" else 0, good)


def check_features(
    features: FeatureSet, model: WanConfig, *, caption_dropout: float, num_workers: int, time_limit: float, done: Done
) -> CheckedData:
    """Check every row of feature stores, and read every feature file as training would.

    Args:
        features: the set. model: the transformer that is to take the features.
        caption_dropout: share of captions that are to be left out.
        num_workers, time_limit, done: as in `check_videos`.

    Raises:
        DataError: what `mm.data.dataset.checked_sources` raises, DATA-010 for a listing of which no row can be told,
            DATA-016 or what else is wrong with the empty prompt where captions are to be dropped.
    """
    sources = checked_sources(features, model)
    if caption_dropout > 0:
        first, recipe = sources[0]
        sharded = is_sharded(first.folder)
        store = (
            open_shards(first.folder, recipe.key) if sharded else FeatureStore(local_store(first)[0], [], recipe.key)
        )
        FeatureDataset([store], model).empty_prompt()
    lists = [CheckedList(source) for source, _ in sources]
    jobs: list[_RowToRead[FeaturePlace]] = []
    for data_set, (checked, (source, recipe)) in enumerate(zip(lists, sources, strict=True)):
        if is_sharded(source.folder):
            dataset = FeatureDataset([open_shards(source.folder, recipe.key)], model)
            checked.rows.extend([None] * len(dataset))
            jobs += _shard_jobs(checked, data_set, dataset)
        else:
            jobs += _row_jobs(checked, local_store(source), data_set, recipe)
    _read_all(_CheckFeature(model), jobs, lists, num_workers, time_limit, done)
    return CheckedData(lists)


def _row_jobs(
    checked: CheckedList, store: tuple[Path, Path], data_set: int, recipe: Recipe
) -> Iterator[_RowToRead[FeaturePlace]]:
    """The files of a store (its folder and listing) to read; rows that are wrong in themselves are noted."""
    folder, listing = store
    checker = RowChecker(folder, listing, recipe.task)
    for number, row in enumerate(open_table(listing, "DATA-010"), start=1):
        checked.rows.append(row)
        if row.problem is not None:
            checked.add(data_set, number, (None, None), [row.problem])
            continue
        listed, problems = checker.check(row.value, number)
        if listed is None or problems:
            names: _Names = (listed.sample, str(folder / listed.file)) if listed is not None else (None, None)
            checked.add(data_set, number, names, problems)
            continue
        place = FeaturePlace(folder, listed.file, listed.sample, recipe.key, listed.latent_shape)
        yield _RowToRead(data_set, number, listed.sample, str(folder / listed.file), place)


def _shard_jobs(checked: CheckedList, data_set: int, dataset: FeatureDataset) -> Iterator[_RowToRead[FeaturePlace]]:
    """The samples of a store of shards to read; those of a shard that cannot be opened are noted."""
    for index in range(len(dataset)):
        try:
            place = dataset.stored_place(index)
        except DataError as error:
            checked.add(data_set, index + 1, (None, None), error.problems)
            continue
        yield _RowToRead(data_set, index + 1, place.sample, str(place.folder / place.file), place)


@dataclass(frozen=True, slots=True)
class _RowToRead(Generic[JobT]):
    """A row whose file is to be read."""

    data_set: int
    number: int
    sample: str
    file: str
    what: JobT


def _read_all(
    work: Work[JobT],
    jobs: Sequence[_RowToRead[JobT]],
    lists: Sequence[CheckedList],
    num_workers: int,
    time_limit: float,
    done: Done,
) -> Counter[str]:
    """Note what is bad; returns how many files each library read, where that is told."""
    readers: Counter[str] = Counter()
    total = sum(len(checked.rows) for checked in lists)
    for _ in range(total - len(jobs)):
        done(total)
    outcomes = read_in_order(
        work, [job.what for job in jobs], num_workers=num_workers, time_limit=time_limit, buffer_bytes=0
    )
    with closing(outcomes):
        for job, (_, outcome) in zip(jobs, outcomes, strict=True):
            if isinstance(outcome, DataError):
                lists[job.data_set].add(job.data_set, job.number, (job.sample, job.file), outcome.problems)
            elif "read_by" in outcome.facts:
                readers[outcome.facts["read_by"]] += 1
            done(total)
    return readers


def _problems_of(check: Callable[..., None], *arguments: object) -> tuple[Problem, ...]:
    try:
        check(*arguments)
    except DataError as error:
        return error.problems
    return ()


@dataclass(frozen=True)
class _CheckFeature:
    """Reads one feature file whole, as training does."""

    model: WanConfig

    def __call__(self, place: FeaturePlace, /) -> Parcel:
        read_sample(place, self.model)
        return Parcel({}, {})

    def describe(self, place: FeaturePlace, /) -> str:
        return str(place.folder / place.file)
