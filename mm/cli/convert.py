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
LORA_TO_PEFT, LORA_TO_COMFYUI = "lora_to_peft", "lora_to_comfyui"
MERGE_TO_HF, MERGE_TO_NATIVE = "lora_merge_to_hf", "lora_merge_to_native"
MODES = (TO_MM, TO_HF, TO_NATIVE, LORA_TO_PEFT, LORA_TO_COMFYUI, MERGE_TO_HF, MERGE_TO_NATIVE)
_MERGING = (MERGE_TO_HF, MERGE_TO_NATIVE)


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
    pp_vpp_layers: str | None = Field(None, description="layers of each pipeline stage; not available in this version")


SPELLING = {"--" + name: "--" + name.replace("_", "-") for name in ConvertFlags.model_fields if "_" in name}


def main(argv: Sequence[str]) -> None:
    """Convert.

    Raises:
        ConfigError: CFG-004 to CFG-007 for flags; CFG-071 for another mode, CFG-072 for --pp_vpp_layers, CFG-073 for
            --ckpt_path and CFG-107 for --base_path and --lora_strength without effect or missing.
        CheckpointError, DataError: from `mm.checkpoint.convert` and `mm.lora.convert`.
    """
    flags = parse_flags(ConvertFlags, argv, program="convert_ckpt.py", spelling=SPELLING)
    raise_all(ConfigError, _problems(flags))
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
        convert.convert_to_mm(source, target)
    elif flags.mode == TO_HF:
        convert.convert_to_hf(source, target, flags.ckpt_path)
    else:
        convert.convert_to_native(source, target)


def _problems(flags: ConvertFlags) -> list[Problem]:
    problems = []
    if flags.mode not in MODES:
        message = f'--mode "{flags.mode}" is not available in this version.{closest(flags.mode, list(MODES))}'
        problems.append(Problem("CFG-071", message, f"Use one of {', '.join(MODES)}."))
    if flags.pp_vpp_layers is not None:
        message = f"--pp_vpp_layers {flags.pp_vpp_layers}: pipeline stages are not available in this version."
        problems.append(Problem("CFG-072", message, "Leave it out: the result is one file for all layers."))
    if flags.ckpt_path is not None and flags.mode in MODES and flags.mode not in (TO_HF, MERGE_TO_HF):
        message = f"--ckpt_path has no effect with --mode {flags.mode}."
        problems.append(Problem("CFG-073", message, f"Remove it; only {TO_HF} and {MERGE_TO_HF} use it."))
    return problems + _problems_of_merging(flags)


def _problems_of_merging(flags: ConvertFlags) -> list[Problem]:
    if flags.mode in _MERGING:
        if flags.base_path is None:
            remedy = "Give the model that the adapter was trained on."
            return [Problem("CFG-107", f"--mode {flags.mode} needs --base_path.", remedy)]
        return []
    given = {"--base_path": flags.base_path, "--lora_strength": flags.lora_strength}
    return [
        Problem("CFG-107", f"{name} has no effect with --mode {flags.mode}.", f"Only {' and '.join(_MERGING)} use it.")
        for name, value in given.items()
        if value is not None and flags.mode in MODES
    ]


if __name__ == "__main__":
    sys.exit(run(main, words_of_process()))
