"""`mm migrate entries`: SimpleTuner's multidatabackend.json, as an extraction for each entry and a mixture of them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from mm.config.data import data_source_line
from mm.config.flags import Flags, parse_flags
from mm.config.output import require_writable_folder
from mm.config.rules.extraction import check_extraction
from mm.config.run.data import Mixture
from mm.config.run.extraction import ExtractionRun, ExtractionSections
from mm.config.run.file import load_run, of_kind
from mm.config.run.shapes import LARGEST_SIDE
from mm.errors import ConfigError, raise_all

LIST, TRAINING = "features.txt", "training.yaml"


class MigrateEntriesFlags(Flags):
    """Write an extraction for each entry of SimpleTuner's multidatabackend.json, and what training takes of them.

    `OUT/extract_ENTRY.yaml` is for `mm run`, once for each entry: it encodes the entry's files at the size and length
    that the entry asks for, to the store ENTRY below `output.path` of the given extraction, of which it has all the
    rest.
    `OUT/training.yaml` has the section `data` of a training: the stores (`OUT/features.txt`), and how they are mixed.
    """

    source: Path = Field(description="multidatabackend.json")
    extraction: Path = Field(description="run.yaml of an extraction: task, encoders, output, workers")
    out: Path = Field(description="folder to write to")
    alignment: int = Field(
        32, ge=1, le=LARGEST_SIDE, description="aspect_bucket_alignment: of which sides are multiples"
    )
    rounding: int = Field(2, ge=1, le=9, description="aspect_bucket_rounding: decimals of an aspect")


def main(argv: Sequence[str]) -> None:
    """Write the files and print what is written otherwise than in the entries.

    Raises:
        ConfigError: for the given extraction and for what an entry makes of it, what `check_extraction` raises; CFG-193
            where a file is there already, CFG-131 where none can be made. Nothing is written then.
        DataError: what `read_entries` and `entry_runs` raise.
    """
    flags = parse_flags(MigrateEntriesFlags, argv, program="mm migrate entries")
    given = of_kind(load_run(flags.extraction), ExtractionRun)
    raise_all(ConfigError, given.problems)
    require_writable_folder(flags.out, "--out")
    from mm.data.files import write_atomically  # after the flags are known to be good: torch takes a second to import
    from mm.data.sources.simpletuner_rules import read_entries
    from mm.data.sources.simpletuner_runs import entry_runs

    stores = Path(given.output.path)
    files: dict[str, str] = {}
    found = entry_runs(flags.source, read_entries(flags.source), alignment=flags.alignment, rounding=flags.rounding)
    for entry in found:
        data = {
            "path": str(flags.source),
            "format": "simpletuner",
            "entry": entry.id,
            "clip": json.loads(entry.clip.model_dump_json()),
        }
        values = {f"data.{name}": value for name, value in data.items()} | {"output.path": str(stores / entry.id)}
        run = given.changed(values)
        check_extraction(run)
        files[_file(entry.id)] = _extraction(run)
    shares = [share for entry in found if (share := entry.share_of(stores / entry.id)) is not None]
    files[LIST] = "".join(f"{data_source_line(Path(share.folder))}\n" for share in shares)
    files[TRAINING] = _training(flags.out / LIST, Mixture(shares=tuple(shares)))
    there = [name for name in files if os.path.lexists(flags.out / name)]
    if there:
        raise ConfigError("CFG-193", f"{flags.out / there[0]} exists.", "Name another folder.")
    flags.out.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_atomically(flags.out / name, [text.encode()], len(text.encode()))
    for entry in found:
        print(f"{flags.out / _file(entry.id)} -> {stores / entry.id}")
        print("".join(f"  {note}\n" for note in entry.notes), end="")
    print(f"{flags.out / TRAINING}: the section data of a training on them")


def _file(entry: str) -> str:
    return f"extract_{entry}.yaml"


def _extraction(run: ExtractionRun) -> str:
    """The run without what is a default."""
    values = ExtractionSections.model_validate(run, from_attributes=True).model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _training(features: Path, mixture: Mixture) -> str:
    """The section of a training."""
    data: dict[str, Any] = {"features": {"path": str(features)}}
    data["mixture"] = mixture.model_dump(mode="json", exclude_defaults=True)
    head = "# What a training takes of the stores: copy it into its run.yaml, beside micro_batch_size and the rest.\n"
    return head + yaml.safe_dump({"data": data}, sort_keys=False, allow_unicode=True)
