"""`mm convert`, tools/convert_ckpt.py and examples/wan2.1/convert_ckpt.py: weights from one format to another."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field
from tabulate import tabulate

from mm.checkpoint.formats.mindspeed_split import parse_split
from mm.cli.entry import run
from mm.config.base import hint
from mm.config.flags import Flags, parse_flags, words_of_process
from mm.config.output import require_writable_file, require_writable_folder
from mm.config.tasks.registry import TASKS
from mm.config.tasks.task import Entry
from mm.errors import ConfigError, Problem, raise_all

TO_MM, TO_HF, TO_NATIVE, RESPLIT = "convert_to_mm", "convert_to_hf", "convert_to_native", "resplit"
LAYERZERO_TO_MM, ZERO_TO_BF16, INSPECT = "layerzero_to_mm", "zero_to_bf16", "inspect"
MERGE_LORA, LORA_TO_HF = "merge_lora", "lora_to_hf"
WIDEN = "widen"
LORA_TO_COMFYUI, LORA_TO_MM = "lora_to_comfyui", "lora_to_mm"
MODES = (
    *(TO_MM, TO_HF, TO_NATIVE, RESPLIT, LAYERZERO_TO_MM, WIDEN),
    *(MERGE_LORA, LORA_TO_HF, LORA_TO_COMFYUI, LORA_TO_MM, ZERO_TO_BF16, INSPECT),
)

_USED_BY = {
    "target_path": tuple(mode for mode in MODES if mode != INSPECT),
    "base_path": (MERGE_LORA,),
    "lora_strength": (MERGE_LORA,),
    "to": (MERGE_LORA, WIDEN),
    "task": (WIDEN,),
    "seed": (WIDEN,),
    "ckpt_path": (TO_HF, MERGE_LORA),
    "pp_vpp_layers": (TO_MM, RESPLIT, LAYERZERO_TO_MM),
    "max_shard_size": (TO_HF, MERGE_LORA, ZERO_TO_BF16),
    "json_output": (INSPECT,),
    "weights": tuple(mode for mode in MODES if mode not in (RESPLIT, LAYERZERO_TO_MM, INSPECT)),
}
"""Flags that only some modes use, and these modes."""
_NEEDED_BY = {
    "target_path": _USED_BY["target_path"],
    "base_path": (MERGE_LORA,),
    "pp_vpp_layers": (RESPLIT,),
    "task": (WIDEN,),
}
_WIDENED = [name for name, task in TASKS.items() if task.features and not task.entering(Entry.SIDE_BLOCKS)]
"""Tasks that a model can be made for. Side blocks begin as copies of blocks, which is another conversion."""
_SEED = 1234
"""Of initial values, as of training from scratch."""
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class ConvertFlags(Flags):
    """Convert the weights of a Wan2.1 transformer, or a LoRA of one, between formats; merge a LoRA; look at a file."""

    mode: str = Field(description=", ".join(MODES))
    source_path: Path = Field(
        description="weights, whose format is told by content: a Hugging Face or native transformer folder, an MM "
        "folder, a layer-zero save of MindSpeed, or the folder of a training run's checkpoints; of convert_to_hf and "
        "convert_to_native also one of Wan's encoders, a folder or an original file; in the modes of LoRA "
        "an adapter: the folder of a LoRA run's checkpoints, an MM folder of adapters, or a file of PEFT, ComfyUI, "
        "kohya or DiffSynth"
    )
    target_path: Path | None = Field(
        None,
        description="where to write (every mode but inspect); nothing that exists is overwritten. The modes that write "
        "the MM format may add to an existing folder; lora_to_hf and lora_to_comfyui write one safetensors file",
    )
    base_path: Path | None = Field(None, description="merge_lora: the base model, in any format")
    lora_strength: float | None = Field(None, description="merge_lora: factor on the adapter; default: 1")
    to: Literal["hf", "native"] | None = Field(
        None, description="merge_lora and widen: format of the result; default: hf, of widen native"
    )
    task: str | None = Field(
        None,
        description="widen: what the model becomes a start point for; new input channels have weights of zero, and "
        f"parts that the model lacks begin at their initial values: {', '.join(_WIDENED)}",
    )
    seed: int | None = Field(None, ge=0, description="widen: of those values; default: 1234")
    ckpt_path: Path | None = Field(
        None,
        description="convert_to_hf and merge_lora to hf: the original Hugging Face transformer folder, whose file "
        "names, index, config.json and dtypes the result keeps; of an encoder its folder, whose config.json it keeps",
    )
    pp_vpp_layers: str | None = Field(
        None,
        description="the modes that write the MM format: blocks of each pipeline stage, such as [7,8,8,7], or with "
        "virtual stages one list for each chunk, [[7,8],[7,8]]; default: one file for all",
    )
    max_shard_size: str | None = Field(
        None,
        description="convert_to_hf, merge_lora and zero_to_bf16: most bytes of a new shard, such as 5GB; default: "
        "10GB, of zero_to_bf16 80GB",
    )
    weights: Literal["trained", "ema"] | None = Field(
        None, description="of a training checkpoint: what was trained (the default), or its average of --ema-decay"
    )
    json_output: bool = Field(False, description="inspect: print one JSON object instead of a table")


SPELLING = {"--" + name: "--" + name.replace("_", "-") for name in ConvertFlags.model_fields if "_" in name}


def main(argv: Sequence[str]) -> None:
    """Convert.

    Raises:
        ConfigError: CFG-004 to CFG-007 for flags; CFG-071 for another mode, CFG-073 for a flag without effect with the
            mode, CFG-107 for one that it needs, CFG-108 for a malformed --pp_vpp_layers, CFG-109 for a malformed
            --max_shard_size, CFG-131 for a target where nothing can be written, CFG-300 for a task of --mode widen.
        CheckpointError, DataError: from `mm.checkpoint.convert`, `mm.lora.convert` and `mm.lora.inspection`.
    """
    flags = parse_flags(ConvertFlags, argv, program="convert_ckpt.py", spelling=SPELLING)
    raise_all(ConfigError, _problems(flags))
    if flags.target_path is not None:
        into = require_writable_file if flags.mode in (LORA_TO_HF, LORA_TO_COMFYUI) else require_writable_folder
        into(flags.target_path, "--target_path")
    if flags.mode == INSPECT:
        _inspect(flags.source_path, flags.json_output)
    elif flags.target_path is not None:
        _actions(flags, flags.target_path)[flags.mode]()


def parse_size(text: str) -> int:
    """Bytes of "5GB" (10^9), "5GiB" (2^30) or a plain number.

    Raises:
        ConfigError: CFG-109.
    """
    match = re.fullmatch(r"([1-9][0-9]*)\s*([A-Za-z]*)", text)
    if match is None or match[2] not in _UNITS:
        raise ConfigError(
            "CFG-109", f"--max_shard_size {text} is not a size.", "Give a whole number and a unit: 500MB, 5GB, 5GiB."
        )
    return int(match[1]) * _UNITS[match[2]]


def _actions(flags: ConvertFlags, target: Path) -> dict[str, Callable[[], None]]:
    """Actions of each mode, with flags that are known to be good."""
    stages = None if flags.pp_vpp_layers is None else parse_split(flags.pp_vpp_layers)
    size = None if flags.max_shard_size is None else parse_size(flags.max_shard_size)
    from mm.checkpoint import convert  # only now: torch takes a second to import
    from mm.checkpoint.widen import widened
    from mm.lora import convert as lora

    source, hf_size = flags.source_path, size or convert.HF_SHARD_BYTES
    averaged = flags.weights == "ema"

    def merge() -> None:
        strength = 1.0 if flags.lora_strength is None else flags.lora_strength
        merged = lora.merged(flags.base_path or source, source, strength, averaged=averaged)
        if flags.to == "native":
            convert.write_as_native(merged, target)
        else:
            convert.write_as_hf(merged, target, flags.ckpt_path, hf_size)

    def widen() -> None:
        wide = widened(source, TASKS[str(flags.task)], _SEED if flags.seed is None else flags.seed, averaged=averaged)
        if flags.to == "hf":
            convert.write_as_hf(wide, target)
        else:
            convert.write_as_native(wide, target)
        wide.log_what_is_new()

    return {
        TO_MM: lambda: convert.convert_to_mm(source, target, stages, averaged=averaged),
        TO_HF: lambda: convert.convert_to_hf(source, target, flags.ckpt_path, hf_size, averaged=averaged),
        TO_NATIVE: lambda: convert.convert_to_native(source, target, averaged=averaged),
        RESPLIT: lambda: convert.resplit(source, target, stages or ()),
        LAYERZERO_TO_MM: lambda: convert.layerzero_to_mm(source, target, stages),
        MERGE_LORA: merge,
        WIDEN: widen,
        LORA_TO_HF: lambda: lora.write_file(source, target, "peft", averaged=averaged),
        LORA_TO_COMFYUI: lambda: lora.write_file(source, target, "comfyui", averaged=averaged),
        LORA_TO_MM: lambda: lora.lora_to_mm(source, target, averaged=averaged),
        ZERO_TO_BF16: lambda: convert.zero_to_bf16(source, target, size or convert.BF16_SHARD_BYTES, averaged=averaged),
    }


def _inspect(path: Path, as_json: bool) -> None:
    """Print what is at a path; raises what using it for a model would raise, after everything is printed."""
    from mm.lora.inspection import inspect

    found, error = inspect(path)
    values = found.as_json()
    if as_json:
        print(json.dumps(values, indent=2))
    else:
        lists = {"files": "\n".join(found.files), "problems": "\n".join(found.problems) or "none"}
        dtypes = ", ".join(f"{name} {count:,}" for name, count in found.dtypes.items())
        counts = {name: f"{values[name]:,}" for name in ("num_tensors", "num_parameters", "num_bytes")}
        rows = list((values | counts | lists | {"dtypes": dtypes}).items())
        print(tabulate(rows, tablefmt="plain", disable_numparse=True))
    if error is not None:
        raise error


def _problems(flags: ConvertFlags) -> list[Problem]:
    mode = flags.mode
    if mode not in MODES:
        message = f'--mode "{mode}" does not exist.{hint(mode, list(MODES))}'
        return [Problem("CFG-071", message, f"Use one of {', '.join(MODES)}.")]
    problems = []
    for name, modes in _USED_BY.items():
        value = getattr(flags, name)
        given = value is not None and value is not False
        if given and mode not in modes:
            problems.append(
                Problem("CFG-073", f"--{name} has no effect with --mode {mode}.", f"Only {', '.join(modes)} use it.")
            )
        if not given and mode in _NEEDED_BY.get(name, ()):
            problems.append(Problem("CFG-107", f"--mode {mode} needs --{name}.", "Give it; see --help."))
    if mode == WIDEN and flags.task is not None and flags.task not in _WIDENED:
        found = f'--task "{flags.task}" is none that models can be made wider for.{hint(flags.task, _WIDENED)}'
        problems.append(Problem("CFG-300", found, f"Use one of {', '.join(_WIDENED)}."))
    shapes_new_files = flags.ckpt_path is None and flags.to != "native"
    if flags.to == "native" and flags.ckpt_path is not None:
        problems.append(Problem("CFG-073", "--ckpt_path has no effect with --to native.", "Remove one of the two."))
    if flags.max_shard_size is not None and mode in (TO_HF, MERGE_LORA) and not shapes_new_files:
        message = "--max_shard_size has no effect with --ckpt_path, whose files are kept, or --to native, which is one."
        problems.append(Problem("CFG-073", message, "Remove one of the two."))
    return problems


if __name__ == "__main__":
    sys.exit(run(main, words_of_process()))
