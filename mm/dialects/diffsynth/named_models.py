"""The models that a command line names: by paths in JSON, or by released models' ids with patterns of their files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mm.config.unread import is_given
from mm.dialects.diffsynth.train_flags import DiffSynthFlags
from mm.errors import ConfigError, Problem, raise_all

PATHS, IDS = "--model_paths", "--model_id_with_origin_paths"
_FORM = "ID:PATTERN, such as Wan-AI/Wan2.1-T2V-1.3B:Wan2.1_VAE.pth"
_JSON = 'JSON such as \'["vae.pth", ["a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors"]]\''


@dataclass(frozen=True)
class NamedModel:
    """One model.

    Attributes:
        word: the flag that names it. paths: of its files, or none where it is named by the other two.
        model_id: of a released model. pattern: of its files.
    """

    word: str
    paths: tuple[str, ...] = ()
    model_id: str = ""
    pattern: str = ""


def named_models(flags: DiffSynthFlags) -> list[NamedModel]:
    """The models, in their order.

    Raises:
        ConfigError: CFG-380 for JSON that is malformed or of another form; CFG-381 for no models, and for an entry that
            is no id with a pattern; all at once.
    """
    problems: list[Problem] = []
    found: list[NamedModel] = []
    if is_given(flags.model_paths):
        try:
            found += _by_paths(flags.model_paths)
        except ConfigError as error:
            problems += error.problems
    for entry in (flags.model_id_with_origin_paths or "").split(","):
        model_id, colon, pattern = entry.strip().rpartition(":")
        if colon and model_id.count("/") == 1 and pattern:
            found.append(NamedModel(IDS, (), model_id, pattern))
        elif entry.strip():
            problems.append(Problem("CFG-381", f"{IDS}: {entry.strip()!r} is not of the form ID:PATTERN.", _give()))
    if not found and not problems:
        problems.append(Problem("CFG-381", f"No models are named: neither {PATHS} nor {IDS} is given.", _give()))
    raise_all(ConfigError, problems)
    return found


def models_word(flags: DiffSynthFlags) -> str:
    """The flag that names the models."""
    return PATHS if flags.model_paths is not None else IDS


def _give() -> str:
    return f"Give {_FORM}, with commas between them."


def _by_paths(text: str) -> Iterator[NamedModel]:
    try:
        listed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError("CFG-380", f"{PATHS} is no JSON: {error}.", f"Give {_JSON}.") from None
    if not isinstance(listed, list):
        listed = [listed]
    wrong = [one for one in listed if not _is_model(one)]
    problems = [
        Problem("CFG-380", f"{PATHS} holds {json.dumps(one):.80}, and no path or list of paths.", f"Give {_JSON}.")
        for one in wrong
    ]
    raise_all(ConfigError, problems)
    return iter([NamedModel(PATHS, (one,) if isinstance(one, str) else tuple(one)) for one in listed])


def _is_model(one: Any) -> bool:
    if isinstance(one, list):
        return bool(one) and all(isinstance(path, str) and path for path in one)
    return isinstance(one, str) and one != ""
