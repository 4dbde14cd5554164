"""Rules about the features of a run: clips that the VAE can have made, and lists of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from mm.config.data import SIZE_MULTIPLE, TEMPORAL_STRIDE
from mm.config.run.data import Clip, FeatureSet
from mm.config.run.origins import Origins
from mm.config.run.training import TrainingRun
from mm.errors import Problem


def _features_can_be(run: TrainingRun) -> Iterator[Problem]:
    """CFG-050, CFG-051 and CFG-053 of every set of features."""
    yield from feature_problems(run.data.features, run.origins, "data.features")
    if run.evaluation is not None:
        yield from feature_problems(run.evaluation.features, run.origins, "evaluation.features")


def feature_problems(features: FeatureSet, words: Origins, path: str) -> Iterator[Problem]:
    """What is wrong with one set.

    Args:
        features: the set. words: of the run. path: of the set in it.
    """
    yield from _clip_problems(features.clip, words, f"{path}.clip")
    data_path, folder = words[f"{path}.path"], words[f"{path}.folder"]
    source, suffix = data_path.file, Path(features.path).suffix
    if suffix not in (".txt", ".json", ".jsonl"):
        yield Problem(
            "CFG-053",
            f"{source}: {data_path.name} is {features.path}, which ends in none of .txt, .json, .jsonl.",
            "Name a list of data sets (.txt) or one annotation file (.json, .jsonl; of a table pandas writes one with "
            'to_json("data.jsonl", orient="records", lines=True)).',
        )
    elif suffix == ".txt" and features.folder is not None:
        yield Problem(
            "CFG-053",
            f"{source}: {folder.name} has no effect with the list of data sets {features.path}.",
            "Remove it; each line of the list names its own folder.",
        )
    elif suffix != ".txt" and features.folder is None:
        yield Problem(
            "CFG-053",
            f"{source}: {data_path.name} {features.path} is one annotation file, and {folder.name} is missing.",
            f"Add {folder.name}, the folder that the paths in the annotation start from.",
        )


def _clip_problems(clip: Clip, words: Origins, path: str) -> Iterator[Problem]:
    frames = words[f"{path}.num_frames"]
    if (clip.num_frames - 1) % TEMPORAL_STRIDE:
        below = (clip.num_frames - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1
        yield Problem(
            "CFG-050",
            f"{frames.file}: {frames.name} is {clip.num_frames}; the VAE takes 4k + 1 frames.",
            f"Use {below} or {below + TEMPORAL_STRIDE}.",
        )
    for name, size in (("height", clip.height), ("width", clip.width)):
        word = words[f"{path}.{name}"]
        if size % SIZE_MULTIPLE:
            below = size // SIZE_MULTIPLE * SIZE_MULTIPLE
            near = f"{below} or {below + SIZE_MULTIPLE}" if below else f"{SIZE_MULTIPLE}"
            found = f"{word.file}: {word.name} is {size}, not a multiple of {SIZE_MULTIPLE}."
            yield Problem("CFG-051", found, f"Use {near}.")


FEATURE_RULES: tuple[Callable[[TrainingRun], Iterator[Problem]], ...] = (_features_can_be,)
