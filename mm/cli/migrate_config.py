"""`mm migrate config OLD NEW`: a JSON file of MindSpeed-MM's, rewritten, and a list of what was dropped and why."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from mm.config.base import load_json
from mm.config.output import require_writable_file
from mm.dialects.mindspeed.accepted import Note
from mm.dialects.mindspeed.migration import migrated
from mm.errors import ConfigError

_HELP = """usage: mm migrate config OLD NEW

Rewrite data.json, feature_data.json, model_wan.json, tools.json, pretrain_model.json or inference_model.json of
MindSpeed-MM so that it says only what has an effect here. OLD stays as it is."""


def main(argv: Sequence[str]) -> None:
    """Write NEW and print what became of OLD's keys.

    Raises:
        ConfigError: CFG-006 for other words than two files, CFG-193 where NEW exists, CFG-131 where it cannot be made,
            and what `mm.dialects.mindspeed.migration.migrated` raises; nothing is written then.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(_HELP)
        return
    if len(argv) != 2 or any(word.startswith("--") for word in argv):
        found = f"mm migrate config takes two files, and got {' '.join(argv) or 'none'}."
        raise ConfigError("CFG-006", found, "Give the old file and the new one: mm migrate config OLD NEW.")
    old, new = map(Path, argv)
    if os.path.lexists(new):
        raise ConfigError("CFG-193", f"{new} exists.", "Name another file.")
    require_writable_file(new, "NEW")
    result = migrated(load_json(old), str(old))
    with open(new, "x", encoding="utf-8") as file:
        file.write(json.dumps(result.values, indent=4, ensure_ascii=False) + "\n")
    print(f"{new} ({result.kind})")
    _print("dropped or written otherwise, with the same meaning", [str(note) for note in result.same])
    _print("dropped, which had a meaning there", [f"{note.key} {_json(note)}: {note.why}" for note in result.lost])


def _print(title: str, lines: Sequence[str]) -> None:
    if lines:
        print(f"{title}:")
        print("\n".join(f"  {line}" for line in lines))


def _json(note: Note) -> str:
    return json.dumps(note.value, ensure_ascii=False)
