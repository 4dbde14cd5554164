"""`mm convert`, tools/convert_ckpt.py and examples/wan2.1/convert_ckpt.py: weights from one format to another."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from mm.cli.entry import run
from mm.config.base import closest
from mm.config.flags import Flags, parse_flags, words_of_process
from mm.errors import ConfigError, Problem, raise_all

TO_MM, TO_HF, TO_NATIVE = "convert_to_mm", "convert_to_hf", "convert_to_native"
MODES = (TO_MM, TO_HF, TO_NATIVE)


class ConvertFlags(Flags):
    """Convert the weights of a Wan2.1 transformer between the Hugging Face, MM and native formats."""

    mode: str = Field(description="convert_to_mm, convert_to_hf or convert_to_native")
    source_path: Path = Field(
        description="weights to convert: a Hugging Face or native transformer folder, an MM folder, or the folder of "
        "a training run's checkpoints"
    )
    target_path: Path = Field(
        description="where to write; nothing that exists is overwritten. convert_to_mm may add to an existing folder"
    )
    ckpt_path: Path | None = Field(
        None,
        description="convert_to_hf: the original Hugging Face transformer folder, whose file names, index, config.json "
        "and dtypes the result keeps",
    )
    pp_vpp_layers: str | None = Field(None, description="layers of each pipeline stage; not available in this version")


SPELLING = {"--" + name: "--" + name.replace("_", "-") for name in ConvertFlags.model_fields if "_" in name}


def main(argv: Sequence[str]) -> None:
    """Convert.

    Raises:
        ConfigError: CFG-004 to CFG-007 for flags; CFG-071 for another mode, CFG-072 for --pp_vpp_layers, CFG-073 for
            --ckpt_path without effect.
        CheckpointError, DataError: from `mm.checkpoint.convert`.
    """
    flags = parse_flags(ConvertFlags, argv, program="convert_ckpt.py", spelling=SPELLING)
    raise_all(ConfigError, _problems(flags))
    from mm.checkpoint import convert  # after the flags are known to be good: torch takes a second to import

    if flags.mode == TO_MM:
        convert.convert_to_mm(flags.source_path, flags.target_path)
    elif flags.mode == TO_HF:
        convert.convert_to_hf(flags.source_path, flags.target_path, flags.ckpt_path)
    else:
        convert.convert_to_native(flags.source_path, flags.target_path)


def _problems(flags: ConvertFlags) -> list[Problem]:
    problems = []
    if flags.mode not in MODES:
        message = f'--mode "{flags.mode}" is not available in this version.{closest(flags.mode, list(MODES))}'
        problems.append(Problem("CFG-071", message, f"Use one of {', '.join(MODES)}."))
    if flags.pp_vpp_layers is not None:
        message = f"--pp_vpp_layers {flags.pp_vpp_layers}: pipeline stages are not available in this version."
        problems.append(Problem("CFG-072", message, "Leave it out: the result is one file for all layers."))
    if flags.ckpt_path is not None and flags.mode in (TO_MM, TO_NATIVE):
        message = f"--ckpt_path has no effect with --mode {flags.mode}."
        problems.append(Problem("CFG-073", message, f"Remove it; only {TO_HF} uses it."))
    return problems


if __name__ == "__main__":
    sys.exit(run(main, words_of_process()))
