"""MindSpeed-MM's checkpoints of adapters: a folder like that of a model, whose `model` holds adapters alone.

A key is `blocks.0.self_attn.proj_q.lora_A.default.weight`, PEFT's with MM names. r is in the shapes; alpha is not part
of it, so that of our own is in a file beside the tracker, mm_lora.json, and that of a training save in the recorded
arguments. Earlier versions wrote mm_lora.json beside the ranks' folders, where it is read as well.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mm.checkpoint.directory import TRACKER_NAME
from mm.checkpoint.files import new_folder, write_new
from mm.checkpoint.formats.found import Found
from mm.checkpoint.formats.mindspeed import (
    RELEASE,
    OpenFile,
    virtual_stages,
    write_stage,
)
from mm.checkpoint.formats.mindspeed_split import joined_names
from mm.checkpoint.formats.pt_file import read_pt, unreadable
from mm.config.base import load_json
from mm.errors import CheckpointError, ConfigError, DataError
from mm.lora.adapter import Adapter, Update, contradiction
from mm.wan.names import native_to_mindspeed, translate

log = logging.getLogger(__name__)

RECORD_NAME = "mm_lora.json"
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(?:\.default)?\.weight")


def write_mindspeed(target: Path, adapter: Adapter) -> None:
    """Write an adapter as a `release` with its tracker and mm_lora.json.

    Args:
        target: must not exist, or be an empty folder.
        adapter: its matrices keep their dtype.

    Raises:
        CheckpointError: CKPT-020 when the target exists, CKPT-031 when it cannot be written.
    """
    modules = {name: native_to_mindspeed(f"{name}.weight").removesuffix(".weight") for name in adapter.updates}
    state = {
        f"{modules[name]}.lora_{half}.default.weight": value.detach().cpu().contiguous()
        for name, update in adapter.updates.items()
        for half, value in (("A", update.a), ("B", update.b))
    }
    record = {
        "folder": RELEASE,  # a training save that comes later into the target says its own alpha
        "alpha": {modules[name]: update.alpha for name, update in adapter.updates.items()},
        "texts": dict(adapter.texts),
    }
    with new_folder(target) as folder:
        release = folder / RELEASE
        release.mkdir()
        write_stage(release, 0, 1, {"model": state})
        write_new(folder / RECORD_NAME, json.dumps(record, indent=2) + "\n")
        write_new(folder / TRACKER_NAME, RELEASE)


def read_mindspeed(found: Found) -> Adapter:
    """The adapter in an MM folder, as `mm.checkpoint.formats.mindspeed.recognise` found it.

    Raises:
        CheckpointError: CKPT-021, CKPT-041 to CKPT-043 as `mm.checkpoint.formats.mindspeed.MindSpeedWeights.open`.
        DataError: DATA-090 for a whole model, DATA-091 for keys that are left over or lack
            their other half, DATA-092 and DATA-130 as `Update.of`.
    """
    folder, files = found.path, [found.path / name for name in found.files]
    stages = virtual_stages(files, folder)
    if not any(_KEY.fullmatch(key) for stage in stages for key in stage):
        told = f"{folder} is no LoRA checkpoint: it holds no key *.lora_A.default.weight."
        raise DataError("DATA-090", told, "Use another one.")
    arguments = read_pt(files[0]).get("args")
    _require_all_ranks(folder, len(files), arguments)
    opened = OpenFile()
    halves: dict[str, dict[str, Tensor]] = {}
    left_over = []
    whole = joined_names([list(stage) for stage in stages], str(folder), adapters=True)
    for stage, names in zip(stages, whole, strict=True):
        for local, key in names.items():
            match = _KEY.fullmatch(key)
            native = None if match is None else translate(f"{match['module']}.weight", "mm", "native")
            if match is None or native is None:
                left_over.append(key)
            else:
                halves.setdefault(native.removesuffix(".weight"), {})[match["half"]] = opened.tensor(stage[local])
    left_over += [name for name, parts in halves.items() if len(parts) < 2]
    if left_over:
        raise DataError(
            "DATA-091",
            f"{folder}: {len(left_over)} keys are unknown or lack their other half ({', '.join(left_over[:10])}).",
            "Use a checkpoint that holds plain LoRA of the transformer's linears alone.",
        )
    alphas, texts = _recorded(folder, arguments)
    updates = {
        name: Update.of(f"{folder}: {name}", parts["A"], parts["B"], _alpha_of(folder, name, alphas))
        for name, parts in halves.items()
    }
    if alphas is None:
        log.warning("%s does not say alpha; it is taken to be r, a scale of 1.", folder)
    return Adapter(updates, texts)


def _require_all_ranks(folder: Path, found: int, arguments: Any) -> None:
    """The last stages of adapters have no mark of their own; a training save says how many ranks it had."""
    ranks: Any = getattr(arguments, "pipeline_model_parallel_size", None)
    if isinstance(ranks, int) and ranks != found:
        raise CheckpointError(
            "CKPT-041",
            f"{folder} was saved by {ranks} pipeline ranks, and has files of {found}.",
            "Copy the folders mp_rank_* of all pipeline ranks.",
        )


def _recorded(folder: Path, arguments: Any) -> tuple[Mapping[str, float] | float | None, dict[str, str]]:
    """alpha by MM module, one for all from a training save's arguments, or None; and the texts."""
    for record in filter(Path.exists, (folder / RECORD_NAME, folder.parent / RECORD_NAME)):
        try:
            content = load_json(record)
            if record.parent != folder and content["folder"] != folder.name:
                continue
            alphas = {str(name): float(alpha) for name, alpha in content["alpha"].items()}
            return alphas, {str(name): str(text) for name, text in content["texts"].items()}
        except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise unreadable(record, f"it is not understood ({type(error).__name__}: {error})") from None
    alpha: Any = getattr(arguments, "lora_alpha", None)
    return (float(alpha) if isinstance(alpha, (int, float)) else None), {}


def _alpha_of(folder: Path, name: str, alphas: Mapping[str, float] | float | None) -> float | None:
    if not isinstance(alphas, Mapping):
        return alphas
    module = native_to_mindspeed(f"{name}.weight").removesuffix(".weight")
    if module not in alphas:
        raise contradiction(f"{folder}: {RECORD_NAME} has no alpha for {module}")
    return alphas[module]
