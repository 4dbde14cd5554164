"""The two data files, `data.json` of feature extraction and `feature_data.json` of training, read and checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from mm.config.base import load_json, parse, take_retired
from mm.config.data import SIZE_MULTIPLE, TEMPORAL_STRIDE, ExtractData, RawPreprocess, TrainData
from mm.dialects.mindspeed.accepted import Kind, Note, settle
from mm.dialects.mindspeed.retired_data import RETIRED, RETIRED_IN_EXTRACTION, RETIRED_IN_TRAINING
from mm.errors import ConfigError, Problem, raise_all


def load_extract_data(path: Path, notes: list[Note] | None = None) -> ExtractData:
    """Read and check data.json of feature extraction.

    Args:
        path: the file. notes: gets what is taken as it is done here anyway, and what goes by another name here.

    Raises:
        ConfigError: what `mm.config.base.load` raises, CFG-008 for a field of MindSpeed-MM that has no effect here,
            CFG-050 to CFG-053 for values that cannot work; all at once.
    """
    return _load(ExtractData, path, "data.json", RETIRED | RETIRED_IN_EXTRACTION, notes)


def load_train_data(path: Path, notes: list[Note] | None = None) -> TrainData:
    """Read and check feature_data.json of training; takes and raises what `load_extract_data` does."""
    return _load(TrainData, path, "feature_data.json", RETIRED | RETIRED_IN_TRAINING, notes)


RootT = TypeVar("RootT", bound=ExtractData | TrainData)


def _load(section: type[RootT], path: Path, kind: Kind, retired: Mapping[str, str], notes: list[Note] | None) -> RootT:
    values, found = settle(load_json(path), kind)
    if notes is not None:
        notes += found
    problems = list(take_retired(values, retired, str(path)))
    try:
        result = parse(section, values, str(path))
    except ConfigError as error:
        raise_all(ConfigError, [*problems, *error.problems])
        raise
    problems += _impossible_values(result, str(path))
    raise_all(ConfigError, problems)
    return result


def _impossible_values(config: ExtractData | TrainData, source: str) -> Iterator[Problem]:
    clip = config.dataset_param.preprocess_parameters
    if (clip.num_frames - 1) % TEMPORAL_STRIDE:
        below = (clip.num_frames - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1
        yield Problem(
            "CFG-050",
            f"{source}: num_frames is {clip.num_frames}; the VAE takes 4k + 1 frames.",
            f"Use {below} or {below + TEMPORAL_STRIDE}.",
        )
    for name, size in (("max_height", clip.max_height), ("max_width", clip.max_width)):
        if size % SIZE_MULTIPLE:
            below = size // SIZE_MULTIPLE * SIZE_MULTIPLE
            near = f"{below} or {below + SIZE_MULTIPLE}" if below else f"{SIZE_MULTIPLE}"
            yield Problem("CFG-051", f"{source}: {name} is {size}, not a multiple of {SIZE_MULTIPLE}.", f"Use {near}.")
    if isinstance(clip, RawPreprocess) and clip.min_num_frames is not None and clip.min_num_frames > clip.num_frames:
        yield Problem(
            "CFG-052",
            f"{source}: min_num_frames is {clip.min_num_frames}, more than num_frames {clip.num_frames}.",
            "Use at most num_frames, or remove it to refuse every shorter video.",
        )
    basic = config.dataset_param.basic_parameters
    suffix = Path(basic.data_path).suffix
    if suffix not in (".txt", ".json", ".jsonl"):
        yield Problem(
            "CFG-053",
            f"{source}: data_path is {basic.data_path}, which ends in none of .txt, .json, .jsonl.",
            "Name a list of data sets (.txt) or one annotation file (.json, .jsonl; of a table pandas writes one with "
            'to_json("data.jsonl", orient="records", lines=True)).',
        )
    elif suffix == ".txt" and basic.data_folder is not None:
        yield Problem(
            "CFG-053",
            f"{source}: data_folder has no effect with the list of data sets {basic.data_path}.",
            "Remove it; each line of the list names its own folder.",
        )
    elif suffix != ".txt" and basic.data_folder is None:
        yield Problem(
            "CFG-053",
            f"{source}: data_path {basic.data_path} is one annotation file, and data_folder is missing.",
            "Add data_folder, the folder that the paths in the annotation start from.",
        )
