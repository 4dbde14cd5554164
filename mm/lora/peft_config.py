"""PEFT's configuration of an adapter: r and alpha of every module, in the header of a file or in a file beside it."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mm.errors import DataError

PEFT_HEADER = "lora_adapter_metadata"
"""Key of the header's text under which diffusers keeps PEFT's configuration as JSON."""
PEFT_PREFIX = "transformer."
"""What a pipeline puts before the configuration's keys and before modules; the transformer alone puts nothing."""
_CHANGE_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Beginnings of PEFT's ways to initialise an adapter that subtract from the base what the adapter begins with."""
_MORE_THAN_A_SUM = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "repeated layers",
}
"""What PEFT calls LoRA too, by the key of its configuration."""


@dataclass(frozen=True)
class PeftConfig:
    """r and alpha in PEFT's configuration; patterns are by a module's name in the file or the end of one."""

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    by_root: bool

    @classmethod
    def parse(cls, text: str, where: str) -> PeftConfig:
        """Read the JSON of a file's header or of an adapter_config.json.

        Args:
            text: the JSON. where: the place, for messages.

        Raises:
            DataError: DATA-092 when it is malformed, or describes more than plain LoRA.
        """
        try:
            values = {key.removeprefix(PEFT_PREFIX): value for key, value in json.loads(text).items()}
            config = cls(
                _whole(values["r"]),
                float(values["lora_alpha"]),
                {_plain(key): _whole(value) for key, value in (values.get("rank_pattern") or {}).items()},
                {_plain(key): float(value) for key, value in (values.get("alpha_pattern") or {}).items()},
                bool(values.get("use_rslora")),
            )
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise _bad_config(where, f"is not understood ({type(error).__name__}: {error})") from None
        kind, begin = values.get("peft_type") or "LORA", values.get("init_lora_weights")
        more = next((name for key, name in _MORE_THAN_A_SUM.items() if values.get(key)), None)
        if more is not None:
            raise _bad_config(where, f"is of {more}, which is not a sum of the base and B A")
        if kind != "LORA":
            raise _bad_config(where, f"is of {kind}, not of LoRA")
        if isinstance(begin, str) and begin.lower().startswith(_CHANGE_THE_BASE):
            raise _bad_config(where, f"is of an adapter begun by {begin}, which changes the base model")
        return config

    def rank_of(self, module: str) -> int:
        """r of a module, by its name in the file."""
        return int(_by_pattern(self.ranks, module, self.rank))

    def alpha_of(self, module: str) -> float:
        """alpha of a module, by its name in the file, such that the update is (alpha / r) B A."""
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


def _whole(value: Any) -> int:
    """A whole number; ValueError for a fraction, which int() would cut off."""
    if isinstance(value, float) and not value.is_integer():
        raise ValueError(f"{value} is not a whole number")
    return int(value)


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    return next((v for name, v in patterns.items() if f".{module}".endswith(f".{name}")), default)


def _bad_config(where: str, what: str) -> DataError:
    return DataError(
        "DATA-092",
        f"{where} {what}.",
        "Use a file of plain LoRA, saved by diffusers, PEFT or this project.",
    )
