"""`mm demo`: writes the embedded default, a tiny model with a data set to go through every stage without a download."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from mm.cli.entry import run
from mm.config.flags import Flags, parse_flags
from mm.config.tasks.registry import FEATURE_TASKS
from mm.demo.configs import list_names
from mm.demo.write import write_demo


class DemoFlags(Flags):
    """Write the embedded default: tiny models of every task, captioned clips, prompts and what else they take."""

    out: Path = Field(description="folder to write; must not exist or be empty")
    clips_per_caption: int = Field(1, ge=1, le=1000, description="clips of each of the 16 captions")


def main(argv: Sequence[str]) -> None:
    """Run the command with the words after its name."""
    flags = parse_flags(DemoFlags, argv, program="mm demo")
    write_demo(flags.out, flags.clips_per_caption)
    first, *others = FEATURE_TASKS.values()
    titles = f"{', '.join(task.title for task in (first, *others[:-1]))} and {others[-1].title}"
    print(f"{flags.out}/weights/   tiny models, folders of diffusers or transformers alone: {titles}")
    print(f"{flags.out}/dataset/   {16 * flags.clips_per_caption} captioned clips")
    print(f"{flags.out}/configs/   the files that configure extraction, training and generation on them")
    print(f"{', '.join(f'{flags.out}/configs/{task.name}/' for task in others)}   the same for the other tasks")
    print(f"{flags.out}/prompts.txt   16 captions to generate from")
    for column in (column for task in others for column in task.columns):
        print(f"{flags.out}/{column.name}.txt   {column.expected} for each caption")
    lists = ", ".join(
        f"{flags.out}/images_{task.name}.txt" for task in others if task.frames and task.models_of is None
    )
    print(f"{lists}   images to generate from, one line a caption")
    named = {name for task in others if task.models_of is None and task.media for name in list_names(task).values()}
    beside = ", ".join(f"{flags.out}/{name}" for name in sorted(named))
    print(f"{beside}   what else models are given, likewise")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
