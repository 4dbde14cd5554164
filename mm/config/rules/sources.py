"""Rules about lists of data sets and the clips that are taken of them: the same for videos and for features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mm.config.data import TEMPORAL_STRIDE
from mm.config.rules.shapes import shape_problems
from mm.config.run.data import Clip
from mm.config.run.origins import Origins
from mm.config.run.shapes import LARGEST_SIDE
from mm.config.storage import is_address
from mm.config.tasks.task import Task
from mm.errors import Problem


def clip_problems(clip: Clip, words: Origins, path: str, task: Task) -> Iterator[Problem]:
    """CFG-050 and CFG-051: a clip that the VAE can encode; CFG-004, CFG-210 and CFG-211: a size that is said once.

    Args:
        clip: the section. words: of the run. path: of the clip in it. task: that it is for.
    """
    yield from _frame_problems(clip, words, path)
    yield from _size_problems(clip, words, path, task)


def _frame_problems(clip: Clip, words: Origins, path: str) -> Iterator[Problem]:
    frames = words[f"{path}.num_frames"]
    if (clip.num_frames - 1) % TEMPORAL_STRIDE:
        below = (clip.num_frames - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1
        yield Problem(
            "CFG-050",
            f"{frames.file}: {frames.name} is {clip.num_frames}; the VAE takes 4k + 1 frames.",
            f"Use {below} or {below + TEMPORAL_STRIDE}.",
        )
    elif clip.num_frames > _MOST_FRAMES:
        found = f"{frames.file}: {frames.name} is {clip.num_frames}; clips have at most {_MOST_FRAMES} frames."
        yield Problem("CFG-050", found, "Use fewer; Wan2.1 was trained on 81.")


def _size_problems(clip: Clip, words: Origins, path: str, task: Task) -> Iterator[Problem]:
    rule, multiple = words[f"{path}.shape"], 2 * task.latent_pixels
    if clip.shape is not None:
        yield from shape_problems(clip.shape, words, f"{path}.shape", multiple)
    for name, size in (("height", clip.height), ("width", clip.width)):
        word = words[f"{path}.{name}"]
        if size is None:
            if clip.shape is None:
                found = f'{word.file} lacks the key "{word.full().removesuffix(f" in {word.file}")}".'
                yield Problem("CFG-004", found, f"Add it, or {rule.name} with a rule for samples of several sizes.")
        elif clip.shape is not None:
            found = f"{word.file}: {word.name} has no effect beside {rule.name}, which gives each sample its size."
            yield Problem("CFG-210", found, f"Remove it, or {rule.name}.")
        elif size % multiple:
            below = size // multiple * multiple
            near = f"{below} or {below + multiple}" if below else f"{multiple}"
            found = f"{word.file}: {word.name} is {size}, not a multiple of {multiple}."
            yield Problem("CFG-051", found, f"Use {near}.")
        elif size > LARGEST_SIDE:
            found = f"{word.file}: {word.name} is {size}, and pictures have at most {LARGEST_SIDE} pixels a side."
            yield Problem("CFG-051", found, "Use less; Wan2.1 was trained on 480 x 832 and 720 x 1280.")


_MOST_FRAMES = 2**16 + 1
"""Frames of a clip; readers make room for a whole one."""
LISTINGS = (".json", ".jsonl")
"""Endings of files that list features."""
TABLES = (*LISTINGS, ".csv")
"""Endings of files that list videos and images."""


def list_problems(
    named: str, folder: str | None, words: Origins, path: str, *, endings: Sequence[str], needs_folder: bool = True
) -> Iterator[Problem]:
    """CFG-053: where the data are is said in one way.

    Args:
        named: the list of data sets, or the annotation file. folder: what an annotation's paths start from.
        words: of the run. path: of the section that has both, as `path` and `folder`.
        endings: that annotation files may have.
        needs_folder: nothing else tells where an annotation's paths start from.
    """
    data_path, data_folder = words[f"{path}.path"], words[f"{path}.folder"]
    source, suffix = data_path.file, Path(named).suffix
    if is_address(named):
        if folder is not None:
            found = f"{source}: {data_folder.name} has no effect with the address {named}."
            yield Problem("CFG-053", found, "Remove it; the address is the store.")
    elif suffix not in (".txt", *endings):
        table = 'of another table pandas writes one with to_json("data.jsonl", orient="records", lines=True)'
        remedy = f"Name a list of data sets (.txt) or one annotation file ({', '.join(endings)}; {table})."
        if path == "data.features":
            remedy = (
                "Name a .txt file with the folder of each feature store on a line of its own, or a store's data.jsonl."
            )
        found = f"{source}: {data_path.name} is {named}, which ends in none of .txt, {', '.join(endings)}."
        yield Problem("CFG-053", found, remedy)
    elif suffix == ".txt" and folder is not None:
        yield Problem(
            "CFG-053",
            f"{source}: {data_folder.name} has no effect with the list of data sets {named}.",
            "Remove it; each line of the list names its own folder.",
        )
    elif suffix != ".txt" and folder is None and needs_folder:
        yield Problem(
            "CFG-053",
            f"{source}: {data_path.name} {named} is one annotation file, and {data_folder.name} is missing.",
            f"Add {data_folder.name}, the folder that the paths in the annotation start from.",
        )
