"""How tools name the tensors of a LoRA file of Wan, and where they put alpha.

| family | a module | its tensors | alpha |
| --- | --- | --- | --- |
| peft | `transformer.blocks.0.attn1.to_q`, diffusers' names | `.lora_A.weight`, `.lora_B.weight` | in the header |
| comfyui | `diffusion_model.blocks.0.self_attn.q`, native names | `.lora_down.weight`, `.lora_up.weight` | `.alpha` |
| kohya | `lora_unet_blocks_0_self_attn_q`, native with underscores | as ComfyUI | `.alpha` |
| diffsynth | `blocks.0.self_attn.q`, native, at times after `pipe.dit.` | `.lora_A.default.weight`, ... | none |

lora_A and lora_down are the same [r, in], lora_B and lora_up the same [out, r]; files of every family are found with
either, with and without `.default`. Where nothing says alpha, all of these tools take it to be r.

Sources: diffusers (`loaders/lora_base.py`, `loaders/lora_conversion_utils.py`), ComfyUI (`comfy/lora.py`),
musubi-tuner and DiffSynth-Studio.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mm.errors import DataError
from mm.wan.names import BLOCK, translate

Family = Literal["peft", "comfyui", "kohya", "diffsynth"]
Part = Literal["A", "B", "alpha"]

PEFT_HEADER = "lora_adapter_metadata"
"""Key of the header's text under which diffusers keeps PEFT's configuration as JSON."""
PEFT_PREFIX, COMFYUI_PREFIX = "transformer.", "diffusion_model."

_PREFIXES: dict[Family, re.Pattern[str]] = {
    "peft": re.compile(re.escape(PEFT_PREFIX)),
    "comfyui": re.compile(re.escape(COMFYUI_PREFIX)),
    "kohya": re.compile("lora_unet__?"),  # with two underscores in files of VideoX-Fun
    "diffsynth": re.compile(r"(pipe\.dit\.)?(?=blocks\.)"),
}
_KEY = re.compile(r"(?P<module>.+?)\.(?:(?P<half>lora_A|lora_B|lora_down|lora_up)(?:\.default)?\.weight|alpha)")
_PARTS: dict[str | None, Part] = {"lora_A": "A", "lora_down": "A", "lora_B": "B", "lora_up": "B", None: "alpha"}
_KOHYA_BLOCK = re.compile("blocks_(0|[1-9][0-9]*)_(.+)")
_KOHYA_MODULES = {row.native.replace(".", "_"): row.native for row in BLOCK}


def family_of(keys: Iterable[str]) -> Family | None:
    """The family that most keys look like, or None when none does."""
    counts = Counter(family for key in keys for family, prefix in _PREFIXES.items() if prefix.match(key))
    return counts.most_common(1)[0][0] if counts else None


def parse_key(key: str, family: Family) -> tuple[str, Part] | None:
    """(native module name, which part of its update) of a key, or None when the family has no such key."""
    prefix, match = _PREFIXES[family].match(key), _KEY.fullmatch(key)
    if prefix is None or match is None:
        return None
    module = _native(match["module"][prefix.end() :], family)
    return None if module is None else (module, _PARTS[match["half"]])


def _native(module: str, family: Family) -> str | None:
    if family == "kohya":
        if not (match := _KOHYA_BLOCK.fullmatch(module)) or match[2] not in _KOHYA_MODULES:
            return None
        module = f"blocks.{match[1]}.{_KOHYA_MODULES[match[2]]}"
    weight = translate(f"{module}.weight", "diffusers" if family == "peft" else "native", "native")
    return None if weight is None else weight.removesuffix(".weight")


@dataclass(frozen=True)
class PeftConfig:
    """What PEFT's configuration says of r and alpha; patterns are by diffusers' module name or the end of one."""

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    by_root: bool

    @classmethod
    def parse(cls, text: str, path: object) -> PeftConfig:
        """Read the JSON of a file's header.

        Raises:
            DataError: DATA-092 when it is malformed, or describes more than plain LoRA.
        """
        try:
            values = {key.removeprefix(PEFT_PREFIX): value for key, value in json.loads(text).items()}
            config = cls(
                int(values["r"]),
                float(values["lora_alpha"]),
                {_plain(key): int(value) for key, value in (values.get("rank_pattern") or {}).items()},
                {_plain(key): float(value) for key, value in (values.get("alpha_pattern") or {}).items()},
                bool(values.get("use_rslora")),
            )
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise _bad_header(path, f"is not understood ({type(error).__name__}: {error})") from None
        if values.get("use_dora"):
            raise _bad_header(path, "is of DoRA, which is more than a sum of B A")
        return config

    def rank_of(self, module: str) -> int:
        """r of a module (diffusers' name)."""
        return int(_by_pattern(self.ranks, module, self.rank))

    def alpha_of(self, module: str) -> float:
        """alpha of a module (diffusers' name), such that the update is (alpha / r) B A."""
        alpha = float(_by_pattern(self.alphas, module, self.alpha))
        # rank-stabilised LoRA divides by the root of r (Kalajdzievski 2023, arXiv 2312.03732)
        return alpha * math.sqrt(self.rank_of(module)) if self.by_root else alpha


def peft_header(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> str:
    """PEFT's configuration as diffusers writes and reads it: the commonest r and alpha, and patterns for the others.

    Args:
        ranks, alphas: of every module, by diffusers' name.
    """
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config: dict[str, Any] = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_pattern(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {_pattern(name): value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(ranks),
        "bias": "none",
        "lora_bias": False,
        "use_dora": False,
        "use_rslora": False,
    }
    return json.dumps({PEFT_PREFIX + key: value for key, value in config.items()}, indent=2, sort_keys=True)


def _pattern(module: str) -> str:
    """PEFT matches keys of patterns as regular expressions against the end of a name; this one is the whole name."""
    return "^" + re.escape(module)


def _plain(pattern: str) -> str:
    """The name in a pattern. Others than names, with or without escapes and anchor, are refused, not interpreted."""
    name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if not re.fullmatch(r"[A-Za-z0-9_.]+", name):
        raise ValueError(f"pattern {pattern!r} is not a name")
    return name


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    return next((v for name, v in patterns.items() if f".{module}".endswith(f".{name}")), default)


def _bad_header(path: object, what: str) -> DataError:
    return DataError(
        "DATA-092",
        f"The {PEFT_HEADER} in the header of {path} {what}.",
        "Use a file of plain LoRA, saved by diffusers, PEFT or this project.",
    )
