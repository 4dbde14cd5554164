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

from mm.cli.entry import run as run_command
from mm.cli.run_file import run_file
from mm.config.base import load_json
from mm.config.data import NOT_WITH_DECORD
from mm.config.flags import Flags, parse_flags
from mm.config.output import require_writable_folder
from mm.config.rules.extraction import check_extraction
from mm.config.rules.features import FEATURE_RULES
from mm.config.run.base import Run
from mm.config.run.extraction import ExtractionRun
from mm.config.run.file import load_run, of_kind
from mm.config.run.training import TrainingRun
from mm.config.unread import UNREAD, broken, if_read, partly, read_or
from mm.dialects.mindspeed.extract_files import ExtractFlags
from mm.dialects.mindspeed.extraction import ExtractFiles
from mm.dialects.mindspeed.extraction import translate as translate_extraction
from mm.dialects.mindspeed.files import (
    load_extract_data,
    load_train_data,
    read_extract_data,
    read_extract_model,
    read_pretrain_model,
    read_train_data,
)
from mm.dialects.mindspeed.reading import Reading
from mm.dialects.mindspeed.train_flags import TrainFlags
from mm.dialects.mindspeed.training import TrainFiles
from mm.dialects.mindspeed.training import translate as translate_training
from mm.errors import ConfigError, DataError, Problem, raise_all

if TYPE_CHECKING:
    from mm.data.check import CheckedData, CheckedList


class DoctorDataOptions(Flags):
    """Questions about a data set."""

    output: str | None = Field(None, description="folder for report.json and for the lists without the bad rows")
    quick: bool = Field(False, description="videos: count frames and decode the first ones only")
    probed: str | None = Field(
        None, description="videos: file that keeps sizes and numbers of frames; report.json then counts them"
    )
    num_workers: int = Field(2, ge=1, description="processes that read")
    decode_timeout: float = Field(120.0, gt=0, description="seconds for one sample")


class DataFiles(Flags):
    """The files that say which data set; run.yaml stands in their place."""

    mm_data: str = Field(description="data.json of extraction, or feature_data.json of training")
    mm_model: str | None = Field(
        None, description="model_wan.json, to check the clip for its task; for features pretrain_model.json (required)"
    )


class DoctorDataFlags(DoctorDataOptions, DataFiles):
    """Read every sample of a data set as extraction or training would, and say which cannot be used.

    `mm doctor data run.yaml [flags]` reads those of a run.
    """

    seed: int = Field(1234, ge=0, description="videos: extraction's seed, which decides where clips start")


def main(argv: Sequence[str]) -> None:
    """Check all samples and print one line.

    Raises:
        ConfigError: for flags and files, all problems at once; CFG-111 and CFG-112 for flags that do not fit the data
            or each other.
        DataError: DATA-076 when a sample is bad; for lists, stores or an output folder that cannot be used at all.
    """
    asked, flags, data = _asked(argv)
    if flags.output:
        require_writable_folder(flags.output, "--output")
    elif flags.probed is not None:
        message = "--probed has no effect without --output, which gets the counts."
        raise ConfigError("CFG-112", message, "Give --output, or remove it.")
    began = time.monotonic()
    sizes: list[dict[str, int | str]] | None = None
    if isinstance(asked, ExtractionRun):
        kind, checked = "videos", _check_videos(asked, flags)
        sizes = _sizes(asked, checked, flags)
    else:
        kind, checked = "features", _check_features(of_kind(asked, TrainingRun), flags)
    seconds = time.monotonic() - began
    about = {"data": data, "kind": kind, "quick": flags.quick} | ({} if sizes is None else {"sizes": sizes})
    clean = _write(Path(flags.output), checked, about, seconds) if flags.output else []
    if checked.not_with_decord:
        print(f"{checked.not_with_decord} of {checked.num_samples} videos: {NOT_WITH_DECORD}")
    if not checked.bad:
        print(f"{checked.num_samples} samples, all of them can be used ({seconds:.1f} s)")
        return
    by_error = ", ".join(f"{count} {error}" for error, count in checked.by_error().items())
    message = f"{len(checked.bad)} of {checked.num_samples} samples cannot be used: {by_error} ({seconds:.1f} s)."
    if flags.output:
        left = "" if len(checked.bad) < checked.num_samples else "; no sample is left"
        others = f" and use {', '.join(map(str, clean))}, which list the others" if clean else left
        raise DataError("DATA-076", message, f"See {Path(flags.output) / 'report.json'}{others}.")

    from mm.data.files import raise_limited

    remedy = "Give --output for a full report and a list without them."
    raise_limited([Problem("DATA-076", message, remedy), *(Problem(b.error, b.reason, remedy) for b in checked.bad)])


