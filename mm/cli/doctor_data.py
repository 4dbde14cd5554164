"""`mm doctor data`: read every sample of a data set, list the bad ones, write a list without them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field
from tqdm import tqdm

from mm.cli.entry import run
from mm.config.base import load_json
from mm.config.data import NOT_WITH_DECORD, data_sources
from mm.config.extract import check_extraction, extraction_task
from mm.config.flags import Flags, parse_flags
from mm.config.output import require_writable_folder
from mm.config.tasks.registry import TASKS
from mm.config.tasks.task import Column
from mm.dialects.mindspeed.data_files import load_extract_data, load_train_data
from mm.dialects.mindspeed.model_files import load_extract_model, load_pretrain_model
from mm.dialects.mindspeed.training import features
from mm.errors import ConfigError, DataError, Problem, raise_all

if TYPE_CHECKING:
    from mm.data.check import CheckedData, CheckedList


class DoctorDataFlags(Flags):
    """Read every sample of a data set as extraction or training would, and say which cannot be used."""

    mm_data: str = Field(description="data.json of extraction, or feature_data.json of training")
    mm_model: str | None = Field(
        None, description="model_wan.json, to check the clip for its task; for features pretrain_model.json (required)"
    )
    output: str | None = Field(None, description="folder for report.json and for the lists without the bad rows")
    quick: bool = Field(False, description="videos: count frames and decode the first ones only")
    num_workers: int = Field(2, ge=1, description="processes that read")
    decode_timeout: float = Field(120.0, gt=0, description="seconds for one sample")
    seed: int = Field(1234, ge=0, description="videos: extraction's seed, which decides where clips start")


def main(argv: Sequence[str]) -> None:
    """Check all samples and print one line.

    Raises:
        ConfigError: for flags and files, all problems at once; CFG-111 and CFG-112 for flags that do not fit the data.
        DataError: DATA-076 when a sample is bad; for lists, stores or an output folder that cannot be used at all.
    """
    flags = parse_flags(DoctorDataFlags, argv, program="mm doctor data")
    if flags.output:
        require_writable_folder(flags.output, "--output")
    began = time.monotonic()
    kind = "features" if _says_features(flags.mm_data) else "videos"
    checked = _check_features(flags) if kind == "features" else _check_videos(flags)
    seconds = time.monotonic() - began
    clean = _write(Path(flags.output), checked, flags, kind, seconds) if flags.output else []
    if checked.not_with_decord:
        print(f"{checked.not_with_decord} of {checked.num_samples} videos: {NOT_WITH_DECORD}")
    if not checked.bad:
        print(f"{checked.num_samples} samples, all of them can be used ({seconds:.1f} s)")
        return
    by_error = ", ".join(f"{count} {error}" for error, count in checked.by_error().items())
    message = f"{len(checked.bad)} of {checked.num_samples} samples cannot be used: {by_error} ({seconds:.1f} s)."
    if flags.output:
        others = f" and use {', '.join(map(str, clean))}, which list the others" if clean else "; no sample is left"
        raise DataError("DATA-076", message, f"See {Path(flags.output) / 'report.json'}{others}.")

    from mm.data.files import raise_limited

    remedy = "Give --output for a full report and a list without them."
    raise_limited([Problem("DATA-076", message, remedy), *(Problem(b.error, b.reason, remedy) for b in checked.bad)])


def _says_features(path: str) -> bool:
    """Whether a data file is training's. Where it does not say so itself, it is what it can be read as."""
    values = load_json(Path(path))
    try:
        mode = values["dataset_param"]["basic_parameters"].get("data_storage_mode")
    except (KeyError, TypeError, AttributeError):
        mode = None
    if mode is not None:
        return mode == "sorafeatured"
    try:
        load_extract_data(Path(path))
        return False
    except ConfigError as error:
        try:
            load_train_data(Path(path))
            return True
        except ConfigError:
            raise error from None


def _check_videos(flags: DoctorDataFlags) -> CheckedData:
    data = load_extract_data(Path(flags.mm_data))
    columns: Sequence[Column] = ()
    if flags.mm_model is not None:
        model = load_extract_model(Path(flags.mm_model))
        check_extraction(data, model, None)
        columns = TASKS[extraction_task(model, None)].columns
    sources = data_sources(data.dataset_param.basic_parameters)

    from mm.data.check import check_videos

    with _Bar() as bar:
        return check_videos(
            sources,
            data.dataset_param.preprocess_parameters,
            flags.seed,
            columns=columns,
            quick=flags.quick,
            num_workers=flags.num_workers,
            time_limit=flags.decode_timeout,
            done=bar.done,
        )


def _check_features(flags: DoctorDataFlags) -> CheckedData:
    param = load_train_data(Path(flags.mm_data)).dataset_param
    problems = []
    if flags.mm_model is None:
        found = f"{flags.mm_data} is about features, and --mm-model is missing."
        problems.append(Problem("CFG-111", found, "Give pretrain_model.json, the model that is to take them."))
    if flags.quick:
        found = "--quick has no effect on features."
        problems.append(Problem("CFG-112", found, "Remove it; every feature file is read."))
    raise_all(ConfigError, problems)
    model = load_pretrain_model(Path(str(flags.mm_model))).predictor.wan()

    from mm.data.check import check_features

    with _Bar() as bar:
        return check_features(
            features(param),
            model,
            caption_dropout=param.preprocess_parameters.cfg,
            num_workers=flags.num_workers,
            time_limit=flags.decode_timeout,
            done=bar.done,
        )


class _Bar:
    """A progress bar that learns its length from the first row."""

    def __init__(self) -> None:
        self._bar = tqdm(desc="samples", unit="sample", disable=None)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def done(self, total: int) -> None:
        self._bar.total = total
        self._bar.update()


def _write(folder: Path, checked: CheckedData, flags: DoctorDataFlags, kind: str, seconds: float) -> list[Path]:
    """Write the lists, then the report; returns the lists, in the data sets' order, those that are not empty."""
    from mm.data.files import make_folder, write_atomically

    make_folder(folder, "--output")
    clean = []
    for number, one in enumerate(checked.lists):
        if not one.good_rows():
            continue
        path = folder / _clean_name(one, number if len(checked.lists) > 1 else None)
        content = one.rows.text_of(one.good_rows()).encode()
        write_atomically(path, [content], len(content))
        clean.append(path)
    report: dict[str, Any] = {
        "data": flags.mm_data,
        "kind": kind,
        "quick": flags.quick,
        "samples": checked.num_samples,
        "bad": len(checked.bad),
        "by_error": checked.by_error(),
        "not_with_decord": checked.not_with_decord,
        "seconds": round(seconds, 3),
        "clean": [str(path) for path in clean],
        "bad_samples": [asdict(sample) for sample in checked.bad],
    }
    content = json.dumps(report, indent=2).encode() + b"\n"
    write_atomically(folder / "report.json", [content], len(content))
    return clean


def _clean_name(checked: CheckedList, number: int | None) -> str:
    annotation = checked.source.annotation
    prefix = "" if number is None else f"{number}-"
    return f"{prefix}{annotation.stem}.clean{annotation.suffix}"


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
