"""run.yaml: the sections of a run as a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel

from mm.config.run.base import Run, RunT, written
from mm.config.run.extraction import ExtractionRun
from mm.config.run.generation import GenerationRun
from mm.config.run.origins import Origins
from mm.config.run.training import TrainingRun
from mm.config.unread import Unread, parse_parts, partly, section_of
from mm.config.yaml_file import load_yaml
from mm.errors import ConfigError, raise_all

KINDS: dict[str, type[Run]] = {"training": TrainingRun, "extraction": ExtractionRun, "generation": GenerationRun}
"""Kinds of run, each by the section that it alone has."""


def kind_of(values: Any) -> str:
    """The kind of run, a key of `KINDS`, that a file's values describe; a training where nothing says another."""
    return next((name for name in KINDS if isinstance(values, dict) and name in values), "training")


def load_run(path: Path, world_size: int = 1) -> Run:
    """Read run.yaml of any kind, with all that is wrong in it; not yet checked by the rules.

    Raises:
        ConfigError: what `mm.config.yaml_file.load_yaml` raises.
    """
    values = load_yaml(path)
    kind = KINDS[kind_of(values)]
    sections, problems = parse_parts(kind.sections, values, str(path))
    if isinstance(sections, Unread):  # a list, or one word
        sections = partly(kind.sections)
    return kind.described(sections, Origins(file=str(path)), world_size, tuple(problems))


def load_training(path: Path, world_size: int = 1) -> TrainingRun:
    """Read run.yaml of a training; not yet checked by the rules.

    Raises:
        ConfigError: what `load_run` raises, what is wrong in it, and CFG-194 for a run of another kind.
    """
    run = load_run(path, world_size)
    raise_all(ConfigError, run.problems)
    return of_kind(run, TrainingRun)


def of_kind(run: Run, kind: type[RunT]) -> RunT:
    """A run, which must be of one kind.

    Raises:
        ConfigError: CFG-194 for one of another.
    """
    if isinstance(run, kind):
        return run
    found, expected = (next(name for name, known in KINDS.items() if known is one) for one in (type(run), kind))
    raise ConfigError(
        "CFG-194",
        f"{run.origins.file} describes a run of {found}, and one of {expected} is asked for.",
        "Name such a file.",
    )


def resolved(run: TrainingRun) -> TrainingRun:
    """The run with what its defaults leave to its processes and its other values filled in."""
    own = run.optimizer.filled()
    filled: dict[str, Any] = {f"optimizer.{name}": getattr(own, name) for name in ("beta1", "beta2", "eps")}
    filled["optimizer.decay_steps"] = own.decay_steps or run.training.steps
    if run.dp is not None:
        filled["data.global_batch_size"] = run.samples_of_step(run.dp)
    return run.changed(filled)


def whole_file(run: Run) -> str:
    """run.yaml with every value, so that another version's defaults change nothing."""
    name = next(name for name, kind in KINDS.items() if kind is type(run))
    head = f"# A run of {name} on {run.world_size} processes. `mm run` with this file goes on with it.\n"
    return head + "\n".join(_lines(run.sections, written(run))) + "\n"


def short_file(run: Run) -> str:
    """run.yaml with the values that are no defaults, each with the user's word for it behind it, where it has one."""
    return "\n".join(_lines(run.sections, written(run), run.origins)) + "\n"


def _lines(
    section: type[BaseModel], values: Mapping[str, Any], origins: Origins | None = None, path: str = ""
) -> Iterator[str]:
    """The lines of a section; with `origins` the short form."""
    indent = "  " * path.count(".")
    for name, value in values.items():
        inner, info = section_of(section, name, value), section.model_fields[name]
        if _has_no_choice(info.annotation) and not info.is_required():
            continue
        if inner is not None and value is not None:
            lines = list(_lines(inner, value, origins, f"{path}{name}."))
            if lines or info.is_required() or not isinstance(info.annotation, type):
                yield f"{indent}{name}:" if lines else f"{indent}{name}: {{}}"
                yield from lines
        elif origins is None:
            yield f"{indent}{name}: {_text(value)}"
        elif info.is_required() or value != _plain_default(info.get_default(call_default_factory=True)):
            word = f"  # {origins[path + name].full()}" if path + name in origins.words else ""
            yield f"{indent}{name}: {_text(value)}{word}"


def _plain_default(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _has_no_choice(annotation: Any) -> bool:
    """Recognise a field with one value that may be said out loud."""
    return annotation is type(None) or (get_origin(annotation) is Literal and len(get_args(annotation)) == 1)


def _text(value: Any) -> str:
    """A value on one line, which YAML reads as the same again."""
    whole = yaml.safe_dump([value], default_flow_style=True, width=float("inf"), allow_unicode=True)
    return str(whole).strip()[1:-1]