def _asked(argv: Sequence[str]) -> tuple[Run, DoctorDataOptions, str]:
    """The run whose data are read, the command's own flags, and the file that says the data."""
    given = run_file(argv, DoctorDataOptions)
    if given is not None:
        file, words = given
        return load_run(file), parse_flags(DoctorDataOptions, words, program=f"mm doctor data {file}"), str(file)
    flags = parse_flags(DoctorDataFlags, argv, program="mm doctor data")
    run: Run = _features_of(flags) if _says_features(flags.mm_data) else _videos_of(flags)
    return run, flags, flags.mm_data


def _says_features(path: str) -> bool:
    """Tell whether a data file is training's. Where it does not say so itself, it is what it can be read as."""
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


def _check_videos(run: ExtractionRun, flags: DoctorDataOptions) -> CheckedData:
    check_extraction(run)
    task = read_or(if_read(lambda: run.task), None)

    from mm.data.check import check_videos
    from mm.data.sources.checking import annotated_sources

    sources = annotated_sources(run.data)

    with _Bar() as bar:
        return check_videos(
            sources,
            run.data.clip,
            run.extraction.seed,
            task=task,
            quick=flags.quick,
            num_workers=flags.num_workers,
            time_limit=flags.decode_timeout,
            done=bar.done,
        )


def _sizes(run: ExtractionRun, checked: CheckedData, flags: DoctorDataOptions) -> list[dict[str, int | str]] | None:
    """Counts of kinds, lengths and sizes among the samples that can be used, where they are asked for."""
    if flags.probed is None:
        return None

    from mm.data.probe_cache import ProbeCache
    from mm.data.probing import count_sizes, probe_samples

    with ProbeCache(Path(flags.probed)) as cache:
        return count_sizes(
            probe_samples(
                checked.good,
                cache,
                reader=run.data.clip.reader,
                num_workers=flags.num_workers,
                time_limit=flags.decode_timeout,
            )
        )


def _check_features(run: TrainingRun, flags: DoctorDataOptions) -> CheckedData:
    problems = [*run.problems, *broken(FEATURE_RULES, run)]
    for flag, is_given in (("--quick", flags.quick), ("--probed", flags.probed is not None)):
        if is_given:
            found = f"{flag} has no effect on features."
            problems.append(Problem("CFG-112", found, "Remove it; every feature file is read."))
    raise_all(ConfigError, problems)

    from mm.data.check import check_features

    with _Bar() as bar:
        return check_features(
            run.data.features,
            run.wan,
            caption_dropout=run.data.caption_dropout,
            num_workers=flags.num_workers,
            time_limit=flags.decode_timeout,
            done=bar.done,
        )


def _videos_of(flags: DoctorDataFlags) -> ExtractionRun:
    """An extraction of which the videos are known, and the encoders where --mm-model says them."""
    reading = Reading()
    model = UNREAD if flags.mm_model is None else read_extract_model(flags.mm_model, reading)
    files = ExtractFiles(read_extract_data(flags.mm_data, reading), model, None)
    words = partly(ExtractFlags, mm_data=flags.mm_data, mm_model=flags.mm_model or UNREAD, seed=flags.seed)
    return translate_extraction(words, files, reading)


def _features_of(flags: DoctorDataFlags) -> TrainingRun:
    """A training of which the features and the model are known."""
    reading = Reading()
    data = read_train_data(flags.mm_data, reading)
    if flags.mm_model is None:
        found = f"{flags.mm_data} is about features, and --mm-model is missing."
        reading.problems.append(Problem("CFG-111", found, "Give pretrain_model.json, the model that is to take them."))
    model = UNREAD if flags.mm_model is None else read_pretrain_model(flags.mm_model, reading)
    words = partly(TrainFlags, mm_data=flags.mm_data, mm_model=flags.mm_model or UNREAD)
    return translate_training(words, TrainFiles(model, data, problems=tuple(reading.problems)))


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


def _write(folder: Path, checked: CheckedData, about: dict[str, Any], seconds: float) -> list[Path]:
    """Write the lists, then the report; returns the lists, in the data sets' order, those that are not empty."""
    from mm.data.files import make_folder, write_atomically

    make_folder(folder, "--output")
    clean = []
    for number, one in enumerate(checked.lists):
        text = one.clean()
        if text is None:
            continue
        path = folder / _clean_name(one, number if len(checked.lists) > 1 else None)
        content = text.encode()
        write_atomically(path, [content], len(content))
        clean.append(path)
    report: dict[str, Any] = {
        **about,
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
    assert annotation is not None  # noqa: S101  it has a text
    prefix = "" if number is None else f"{number}-"
    return f"{prefix}{annotation.stem}.clean{annotation.suffix}"


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
