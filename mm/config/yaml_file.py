"""YAML files of plain values, read strictly."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from mm.errors import ConfigError

_MOST_VALUES = 10_000  # in a file that has some dozens; more are a mistake or hostile


def load_yaml(path: Path) -> Any:
    """Read a YAML file of plain values strictly.

    Raises:
        ConfigError: CFG-001 when the file is missing or unreadable, CFG-002 when it is not YAML, has a key twice, or
            holds what JSON has no form for (dates, NaN, values that contain themselves), or more values than a
            configuration has.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "CFG-001", f"{path} cannot be read ({error}).", "Check the path and its permissions."
        ) from None
    try:
        values = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 (a SafeLoader)
        _require_small(values)
        json.dumps(values, allow_nan=False)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            "CFG-002", f"{path} is not plain YAML: {reason}.", "Correct the file at that place."
        ) from None
    return {} if values is None else values  # a file of comments alone: all defaults


def _require_small(values: Any) -> None:
    """Refuse a few lines of aliases that stand for more values than memory holds.

    Raises:
        ValueError: for more values than `_MOST_VALUES`, each alias counted as what it stands for, or one in itself.
    """
    counted: dict[int, int] = {}

    def count(value: Any) -> int:
        if not isinstance(value, (dict, list)):
            return 1
        if id(value) not in counted:
            counted[id(value)] = _MOST_VALUES  # until it is known; what contains itself is never small
            parts = value.values() if isinstance(value, dict) else value
            counted[id(value)] = 1 + sum(map(count, parts))
        return counted[id(value)]

    if count(values) > _MOST_VALUES:
        raise ValueError(f"it stands for more than {_MOST_VALUES} values")


class _StrictLoader(yaml.SafeLoader):
    """Plain values only, no key twice in one mapping, and `1e-4` a number as in every other language."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [self.construct_object(name, deep=True) for name, _ in node.value]
        for place, name in enumerate(names):
            if name in names[:place]:
                raise yaml.constructor.ConstructorError(None, None, f'the key "{name}" occurs twice', node.start_mark)
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)  # which YAML 1.1, and so PyYAML, takes for text
