"""Paths in a run.yaml of what a flag of MindSpeed-MM's says."""

from __future__ import annotations

from collections.abc import Mapping

from mm.config.flags import flag_name
from mm.dialects.mindspeed.generate_words import GENERATION_WORDS
from mm.dialects.mindspeed.words import ALL_TRAIN_FLAGS, EXTRACT_FLAGS, MESH_FLAGS

_FIELDS: Mapping[str, Mapping[str, str | None]] = {
    "training": {path: flag.field for path, flag in ALL_TRAIN_FLAGS.items()},
    "extraction": {path: flag.field for path, flag in EXTRACT_FLAGS.items()},
    "generation": {
        **{path: flag.field for path, flag in MESH_FLAGS.items()},
        **{path: flag for path, (flag, _) in GENERATION_WORDS.items()},
    },
}


def path_of(flag: str, kind: str) -> str | None:
    """The path of the value that a flag, with its dashes, stands for; None for what is no flag or has no one value.

    Args:
        flag: it. kind: of run whose flag it is, by the section that it alone has.
    """
    found = (path for path, field in _FIELDS[kind].items() if field is not None and flag_name(field) == flag)
    return next(found, None)
