"""SimpleTuner's multidatabackend.json: folders of videos and images, and where their captions are.

Relative paths start from the data set's folder, which is the current one where none is said. Files are found below
`instance_data_dir` in the order of their names; a sample's id is its entry's and its path, `ID:sub/a.mp4`.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path, PurePosixPath

from mm.config.data import DataSource
from mm.config.storage import Remote, location_of
from mm.config.tasks.task import Column
from mm.data.files import path_below, raise_limited
from mm.data.metadata import Annotation
from mm.data.sources.base import Dialect, RowKey, SourceRow, Taken
from mm.data.sources.buckets import local_copy
from mm.data.sources.cells import IMAGE_ENDINGS, VIDEO_ENDINGS, caption_problems, kind_of
from mm.data.sources.parquet_captions import parquet_captions
from mm.data.sources.simpletuner_entries import SAMPLES, STORES, Entry
from mm.data.sources.simpletuner_rules import read_entries
from mm.data.sources.walk import files_below, listed_names
from mm.data.tables import TableRow
from mm.errors import DataError, Problem

log = logging.getLogger(__name__)

_ENDINGS = {"video": VIDEO_ENDINGS, "image": IMAGE_ENDINGS}
_ROLES = {"mask": "mask", "segmentation": "mask", "reference": "reference"}
"""Beginnings of `conditioning_type`, and the role of its files; of other types it is `control`."""


@dataclass(frozen=True)
class _Folder:
    """An entry with its folder.

    Attributes:
        entry: as it is written. root: its folder. place: how to call it.
        captions: of parquet, by name of file. beside: folders of further files, by role.
        names: of the folder in it that was looked into last, its media by what stands before their endings.
    """

    entry: Entry
    root: Path
    place: str
    captions: dict[str, str] = field(default_factory=dict)
    beside: tuple[tuple[str, _Folder], ...] = ()
    names: dict[Path, dict[str, list[str]]] = field(default_factory=dict)


class _SimpleTuner:
    """Files below the folders of entries. The text of a row is the number of its folder and its path there."""

    is_table = False

    def __init__(self, source: DataSource, columns: Sequence[Column]) -> None:
        if columns:
            names = ", ".join(column.name for column in columns)
            found = f"{source.annotation} has no place for {names}, which every sample of the task has."
            raise DataError("DATA-171", found, "List the samples in a table with that column.")
        entries = [entry for entry in read_entries(source.annotation) if not entry.is_off]
        taken = _taken(entries, source)
        _tell(entries, source)
        self._open = _folders(entries, taken, source)
        self._roots = [os.path.realpath(folder.root) for folder in self._open]

    def rows(self) -> Iterator[TableRow]:
        """Walk through the folders."""
        for number, folder in enumerate(self._open):
            is_empty = True
            for path in _files(folder):
                is_empty = False
                yield self.row_of(f"{number}:{path}", None)
            if is_empty:
                remedy = "Correct instance_data_dir or dataset_type, or disable the entry."
                found = f"{folder.place}: no {folder.entry.dataset_type} lies below {folder.root}."
                raise DataError("DATA-173", found, remedy)

    def row_of(self, text: str, line: int | None) -> TableRow:
        """A row from its text."""
        number, _, path = text.partition(":")
        return TableRow(text, (int(number), path), line=line)

    def key(self, row: TableRow) -> RowKey:
        """Key of a row: a file is listed once in each entry, whatever its captions."""
        number, path = row.value
        entry = self._open[number].entry
        return RowKey(f"{entry.id}:{path}", f"{self._roots[number]}/{path}", "0-", entry.id)

    def read(self, number: int, row: TableRow) -> SourceRow:
        """Read a row whole."""
        folder, path = row.value
        return _row(self._open[folder], path, number)


def _taken(entries: Sequence[Entry], source: DataSource) -> list[Entry]:
    """The entries whose samples are asked for."""
    samples = [entry for entry in entries if entry.dataset_type in SAMPLES]
    if source.entry is None:
        return samples
    taken = [entry for entry in samples if entry.id == source.entry]
    if not taken:
        found = f"{source.annotation} has no entry {source.entry} of samples that is switched on."
        raise DataError("DATA-171", found, f"Name one of {', '.join(entry.id for entry in samples)}.")
    return taken


def _files(folder: _Folder) -> Iterator[str]:
    """The files of an entry; of more than `max_num_samples` those that its id draws, in their order."""
    files = files_below(folder.root, _ENDINGS[folder.entry.dataset_type])
    most = folder.entry.max_num_samples
    if most is None:
        yield from files
        return
    paths = list(files)
    drawn = sorted(paths, key=lambda path: blake2b(f"{folder.entry.id}\0{path}".encode()).digest())
    kept = set(drawn[:most])
    yield from (path for path in paths if path in kept)


def _tell(entries: Sequence[Entry], source: DataSource) -> None:
    """Say what of the entries has no effect here."""
    stores = [entry.id for entry in entries if entry.dataset_type in STORES]
    if stores:
        message = "%s: the entries %s name stores of SimpleTuner's; features of captions and images have one store here"
        log.info(message, source.annotation, ", ".join(stores))
    if source.entry is None:
        samples = ", ".join(entry.id for entry in entries if entry.dataset_type in SAMPLES)
        message = (
            "%s: every file is encoded at the size and length of data.clip, whatever the entries %s ask for; "
            "mm migrate entries writes an extraction for each"
        )
        log.info(message, source.annotation, samples)


def _folders(entries: Sequence[Entry], taken: Sequence[Entry], source: DataSource) -> list[_Folder]:
    """The entries that are taken, each with the folders of the files that go with its own.

    Raises:
        DataError: DATA-173 for every folder that is not there, and what `parquet_captions` raises.
    """
    used = {entry.id for entry in taken} | {entry.id for entry in entries if entry.dataset_type not in SAMPLES}
    roots = {entry.id: _root(entry, source) for entry in entries if entry.type == "local" or entry.id in used}
    missing = [
        Problem("DATA-173", f"{source.annotation} entry {entry.id}: {roots[entry.id]} is no folder.", "Correct it.")
        for entry in entries
        if entry.type == "local" and entry.instance_data_dir is not None and not os.path.isdir(roots[entry.id])
    ]
    raise_limited(missing)
    by_id = {entry.id: entry for entry in entries}
    found = []
    for entry in taken:
        place = f"{source.annotation} entry {entry.id}"
        beside = [by_id[name] for name in entry.conditions]
        beside += [e for e in entries if e.source_dataset_id == entry.id and e.id not in entry.conditions]
        roles = tuple((_role(e), _Folder(e, roots[e.id], f"{source.annotation} entry {e.id}")) for e in beside)
        captions = parquet_captions(source.folder, entry.parquet, place) if entry.caption_strategy == "parquet" else {}
        found.append(_Folder(entry, roots[entry.id], place, captions, roles))
    return found


def _root(entry: Entry, source: DataSource) -> Path:
    """The folder of an entry's files; of one in object storage what was downloaded of it.

    Raises:
        DataError: what `local_copy` raises.
    """
    if entry.type != "aws" or entry.dataset_type in STORES:
        return source.folder / (entry.instance_data_dir or "")
    said = {"endpoint_url": entry.aws_endpoint_url, "region_name": entry.aws_region_name}
    storage = source.storage.model_copy(update={name: value for name, value in said.items() if value is not None})
    parts = [entry.aws_bucket_name, entry.aws_data_prefix, entry.instance_data_dir]
    url = "s3://" + "/".join(part.strip("/") for part in parts if part is not None and part.strip("/"))
    prefix = location_of(url, storage)
    assert isinstance(prefix, Remote)  # noqa: S101  it is an address
    return local_copy(prefix, f"{source.annotation} entry {entry.id}")


def _role(entry: Entry) -> str:
    said = entry.conditioning_type or ""
    return next((role for begin, role in _ROLES.items() if said.startswith(begin)), "control")


def _row(folder: _Folder, path: str, number: int) -> SourceRow:
    """The row of one file, its path below its folder."""
    entry, place = folder.entry, f"{folder.place}: {path}"
    problems = list[Problem]()
    captions, faults = _captions(folder, path)
    problems += [Problem("DATA-062", f"{place}{found}", remedy) for found, remedy in faults]
    if not faults:
        problems += caption_problems(captions, place, "caption")
    roles: dict[str, tuple[str | Path, ...]] = {}
    for role, other in folder.beside:
        file = _partner(other, path)
        if file is None:
            found = f"{place} has no partner in {other.root}, where the files of {other.entry.id} are."
            problems.append(Problem("DATA-001", found, "Add a file of the same path, or remove this one."))
        else:
            roles[role] = (*roles.get(role, ()), file)
    try:
        path_below(folder.root, path, place)
    except DataError as error:
        return SourceRow(number, place, None, (*problems, *error.problems))
    annotation = Annotation(path=path, cap=captions[0] if len(captions) == 1 else captions)
    kind, name = kind_of(path) or "video", f"{entry.id}:{path}"
    taken = Taken(annotation, folder.root, name, kind, roles=roles, part=entry.id)
    return SourceRow(number, place, taken, tuple(problems))


def _captions(folder: _Folder, path: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Captions of a file; or what is wrong with them, and what to do."""
    entry, prompt = folder.entry, folder.entry.instance_prompt or ""
    if entry.caption_strategy == "instanceprompt" or entry.only_instance_prompt:
        return [prompt], []
    pure = PurePosixPath(path)
    if entry.caption_strategy == "textfile":
        try:
            captions = _lines(folder.root / pure.with_suffix(".txt"), split=not entry.disable_multiline_split)
        except (OSError, UnicodeDecodeError) as error:
            return [], [(f": its caption cannot be read ({error}).", "Add a text file of the same name, as UTF-8.")]
    elif entry.caption_strategy == "parquet":
        whole = entry.parquet is not None and entry.parquet.identifier_includes_extension
        caption = folder.captions.get(pure.name if whole else pure.stem)
        if caption is None:
            return [], [(" is not in the table of captions.", "Add its row, or remove the file.")]
        captions = [caption]
    else:
        captions = [pure.stem.replace("_", " ")]
    return [f"{prompt} {caption}".strip() if entry.prepend_instance_prompt else caption for caption in captions], []


