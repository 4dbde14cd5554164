"""Lists of data sets, which extraction and training read, and the numbers that latents are made by."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mm.config.path_line import LineError, read_paths, write_paths
from mm.config.storage import Location, Remote, Storage, is_address, location_of
from mm.errors import ConfigError, Problem, raise_all

TEMPORAL_STRIDE = 4  # frames per latent frame of the Wan VAE, after a first frame that stands alone
LATENT_PIXELS = 8  # pixels per latent pixel
SIZE_MULTIPLE = 2 * LATENT_PIXELS  # 2 latent pixels per token
NOT_WITH_DECORD = "read with PyAV and not with decord, since nothing proves that decord gives the same frames"
MAX_TEXT_TOKENS = 512  # tokens of text that Wan2.1 was trained with

SourceFormat = Literal["mindspeed", "videox-fun", "diffsynth", "simpletuner", "hf-folder"]
"""Dialects of metadata, one file each in `mm/data/sources/`."""


@dataclass(frozen=True)
class DataSource:
    """One data set.

    Attributes:
        folder: that its paths start from. annotation: the file that lists its samples.
        format: of that file; None where what stands in it tells.
        file_keys: columns whose cells are paths, beside those that the format knows. left_out: columns that are not
            looked at.
        entry: the one whose samples are taken, of a file of entries; None for all.
        storage: how media in object storage are read.
    """

    folder: Path
    annotation: Path
    format: SourceFormat | None = None
    file_keys: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    entry: str | None = None
    storage: Storage = field(default_factory=Storage)


@dataclass(frozen=True)
class StoreSource:
    """One feature store.

    Attributes:
        folder: it. annotation: its listing, where it is a store of one file a sample; such are local.
    """

    folder: Location
    annotation: Path | None


def default_folder(path: str, format: SourceFormat | None) -> str | None:
    """The folder that a table's paths start from where none is said; None where one must be said.

    Tables of Hugging Face's folders lie beside the files; SimpleTuner's file names a folder in each of its entries.
    """
    return {"hf-folder": str(Path(path).parent), "simpletuner": "."}.get(format or "")


def data_sources(path: str, folder: str | None = None) -> list[DataSource]:
    """The data sets that a list or one annotation file names, in order.

    A `.txt` file has one data set a line, `folder,annotation` in the form of `mm.config.path_line`; lines that begin
    with `#` are comments. An annotation without a folder part lies in the data set's folder; all other paths are used
    as they stand, relative ones from the current directory.

    Args:
        path: the list, or the annotation file. folder: that an annotation file's paths start from.

    Raises:
        ConfigError: CFG-001 when the list cannot be read, CFG-054 for every line that is not of that form.
    """
    if Path(path).suffix != ".txt":
        return [DataSource(Path(folder or "."), Path(path))]
    return [_source(words, None) for words in _listed(path, None)]


def store_sources(path: str, folder: str | None, listing: str, storage: Storage) -> list[StoreSource]:
    """The feature stores that a list names, in order, or the one that an address or a listing names.

    A line of a `.txt` file is as in `data_sources`, a folder alone, or an address of object storage.

    Args:
        path: the list, the address, or the listing. folder: of the listing. listing: name of a store's own.
        storage: how object storage is read.

    Raises:
        ConfigError: as `data_sources`; CFG-230 for an address that is none.
    """
    if is_address(path):
        return [_store((path,), listing, storage)]
    if Path(path).suffix != ".txt":
        return [StoreSource(Path(folder or "."), Path(path))]
    return [_store(words, listing, storage) for words in _listed(path, listing)]


def _listed(path: str, default_annotation: str | None) -> list[tuple[str, ...]]:
    """The words of each line of a list; with a default annotation, a line may give a folder only."""
    try:  # not splitlines: names may hold other line ends
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "CFG-001", f"{path} cannot be read ({error}).", "Check the path and its permissions."
        ) from None
    counts = (1, 2) if default_annotation else (2,)
    found: list[tuple[str, ...]] = []
    problems: list[Problem] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            found.append(read_paths(line, counts, lambda words: _are_there(words, default_annotation)))
        except LineError as error:
            problems.append(_malformed_line(f"{path} line {number} is {line!r}; it {error}", default_annotation))
    if not found and not problems:
        problems.append(Problem("CFG-054", f"{path} names no data set.", "Give one line a data set: folder,file."))
    raise_all(ConfigError, problems)
    return found


def data_source_line(folder: Path, annotation: str | None = None) -> str:
    """A line of a list that `data_sources` reads as this data set, whatever characters its paths hold.

    Raises:
        ConfigError: CFG-130 for a path that no line can hold.
    """
    return write_paths([str(folder)] if annotation is None else [str(folder), annotation])


def _store(words: tuple[str, ...], listing: str, storage: Storage) -> StoreSource:
    folder = location_of(words[0], storage)
    if isinstance(folder, Remote):
        if len(words) > 1:
            message = f"{','.join(words)}: a store in object storage has no listing of its own to name."
            raise ConfigError("CFG-054", message, "Give the address alone.")
        return StoreSource(folder, None)
    source = _source((str(folder), *words[1:]), listing)
    return StoreSource(source.folder, source.annotation)


def _source(words: tuple[str, ...], default_annotation: str | None) -> DataSource:
    folder, annotation = Path(words[0]), Path(words[1] if len(words) > 1 else default_annotation or "")
    return DataSource(folder, folder / annotation if len(annotation.parts) == 1 else annotation)


def _are_there(words: tuple[str, ...], default_annotation: str | None) -> bool:
    source = _source(words, default_annotation)
    return os.path.isdir(source.folder) and (len(words) == 1 or os.path.exists(source.annotation))


def _malformed_line(found: str, default_annotation: str | None) -> Problem:
    expected = f"folder or folder,{default_annotation}" if default_annotation else "folder,annotation.json"
    remedy = 'Correct the line; a path with a comma goes into double quotes, "/a, b",data.json.'
    return Problem("CFG-054", f"{found}. Expected is {expected}.", remedy)
