"""run.yaml: the sections of a training run as a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel

from mm.config.base import parse
from mm.config.run.origins import Origins
from mm.config.run.training import TrainingRun, TrainingSections, section_of, training_run, written
from mm.config.yaml_file import load_yaml


def load_training(path: Path, world_size: int = 1) -> TrainingRun:
    """Read run.yaml, not yet checked by the rules.

    Raises:
        ConfigError: what `mm.config.yaml_file.load_yaml` and `mm.config.base.parse` raise.
    """
    sections = parse(TrainingSections, load_yaml(path), str(path))
    return training_run(sections, Origins(file=str(path)), world_size)


def resolved(run: TrainingRun) -> TrainingRun:
    """The run with what its defaults leave to its processes and its other values filled in."""
    own = run.optimizer.filled()
    filled: dict[str, Any] = {f"optimizer.{name}": getattr(own, name) for name in ("beta1", "beta2", "eps")}
    filled["optimizer.decay_steps"] = own.decay_steps or run.training.steps
    if run.dp is not None:
        filled["data.global_batch_size"] = run.samples_of_step(run.dp)
    return run.changed(filled)


def whole_file(run: TrainingRun) -> str:
    """run.yaml with every value, so that another version's defaults change nothing."""
    head = f"# A training run on {run.world_size} processes. `mm run` with this file goes on with it.\n"
    return head + "\n".join(_lines(TrainingSections, written(run))) + "\n"


def short_file(run: TrainingRun) -> str:
    """run.yaml with the values that are no defaults, each with the user's word for it behind it."""
    return "\n".join(_lines(TrainingSections, written(run), run.origins)) + "\n"


def _lines(
    section: type[BaseModel], values: Mapping[str, Any], origins: Origins | None = None, path: str = ""
) -> Iterator[str]:
    """The lines of a section; with `origins` the short form."""
    indent = "  " * path.count(".")
    for name, value in values.items():
        inner, info = section_of(section, name), section.model_fields[name]
        if _has_no_choice(info.annotation):
            continue
        if inner is not None and value is not None:
            lines = list(_lines(inner, value, origins, f"{path}{name}."))
            if lines or info.is_required() or not isinstance(info.annotation, type):
                yield f"{indent}{name}:" if lines else f"{indent}{name}: {{}}"
                yield from lines
        elif origins is None:
            yield f"{indent}{name}: {_text(value)}"
        elif info.is_required() or value != _plain_default(info.get_default(call_default_factory=True)):
            yield f"{indent}{name}: {_text(value)}  # {origins[path + name].full()}"


def _plain_default(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _has_no_choice(annotation: Any) -> bool:
    """Whether a field has one value that may be said out loud."""
    return annotation is type(None) or (get_origin(annotation) is Literal and len(get_args(annotation)) == 1)


def _text(value: Any) -> str:
    """A value on one line, which YAML reads as the same again."""
    whole = yaml.safe_dump([value], default_flow_style=True, width=float("inf"), allow_unicode=True)
    return str(whole).strip()[1:-1]