def _lines(file: Path, split: bool) -> list[str]:
    """The captions in a text file: its lines that are not blank, or its whole text; an empty one if it has none."""
    if file.exists() and not file.is_file():  # opening a pipe would wait for its other end
        raise OSError(f"{file} is no regular file")
    text = file.read_text(encoding="utf-8-sig")
    lines = [line.strip() for line in text.split("\n") if line.strip()] if split else [text.strip()]
    return lines or [""]


def _partner(other: _Folder, path: str) -> Path | None:
    """The file of the same path in another folder, or the only one of it with another ending.

    Raises:
        DataError: DATA-173 for a folder that cannot be listed.
    """
    same = other.root / path
    if same.exists():
        return same
    folder = same.parent
    if folder not in other.names:
        other.names.clear()
        other.names[folder] = _media_by_stem(folder)
    found = other.names[folder].get(PurePosixPath(path).stem, [])
    return folder / found[0] if len(found) == 1 else None


def _media_by_stem(folder: Path) -> dict[str, list[str]]:
    """Names of a folder's videos and images by what stands before their endings; none of what is no folder."""
    names = defaultdict[str, list[str]](list)
    for name in listed_names(folder) if os.path.isdir(folder) else ():
        if kind_of(name) is not None:
            names[PurePosixPath(name).stem].append(name)
    return names


SIMPLETUNER = Dialect(
    "simpletuner", (frozenset({"id"}), frozenset({"dataset_type", "instance_data_dir"})), _SimpleTuner
)
