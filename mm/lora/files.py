"""Reading and writing adapter files. Safetensors only; what a file is, its keys tell (`mm.wan.adapter_keys`)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mm.checkpoint.files import sync_folder, temporary_name
from mm.checkpoint.finite import require_finite
from mm.checkpoint.formats.folder import PEFT_FILE, PEFT_MODEL_FILE, recognise
from mm.checkpoint.formats.found import Found, nothing
from mm.checkpoint.safetensor_file import entry_of, write_safetensors
from mm.errors import CheckpointError, DataError
from mm.lora.adapter import Adapter, Update, contradiction
from mm.lora.peft_config import PEFT_HEADER, PEFT_PREFIX, PeftConfig, peft_header
from mm.wan.adapter_keys import Keys, Part, other_kinds, sort_keys
from mm.wan.names import native_to_diffusers
from mm.wan.shards import Header, is_shard, no_weights, what_instead

logger = logging.getLogger(__name__)

COMFYUI_FILE = "lora_comfyui.safetensors"
"""The name of an adapter in ComfyUI's names beside a checkpoint; diffusers looks for another one."""
PARTS_FILE = "trained_parts.safetensors"
"""Name of the file of what was trained beside an adapter, in native names."""
PEFT_CONFIG_FILE = "adapter_config.json"
"""The name under which PEFT writes an adapter's configuration."""
COMFYUI_PREFIX = "diffusion_model."
KOHYA_PREFIX = "lora_unet__"
"""As VideoX-Fun spells it; kohya's own has one underscore, and readers take both."""
Family = Literal["peft", "comfyui", "kohya"]

Parts = dict[Part, Tensor]


def write_adapter(path: Path, adapter: Adapter, family: Family) -> None:
    """Write an adapter for diffusers and PEFT, for ComfyUI, or for VideoX-Fun and kohya, in one step, with r and alpha
    of every linear.

    Args:
        path: must not exist; its folder is made.
        adapter: its matrices keep their dtype; its texts go into the header.
        family: whose names.

    Raises:
        CheckpointError: CKPT-016 for a value that is not finite, CKPT-020 when the file exists, CKPT-031 when it
            cannot be written.
    """
    if not adapter.updates:
        raise ValueError("an adapter without updates")
    tensors, header = _WRITTEN[family](adapter)
    _write(path, tensors, {**adapter.texts, **header})


def write_parts(path: Path, adapter: Adapter) -> None:
    """Write the parameters that were trained beside an adapter, in native names; raises what `write_adapter` raises."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in adapter.parts.items()}
    _write(path, tensors, dict(adapter.texts))


def _write(path: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> None:
    if path.exists() or path.is_symlink():
        remedy = "Choose another target."
        raise CheckpointError("CKPT-020", f"The target {path} exists.", remedy)
    draft = path.with_name(temporary_name(path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            entries = [entry_of(name, tensor) for name, tensor in tensors.items()]
            write_safetensors(draft, entries, {**texts, "format": "pt"})
            draft.rename(path)
        finally:
            draft.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        remedy = "Check the path, its permissions and the free space."
        raise CheckpointError("CKPT-031", f"{path} cannot be written: {error.strerror or error}.", remedy) from error


def read_adapter(at: Path | Found) -> Adapter:
    """Read an adapter file of any family.

    Args:
        at: the file, or a folder that holds one: under diffusers' or PEFT's name for it, alone, or in shards; or what
            was found there.

    Raises:
        DataError: DATA-020 when there is none, DATA-022 for a missing or damaged file, DATA-023 to DATA-025 for shards,
            DATA-090 when it is of no known family, DATA-091 for keys that are left over or lack their other half,
            DATA-092 for matrices, r or alpha that contradict each other, DATA-130 for values that are not finite,
            DATA-131 for a folder with several files.
    """
    found = at if isinstance(at, Found) else recognise(at, "adapters") or nothing(at, what_instead(at))
    path, files = found.asked, _files(found)
    places = {key: file for file, header in files.items() for key in header}
    keys = sort_keys(list(places))
    if keys is None:
        raise _no_lora(path, list(places))
    texts, tensors = _contents(files)
    modules = _grouped(path, keys, tensors)
    config = _peft_config(next(iter(files)), texts.pop(PEFT_HEADER, None))
    texts.pop("format", None)
    updates = {name: _update(f"{path}: {name}", *found, config) for name, found in modules.items()}
    silent = sum("alpha" not in parts for _, parts in modules.values()) if config is None else 0
    if silent:
        message = "%s has no alpha for %d of %d linears; it is taken to be r there, a scale of 1."
        logger.warning(message, path, silent, len(modules))
    beside = f", {len(keys.whole)} parameters beside them" if keys.whole else ""
    logger.info("Read %s: %d linears%s, %s.", path, len(updates), beside, keys.spelling)
    whole = {name: _finite(f"{key} of {path}", tensors[key]) for key, name in keys.whole.items()}
    return Adapter(updates, texts, whole)


def _finite(what: str, value: Tensor) -> Tensor:
    """The value of a parameter beside an adapter; DATA-130."""
    try:
        return require_finite(what, value)
    except CheckpointError as error:
        found = error.problems[0].message.split(";")[0]
        raise DataError("DATA-130", f"{found}.", "Use another file, or one saved earlier in its training.") from None


def _files(found: Found) -> Mapping[Path, Header]:
    """The headers of the files that make up an adapter."""
    files = found.headers
    if not files:
        raise no_weights(found.asked, found.format)
    if len(files) > 1 and not all(is_shard(file) for file in files):
        raise DataError(
            "DATA-131",
            f"{found.path} holds {len(files)} safetensors files, none of them called {PEFT_FILE} or {PEFT_MODEL_FILE}: "
            f"{', '.join(file.name for file in list(files)[:10])}.",
            "Name one of the files.",
        )
    return files


def _no_lora(path: Path, keys: list[str]) -> DataError:
    others = other_kinds(keys)
    if others:
        return _left_over(path, f"it holds no plain LoRA, but {_kinds(others)}")
    return DataError(
        "DATA-090",
        f"{path} is no LoRA file of Wan: no key is a half (lora_A or lora_down, lora_B or lora_up) of a module in the "
        f"names of diffusers, Wan, MindSpeed-MM or kohya{_shown(keys)}.",
        "Use a plain LoRA of a Wan2.1 transformer, in safetensors, without an unknown prefix before its names.",
    )


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
    return _down_and_up(adapter, lambda name: f"{COMFYUI_PREFIX}{name}"), {}


def _kohya(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    return _down_and_up(adapter, lambda name: KOHYA_PREFIX + name.replace(".", "_")), {}


def _down_and_up(adapter: Adapter, spelled: Callable[[str], str]) -> dict[str, Tensor]:
    tensors = {}
    for name, update in adapter.updates.items():
        tensors[f"{spelled(name)}.lora_down.weight"] = update.a.detach().cpu().contiguous()
        tensors[f"{spelled(name)}.lora_up.weight"] = update.b.detach().cpu().contiguous()
        tensors[f"{spelled(name)}.alpha"] = torch.tensor(update.alpha, dtype=torch.float32)
    return tensors


_WRITTEN: dict[Family, Callable[[Adapter], tuple[dict[str, Tensor], dict[str, str]]]] = {
    "peft": _peft,
    "comfyui": _comfyui,
    "kohya": _kohya,
}


def _contents(files: Mapping[Path, Header]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The texts of the headers, and the tensors."""
    texts: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for path, header in files.items():
        try:
            with safe_open(path, framework="pt") as file:
                texts |= file.metadata() or {}
                tensors |= {key: file.get_tensor(key) for key in header}
        except SafetensorError as error:  # what the check of the header lets through, such as texts that are none
            raise DataError("DATA-022", f"{path} is damaged: {error}.", "Copy or download the file again.") from None
    return texts, tensors


