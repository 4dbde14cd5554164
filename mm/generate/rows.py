"""What is generated, row by row: prompts from a text file, and the images or videos that belong to them from another.

A row that cannot be used does not keep the others from being generated: it is reported, and the run ends with an error
when the others are done.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from mm.config.inference import InferenceModel
from mm.config.inputs import missing_parts
from mm.config.path_line import LineError, read_paths
from mm.errors import DataError, Problem, raise_all

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerationRow:
    """One clip to make.

    Attributes:
        index: its number, which names the clip and keys its noise.
        prompt: what it shows.
        images: the first frame, or the first and the last. video: what it is made from.
    """

    index: int
    prompt: str
    images: tuple[Path, ...] = ()
    video: Path | None = None


@dataclass(frozen=True)
class BadRow:
    """A row that no clip can be made of."""

    index: int
    problem: Problem


def read_rows(config: InferenceModel) -> tuple[list[GenerationRow], list[BadRow]]:
    """The rows of the configured files, those that can be used and those that cannot.

    Prompts that go with images or videos are matched line by line; a line that is blank in both files is left out.

    Raises:
        DataError: DATA-053 when a file cannot be read as UTF-8 text, DATA-054 when it holds nothing, DATA-084 when
            there are not as many images or videos as prompts.
    """
    listed = _listed(config)
    if listed is None:
        return [GenerationRow(index, prompt) for index, prompt in enumerate(read_prompts(Path(config.prompt)))], []
    good, bad = _pairs(config, listed)
    log.info("%s: %d rows with %s", config.prompt, len(good) + len(bad), listed)
    return good, bad


def _listed(config: InferenceModel) -> str | None:
    """The file of the images or videos."""
    return config.video or config.image


def _pairs(config: InferenceModel, listed: str) -> tuple[list[GenerationRow], list[BadRow]]:
    """`read_rows` where prompts go with images or videos."""
    kind = "image" if config.video is None else "video"
    prompts = _read_lines(Path(config.prompt), "prompt")
    others = _read_lines(Path(listed), kind)
    if len(prompts) != len(others):
        raise DataError(
            "DATA-084",
            f"{config.prompt} has {len(prompts)} lines, and {listed} {len(others)}.",
            f"Write one {kind} for each prompt, in the same order.",
        )
    pairs = [(prompt, other) for prompt, other in zip(prompts, others, strict=True) if prompt or other]
    good, bad = [], []
    for index, (prompt, other) in enumerate(pairs):
        row = _row(index, prompt, other, config)
        if isinstance(row, GenerationRow):
            good.append(row)
        else:
            bad.append(row)
    return good, bad


def require_inputs(config: InferenceModel) -> None:
    """Refuse a generation of which nothing can come, because files are not there; nothing is loaded.

    Rows of which only some lack their images are no reason: the others are generated.

    Raises:
        DataError: what `read_rows` and `mm.config.inputs.missing_parts` say, DATA-001 when every row's images or video
            are missing; all at once.
    """
    problems = missing_parts(config)
    listed = _listed(config)
    try:
        if listed is None:
            _read_lines(Path(config.prompt), "prompt")
        else:
            good, bad = _pairs(config, listed)
            missing = [problem for row in good for problem in _missing_files(row)[:1]]
            if len(missing) == len(good):
                problems += [*(row.problem for row in bad), *missing]
    except DataError as error:
        problems += error.problems
    raise_all(DataError, problems)


def _missing_files(row: GenerationRow) -> list[Problem]:
    files = [*row.images, *([] if row.video is None else [row.video])]
    remedy = "Correct the path, or add the file."
    return [
        Problem("DATA-001", f"Row {row.index}: {file} does not exist.", remedy)
        for file in files
        if not os.path.exists(file)
    ]


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; blank lines are left out, and their number is logged.

    Raises:
        DataError: DATA-053 when the file cannot be read as UTF-8 text, DATA-054 when it holds no prompt.
    """
    lines = _read_lines(path, "prompt")
    prompts = [line for line in lines if line]
    blank = len(lines) - len(prompts)
    log.info("%s: %d prompts%s", path, len(prompts), f", {blank} blank lines left out" if blank else "")
    return prompts


def _row(index: int, prompt: str, other: str, config: InferenceModel) -> GenerationRow | BadRow:
    """A row, or why it is none (DATA-085)."""
    frames = config.row_task.frames
    wanted, what = len(frames), "one image" if len(frames) == 1 else "two images"
    if config.video is not None:
        wanted, what = 1, "one video"
    if not prompt:
        return _bad(index, "no prompt", "Write one, or remove both lines.")
    if not other:
        return _bad(index, f"nothing where {what} should be", "Write the path, or remove both lines.")
    try:
        paths = tuple(map(Path, read_paths(other, (wanted,), lambda paths: all(map(os.path.isfile, paths)))))
    except LineError as error:
        expected = ", ".join(f"{frame.name}.png" for frame in frames) if wanted > 1 else '"a, b.png"'
        remedy = f"Write {expected}; a path with a comma in it goes into double quotes."
        return _bad(index, f'"{other}" where {what} should be; it {error}', remedy)
    return (
        GenerationRow(index, prompt, video=paths[0])
        if config.video is not None
        else GenerationRow(index, prompt, images=paths)
    )


def _bad(index: int, found: str, remedy: str) -> BadRow:
    return BadRow(index, Problem("DATA-085", f"Row {index} has {found}.", remedy))


def _read_lines(path: Path, what: str) -> list[str]:
    """The lines of a UTF-8 text file, with or without a byte order mark, with any line ends, without blank last ones.

    Raises:
        DataError: DATA-053 when the file cannot be read, DATA-054 when it holds nothing.
    """
    try:
        # Not splitlines(): it would also cut a prompt at a form feed or a Unicode line separator.
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            "DATA-053",
            f"The {what}s in {path} cannot be read ({error}).",
            f"Give a UTF-8 text file with one {what} a line (--{what}, or {what} in inference_model.json).",
        ) from None
    while lines and not lines[-1]:
        lines.pop()
    if not any(lines):
        raise DataError("DATA-054", f"{path} holds no {what}.", f"Write one {what} a line.")
    return lines
