"""run.yaml on a command line, in the place of another system's flags and files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mm.config.flags import Flags, flag_name
from mm.config.run.file import kind_of
from mm.config.yaml_file import load_yaml
from mm.dialects.mindspeed.paths import path_of
from mm.errors import ConfigError, Problem, raise_all


def run_file(argv: Sequence[str], options: type[Flags]) -> tuple[Path, list[str]] | None:
    """The run.yaml that a command line begins with, and the command's own flags behind it; None without such a file.

    Args:
        argv: the words. options: flags that may stand beside the file.

    Raises:
        ConfigError: CFG-190 for flags that the file has a key for.
    """
    if not argv or not argv[0].endswith((".yaml", ".yml")):
        return None
    file, known = Path(argv[0]), {flag_name(field) for field in options.model_fields}
    kind = kind_in(file)
    names = [word.partition("=")[0] for word in argv if word.startswith("--")]
    foreign = [name for name in names if name not in known and path_of(name, kind) is not None]
    raise_all(ConfigError, [flag_beside_a_file(name, kind) for name in foreign])
    return file, list(argv[1:])


def kind_in(file: Path) -> str:
    """The kind of run that a file describes; `training` where it cannot be read, which is told of later."""
    try:
        return kind_of(load_yaml(file))
    except ConfigError:
        return kind_of({})


def flag_beside_a_file(flag: str, kind: str) -> Problem:
    """CFG-190: a flag beside a run.yaml, which has all values of a run of that kind."""
    path = path_of(flag, kind)
    instead = f"Write {path} into the file" if path is not None else "Write what it means into the file"
    found = f"{flag} is a word of another command line, and run.yaml has all of a run."
    return Problem("CFG-190", found, f"{instead}; mm translate -- COMMAND shows where each flag goes.")