def _peft_config(file: Path, header: str | None) -> PeftConfig | None:
    """Configuration by PEFT of r and alpha, in the header or in the file that it writes beside its own."""
    if header is not None:
        return PeftConfig.parse(header, f"The {PEFT_HEADER} in the header of {file}")
    beside = file.parent / PEFT_CONFIG_FILE
    if file.name != PEFT_MODEL_FILE or not beside.exists():
        return None
    try:
        return PeftConfig.parse(beside.read_text(encoding="utf-8"), str(beside))
    except (OSError, UnicodeDecodeError) as error:
        raise contradiction(f"{beside} cannot be read ({error})") from None


def _grouped(path: Path, keys: Keys, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, Parts]]:
    """The name in the file and the parts of every update by native module name.

    Raises:
        DataError: DATA-091 for what does not belong to a whole one.
    """
    modules: dict[str, tuple[str, Parts]] = {}
    twice = []
    for key, (native, name_there, part) in keys.parts.items():
        parts = modules.setdefault(native, (name_there, {}))[1]
        if part in parts:
            twice.append(key)
        else:
            parts[part] = tensors[key]
    halves = [name for name, (_, parts) in modules.items() if not {"A", "B"} <= parts.keys()]
    others = other_kinds(keys.left_over)
    known = {key for found in others.values() for key in found}
    unknown = [key for key in keys.left_over if key not in known]
    problems = [f"it also holds {_kinds(others)}"] if others else []
    if unknown:
        problems.append(f"{len(unknown)} keys are unknown{_shown(unknown)}")
    if twice:
        problems.append(f"{len(twice)} keys are there twice, in one spelling or several{_shown(twice)}")
    if halves:
        problems.append(f"{len(halves)} linears lack A or B{_shown(halves)}")
    if problems:
        raise _left_over(f"{path} ({keys.spelling})", "; ".join(problems))
    return modules


def _update(where: str, name_there: str, parts: Parts, config: PeftConfig | None) -> Update:
    """One update from its parts; DATA-092 when they contradict each other, DATA-130 for what is not finite."""
    alpha = None
    if "alpha" in parts:
        if parts["alpha"].numel() != 1:
            raise contradiction(f"{where} has an alpha of shape {list(parts['alpha'].shape)}, expected one number")
        alpha = float(parts["alpha"].item())
    if config is not None:
        rank = parts["A"].shape[0]
        if "alpha" in parts:
            raise contradiction(f"{where} has an alpha of its own and one in PEFT's configuration")
        if config.rank_of(name_there) != rank:
            raise contradiction(f"{where} has rank {rank}, and {config.rank_of(name_there)} in PEFT's configuration")
        alpha = config.alpha_of(name_there)
    return Update.of(where, parts["A"], parts["B"], alpha)


def _left_over(where: object, what: str) -> DataError:
    return DataError(
        "DATA-091",
        f"{where}: {what}.",
        "Use a file that holds plain LoRA of linears alone: no biases, norms, LoKr or DoRA.",
    )


def _kinds(others: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{len(keys)} keys of {kind}{_shown(keys)}" for kind, keys in others.items())


def _shown(names: list[str]) -> str:
    return f" ({', '.join(names[:10])}{', ...' if len(names) > 10 else ''})" if names else ""
