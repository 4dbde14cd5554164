"""`mm convert`, tools/convert_ckpt.py and examples/wan2.1/convert_ckpt.py: weights from one format to another."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from mm.checkpoint.formats.mm_split import parse_split
from mm.cli.entry import run
from mm.config.base import closest
from mm.config.flags import Flags, parse_flags, words_of_process
from mm.errors import ConfigError, Problem, raise_all

TO_MM, TO_HF, TO_NATIVE, RESPLIT = "convert_to_mm", "convert_to_hf", "convert_to_native", "resplit"
LORA_TO_PEFT, LORA_TO_COMFYUI = "lora_to_peft", "lora_to_comfyui"
MERGE_TO_HF, MERGE_TO_NATIVE = "lora_merge_to_hf", "lora_merge_to_native"
MODES = (TO_MM, TO_HF, TO_NATIVE, RESPLIT, LORA_TO_PEFT, LORA_TO_COMFYUI, MERGE_TO_HF, MERGE_TO_NATIVE)
_MERGING = (MERGE_TO_HF, MERGE_TO_NATIVE)

_USED_BY = {
    "base_path": _MERGING,
    "lora_strength": _MERGING,
    "ckpt_path": (TO_HF, MERGE_TO_HF),
    "pp_vpp_layers": (TO_MM, RESPLIT),
}
"""Flags that only some modes use, and these modes."""
_NEEDED_BY = {"base_path": _MERGING, "pp_vpp_layers": (RESPLIT,)}


class ConvertFlags(Flags):
    """Convert the weights of a Wan2.1 transformer, or a LoRA of one, between formats; merge a LoRA into its base."""

    mode: str = Field(description=", ".join(MODES))
    source_path: Path = Field(
        description="weights to convert: a Hugging Face or native transformer folder, an MM folder, or the folder of "
        "a training run's checkpoints; of the modes of LoRA an adapter: the folder of a LoRA run's checkpoints, or a "
        "file of PEFT, ComfyUI, kohya or DiffSynth"
    )
    target_path: Path = Field(
        description="where to write; nothing that exists is overwritten. convert_to_mm may add to an existing folder; "
        "lora_to_peft and lora_to_comfyui write one safetensors file"
    )
    base_path: Path | None = Field(None, description="the modes that merge: the base model, in any format")
    lora_strength: float | None = Field(None, description="the modes that merge: factor on the adapter; default: 1")
    ckpt_path: Path | None = Field(
        None,
        description="convert_to_hf and lora_merge_to_hf: the original Hugging Face transformer folder, whose file "
        "names, index, config.json and dtypes the result keeps",
    )
    pp_vpp_layers: str | None = Field(
        None,
        description="the modes that write the MM format: blocks of each pipeline stage, such as [7,8,8,7], or with "
        "virtual stages one list for each chunk, [[7,8],[7,8]]; default: one file for all",
    )


SPELLING = {"--" + name: "--" + name.replace("_", "-") for name in ConvertFlags.model_fields if "_" in name}


def main(argv: Sequence[str]) -> None:
    """Convert.

    Raises:
        ConfigError: CFG-004 to CFG-007 for flags; CFG-071 for another mode, CFG-073 for a flag without effect with the
            mode, CFG-107 for one that it needs, CFG-108 for a malformed --pp_vpp_layers.
        CheckpointError, DataError: from `mm.checkpoint.convert` and `mm.lora.convert`.
    """
    flags = parse_flags(ConvertFlags, argv, program="convert_ckpt.py", spelling=SPELLING)
    raise_all(ConfigError, _problems(flags))
    stages = None if flags.pp_vpp_layers is None else parse_split(flags.pp_vpp_layers)
    from mm.checkpoint import convert  # after the flags are known to be good: torch takes a second to import
    from mm.lora import convert as lora

    source, target = flags.source_path, flags.target_path
    strength = 1.0 if flags.lora_strength is None else flags.lora_strength
    if flags.mode in (LORA_TO_PEFT, LORA_TO_COMFYUI):
        lora.write_file(source, target, "peft" if flags.mode == LORA_TO_PEFT else "comfyui")
    elif flags.mode in _MERGING and flags.base_path is not None:
        merged = lora.merged(flags.base_path, source, strength)
        if flags.mode == MERGE_TO_HF:
            convert.write_as_hf(merged, target, flags.ckpt_path)
        else:
            convert.write_as_native(merged, target)
    elif flags.mode == TO_MM:
        convert.convert_to_mm(source, target, stages)
    elif flags.mode == RESPLIT and stages is not None:
        convert.resplit(source, target, stages)
    elif flags.mode == TO_HF:
        convert.convert_to_hf(source, target, flags.ckpt_path)
    else:
        convert.convert_to_native(source, target)


def _problems(flags: ConvertFlags) -> list[Problem]:
    mode = flags.mode
    if mode not in MODES:
        message = f'--mode "{mode}" does not exist.{closest(mode, list(MODES))}'
        return [Problem("CFG-071", message, f"Use one of {', '.join(MODES)}.")]
    problems = []
    for name, modes in _USED_BY.items():
        given = getattr(flags, name) is not None
        if given and mode not in modes:
            problems.append(
                Problem("CFG-073", f"--{name} has no effect with --mode {mode}.", f"Only {', '.join(modes)} use it.")
            )
        if not given and mode in _NEEDED_BY.get(name, ()):
            problems.append(Problem("CFG-107", f"--mode {mode} needs --{name}.", "Give it; see --help."))
    return problems


if __name__ == "__main__":
    sys.exit(run(main, words_of_process()))
