"""mm_record.json: what makes a folder in the MM format a checkpoint of a training run.

It is in the folder of the first pipeline rank: the tools of MindSpeed-MM take everything in the folder above for a
rank's, and look at *.pt alone in this one. There it is renamed, copied and deleted with the checkpoint that it is of.

Like a manifest it names every file with its size and hash, so that both formats are found, verified and deleted by the
same rules (`mm.checkpoint.directory`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import StringConstraints, ValidationError

from mm.checkpoint.files import sync_folder, write_new
from mm.checkpoint.manifest import MANIFEST_NAME, FileRecord, Size, damaged, file_problem, read_manifest
from mm.config.base import Section, load_json
from mm.config.model import WanConfig
from mm.errors import MMError

RECORD_NAME = "mm_record.json"
FIRST_RANKS = ("mp_rank_00", "mp_rank_00_000")
"""Folder of the first pipeline rank, without a pipeline and with one."""
RankFile = Annotated[str, StringConstraints(pattern=r"^mp_rank_00(_\d{3})?/model_optim_rng\.pt$")]
Kind = Literal["torch_dist", "torch"]
"""The formats of checkpoints, by the values of --ckpt-format."""


class WeightsRecord(Section):
    """A training checkpoint of weights alone.

    Attributes:
        format, schema_version: what the file is; another version is refused by its number.
        step: optimizer steps taken. consumed_samples, skipped_steps, replaced_samples: as in training's progress.
        trained_samples: too, where it is not the consumed ones. seed: of the run.
        steps: `mm.config.step.StepSettings` of the run; None in records of earlier versions.
        versions: of this package and of torch, for the reader of a report. files: by name.
        wan_config: the model; of earlier versions it is in a file of its own.
    """

    format: Literal["mm-weights-checkpoint"] = "mm-weights-checkpoint"
    schema_version: Literal[1] = 1
    step: Size
    consumed_samples: Size
    skipped_steps: Size
    replaced_samples: Size
    seed: Size
    steps: dict[str, Any] | None = None
    versions: dict[str, str]
    files: dict[RankFile, FileRecord]
    wan_config: WanConfig | None = None
    trained_samples: Size | None = None


def read_record(path: Path) -> WeightsRecord:
    """Read the record of the checkpoint folder `path` and check that its files are there with their sizes.

    Raises:
        CheckpointError: CKPT-012 for a record that is missing, damaged or of another version, or such a file.
    """
    try:
        record = WeightsRecord.model_validate_json(
            json.dumps(load_json(record_folder(path) / RECORD_NAME)), strict=True
        )
    except MMError as error:
        raise damaged(path, error.problems[0].message) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise damaged(path, f'{RECORD_NAME}: "{where}": {first["msg"]}') from None
    problem = file_problem(path, record.files)
    if problem:
        raise damaged(path, problem)
    return record


def write_record(path: Path, record: WeightsRecord) -> None:
    """Write the record into a folder with the ranks' files, which become a checkpoint by it, and force it to disk."""
    first = next(path / rank for rank in FIRST_RANKS if (path / rank).is_dir())
    left_out = {"trained_samples"} if record.trained_samples is None else None
    write_new(first / RECORD_NAME, record.model_dump_json(indent=2, exclude=left_out) + "\n")
    sync_folder(first)


def record_folder(path: Path) -> Path:
    """Folder of the record in the checkpoint folder `path`: `path` itself if earlier versions wrote it, or nobody."""
    found = next((path / rank for rank in FIRST_RANKS if (path / rank / RECORD_NAME).exists()), path)
    return path if (path / RECORD_NAME).exists() else found


def kind_of(path: Path) -> Kind | None:
    """The format of a checkpoint folder; None for a folder that is none, or whose description is lost."""
    if (path / MANIFEST_NAME).exists():
        return "torch_dist"
    return "torch" if (record_folder(path) / RECORD_NAME).exists() else None


def files_of(path: Path) -> Mapping[str, FileRecord]:
    """The files of a checkpoint of either format.

    Raises:
        CheckpointError: CKPT-012 as `read_manifest` and `read_record`.
    """
    return read_record(path).files if kind_of(path) == "torch" else read_manifest(path).files
