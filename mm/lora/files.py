"""Reading and writing adapter files. Safetensors only; what a file is, its keys tell (`mm.lora.families`)."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mm.checkpoint.files import sync_folder, temporary_name
from mm.checkpoint.safetensor_file import entry_of, write_safetensors
from mm.errors import CheckpointError, DataError
from mm.lora.adapter import Adapter, Update
from mm.lora.families import (
    COMFYUI_PREFIX,
    PEFT_HEADER,
    PEFT_PREFIX,
    Family,
    Part,
    PeftConfig,
    family_of,
    parse_key,
    peft_header,
)
from mm.wan.names import native_to_diffusers
from mm.wan.shards import read_header

logger = logging.getLogger(__name__)

PEFT_FILE = "pytorch_lora_weights.safetensors"
"""The name under which diffusers looks for a LoRA in a folder."""

Parts = dict[Part, Tensor]


def write_adapter(path: Path, adapter: Adapter, family: Literal["peft", "comfyui"]) -> None:
    """Write an adapter for diffusers and PEFT, or for ComfyUI, in one step. r and alpha of every linear are in it.

    Args:
        path: must not exist; its folder is made.
        adapter: its matrices keep their dtype; its texts go into the header.
        family: whose names.

    Raises:
        CheckpointError: CKPT-020 when the file exists, CKPT-031 when it cannot be written.
    """
    if not adapter.updates:
        raise ValueError("an adapter without updates")
    if path.exists() or path.is_symlink():
        remedy = "Choose another target, or delete this one if it is not needed."
        raise CheckpointError("CKPT-020", f"The target {path} exists.", remedy)
    tensors, header = (_peft if family == "peft" else _comfyui)(adapter)
    draft = path.with_name(temporary_name(path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            entries = [entry_of(name, tensor) for name, tensor in tensors.items()]
            write_safetensors(draft, entries, {**adapter.texts, **header, "format": "pt"})
            draft.rename(path)
        finally:
            draft.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        remedy = "Check the path, its permissions and the free space."
        raise CheckpointError("CKPT-031", f"{path} cannot be written: {error.strerror or error}.", remedy) from error


def read_adapter(path: Path) -> Adapter:
    """Read an adapter file of any family.

    Args:
        path: the file, or a folder in which it has diffusers' name for it, pytorch_lora_weights.safetensors.

    Raises:
        DataError: DATA-022 for a missing or damaged file, DATA-090 when it is of no known family, DATA-091
            for keys that are left over or lack their other half, DATA-092 for matrices, r or alpha that contradict each
            other.
    """
    path = path / PEFT_FILE if path.is_dir() else path
    keys = list(read_header(path))
    family = family_of(keys)
    parsed = {key: parse_key(key, family) for key in keys} if family else {}
    if family is None or not any(parsed.values()):
        raise DataError(
            "DATA-090",
            f"{path} is no LoRA file of Wan in the names of PEFT, ComfyUI, kohya or DiffSynth{_shown(keys)}.",
            "Use a plain LoRA of a Wan2.1 transformer, in safetensors.",
        )
    texts, tensors = _contents(path, keys)
    modules = _grouped(path, family, parsed, tensors)
    header = texts.pop(PEFT_HEADER, None) if family == "peft" else None
    texts.pop("format", None)
    config = None if header is None else PeftConfig.parse(header, path)
    updates = {name: _update(f"{path}: {name}", name, parts, config) for name, parts in modules.items()}
    silent = sum("alpha" not in parts for parts in modules.values()) if config is None else 0
    if silent:
        logger.warning(
            "%s has no alpha for %d of %d linears; it is taken to be r there, a scale of 1.",
            path, silent, len(modules),
        )  # fmt: skip
    logger.info("Read %s: %d linears, %s names.", path, len(updates), family)
    return Adapter(updates, texts)


def _peft(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    names = {name: native_to_diffusers(f"{name}.weight").removesuffix(".weight") for name in adapter.updates}
    tensors = {
        f"{PEFT_PREFIX}{names[name]}.{half}.weight": value.detach().cpu().contiguous()
        for name, update in adapter.updates.items()
        for half, value in (("lora_A", update.a), ("lora_B", update.b))
    }
    ranks = {names[name]: update.rank for name, update in adapter.updates.items()}
    alphas = {names[name]: update.alpha for name, update in adapter.updates.items()}
    return tensors, {PEFT_HEADER: peft_header(ranks, alphas)}


def _comfyui(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors = {}
    for name, update in adapter.updates.items():
        tensors[f"{COMFYUI_PREFIX}{name}.lora_down.weight"] = update.a.detach().cpu().contiguous()
        tensors[f"{COMFYUI_PREFIX}{name}.lora_up.weight"] = update.b.detach().cpu().contiguous()
        tensors[f"{COMFYUI_PREFIX}{name}.alpha"] = torch.tensor(update.alpha, dtype=torch.float32)
    return tensors, {}


def _contents(path: Path, keys: list[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The texts of the header, and the tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {key: file.get_tensor(key) for key in keys}
    except SafetensorError as error:  # what the check of the header lets through, such as texts that are none
        raise DataError("DATA-022", f"{path} is damaged: {error}.", "Copy or download the file again.") from None


def _grouped(
    path: Path, family: Family, parsed: Mapping[str, tuple[str, Part] | None], tensors: Mapping[str, Tensor]
) -> dict[str, Parts]:
    """The parts of every update by native module name; DATA-091 for what does not belong to a whole one."""
    modules: dict[str, Parts] = {}
    left_over = []
    for key, place in parsed.items():
        if place is None or place[1] in modules.setdefault(place[0], {}):
            left_over.append(key)
        else:
            modules[place[0]][place[1]] = tensors[key]
    halves = [name for name, parts in modules.items() if not {"A", "B"} <= parts.keys()]
    problems = []
    if left_over:
        problems.append(f"{len(left_over)} keys are unknown or there twice{_shown(left_over)}")
    if halves:
        problems.append(f"{len(halves)} linears lack A or B{_shown(halves)}")
    if problems:
        raise DataError(
            "DATA-091",
            f"{path} ({family} names): {'; '.join(problems)}.",
            "Use a file that holds plain LoRA of linears of the blocks alone: no biases, norms, LoKr or DoRA.",
        )
    return modules


def _update(where: str, name: str, parts: Parts, config: PeftConfig | None) -> Update:
    """One update from its parts; DATA-092 when they contradict each other."""
    a, b = parts["A"], parts["B"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.numel() or not b.numel():
        raise _contradiction(f"{where} has A {list(a.shape)} and B {list(b.shape)}, expected [r, in] and [out, r]")
    if not (a.is_floating_point() and b.is_floating_point()):
        raise _contradiction(f"{where} has A in {a.dtype} and B in {b.dtype}, expected floating point")
    rank = a.shape[0]
    alpha = float(rank)
    if "alpha" in parts:
        if parts["alpha"].numel() != 1:
            raise _contradiction(f"{where} has an alpha of shape {list(parts['alpha'].shape)}, expected one number")
        alpha = parts["alpha"].item()
    if config is not None:
        module = native_to_diffusers(f"{name}.weight").removesuffix(".weight")
        if "alpha" in parts:
            raise _contradiction(f"{where} has an alpha of its own and one in the header")
        if config.rank_of(module) != rank:
            raise _contradiction(f"{where} has rank {rank}, and {config.rank_of(module)} in the header")
        alpha = config.alpha_of(module)
    if not math.isfinite(alpha):
        raise _contradiction(f"{where} has alpha {alpha}, expected a finite number")
    return Update(a, b, alpha)


def _contradiction(what: str) -> DataError:
    return DataError("DATA-092", f"{what}.", "Save or download the adapter again.")


def _shown(names: list[str]) -> str:
    return f" ({', '.join(names[:10])}{', ...' if len(names) > 10 else ''})" if names else ""
