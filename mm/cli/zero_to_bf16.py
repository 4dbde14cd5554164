"""scripts/zero_to_bf16.py of VideoX-Fun: a training checkpoint as bf16 weights. The mode zero_to_bf16 does the work."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from mm.checkpoint.directory import folder_name
from mm.cli import convert
from mm.cli.entry import run
from mm.config.flags import Flags, parse_flags, words_of_process
from mm.dialects.videox_fun.command import CHECKPOINT

_RETIRED = {
    "--tag": "Give the folder of the step itself, SAVE_PATH/iter_0000500.",
    "--exclude_frozen_parameters": "A checkpoint here holds what was trained: of a LoRA run use --mode merge_lora.",
    "--debug": "Leave it out.",
}


class ZeroFlags(Flags):
    """CHECKPOINT_DIR OUTPUT_DIR: write the weights of a training checkpoint as safetensors in bf16."""

    checkpoint_dir: Path = Field(description="first word: a checkpoint, or a run's folder of which the latest is taken")
    output_dir: Path = Field(description="second word: must not exist, or be an empty folder")
    max_shard_size: str = Field("80GB", description="most bytes of a file; several files have an index")
    safe_serialization: bool = Field(False, description="write safetensors, as is always done")


SPELLING = {"--" + name: "--" + name.replace("_", "-") for name in ZeroFlags.model_fields}


def main(argv: Sequence[str]) -> None:
    """Convert; the first two words are the folders.

    Raises:
        ConfigError: CFG-004 to CFG-008 for the words.
        CheckpointError: from `mm.checkpoint.convert.zero_to_bf16`.
    """
    words = list(argv)
    for position, flag in ((0, "--checkpoint-dir"), (2, "--output-dir")):
        if position < len(words) and not words[position].startswith("-"):
            words.insert(position, flag)
        else:
            break
    flags = parse_flags(ZeroFlags, words, program="zero_to_bf16.py", retired=_RETIRED, spelling=SPELLING)
    given = {
        "--mode": convert.ZERO_TO_BF16,
        "--source_path": str(own_checkpoint(flags.checkpoint_dir)),
        "--target_path": str(flags.output_dir),
        "--max_shard_size": flags.max_shard_size,
    }
    convert.main([word for pair in given.items() for word in pair])


def own_checkpoint(path: Path) -> Path:
    """The run's own checkpoint beside `checkpoint-50`, of the same step, where there is one; else the path itself."""
    match = CHECKPOINT.fullmatch(path.name)
    beside = path.with_name(folder_name(int(match[1]))) if match is not None else path
    return beside if beside.is_dir() else path


if __name__ == "__main__":
    sys.exit(run(main, words_of_process()))
