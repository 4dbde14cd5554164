"""Parts of a model that a run trains while the others are frozen, alone or beside adapters."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from mm.config.run.origins import Word
from mm.config.run.training import TrainingRun
from mm.config.trainable import TrainablePattern, names_by_pattern, patterns_of
from mm.errors import ConfigError, Problem, raise_all
from mm.lora.plan import LoRAPlan, plan_of
from mm.parallel.placement import Shape, whole_shapes
from mm.parallel.trainable_extension import TrainableExtension
from mm.wan.model import WanModel

_SHOWN = 3


@dataclass(frozen=True)
class TrainedParts:
    """Parameters of the model's own that are trained.

    Attributes:
        shapes: of the whole parameters, by native name, in the model's order.
        lr_scales: factors of the learning rate, of those that have another than 1.
        total: elements of the whole model.
    """

    shapes: Mapping[str, Shape]
    lr_scales: Mapping[str, float]
    total: int

    @property
    def parameters(self) -> int:
        """Elements that are trained."""
        return sum(map(math.prod, self.shapes.values()))


@dataclass(frozen=True)
class TrainedModel:
    """Choice of what is trained of a model: adapters, parts of its own parameters, both; or all of it, with neither.

    Attributes:
        lora: the adapters. parts: parameters of the model's own beside which all others are frozen.
    """

    lora: LoRAPlan | None = None
    parts: TrainedParts | None = None

    def extension(self) -> TrainableExtension | None:
        """Extension that `mm.parallel.apply.apply` adds to a model; None where all parameters are trained."""
        added = None if self.lora is None else self.lora.extension()
        if self.parts is None:
            return added
        freeze = partial(_thaw, self.parts.shapes) if added is None else partial(_add_and_thaw, added, self.parts)
        shapes, trained = ({}, {}) if added is None else (added.shapes, added.trained)
        return TrainableExtension(freeze, shapes, {**self.parts.shapes, **trained}, self.parts.lr_scales)

    @property
    def share(self) -> float:
        """Share of the model's own parameters that are trained."""
        if self.parts is not None:
            return self.parts.parameters / self.parts.total
        return 0.0 if self.lora is not None else 1.0

    def elements(self, whole: int) -> int:
        """Elements that are trained, of a model of `whole` elements."""
        if self.lora is None and self.parts is None:
            return whole
        return sum(one.parameters for one in (self.lora, self.parts) if one is not None)


def trained_model(run: TrainingRun) -> TrainedModel:
    """The parts and adapters that a checked run trains.

    Raises:
        ConfigError: CFG-100, CFG-101 and CFG-427 for the targets of adapters, CFG-420 to CFG-422 and CFG-424 for what
            is trained beside them; all problems at once.
    """
    problems = list[Problem]()
    lora, parts = None, None
    try:
        words = (run.origins[f"adapters.{name}"].name for name in ("targets", "skip"))
        lora = plan_of(run.adapters, run.wan, *words)
    except ConfigError as error:
        problems += error.problems
    if run.training.trainable:
        shapes, word = whole_shapes(run.wan), run.origins["training.trainable"].name
        patterns = patterns_of(run.training.trainable)
        named = names_by_pattern(patterns, shapes)
        problems += _without_effect(patterns, named, list(shapes), word)
        parts = _parts(patterns, named, shapes)
        problems += _both_ways(parts, lora, word, run.origins["adapters.targets"].name)
        problems += _in_low_bits(parts, lora, word, run.origins["adapters.base_dtype"])
    raise_all(ConfigError, problems)
    return TrainedModel(lora, parts)


def _parts(
    patterns: Sequence[TrainablePattern], named: Sequence[Sequence[str]], shapes: Mapping[str, Shape]
) -> TrainedParts:
    scale_of = {name: pattern.lr_scale for pattern, names in zip(patterns, named, strict=True) for name in names}
    trained = {name: shape for name, shape in shapes.items() if name in scale_of}
    scales = {name: scale for name, scale in scale_of.items() if scale != 1}
    return TrainedParts(trained, scales, sum(map(math.prod, shapes.values())))


def _thaw(names: Mapping[str, Shape], model: WanModel) -> None:
    """Freeze a stage but for its parameters of these names."""
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(True)


def _add_and_thaw(added: TrainableExtension, parts: TrainedParts, model: WanModel) -> None:
    """Add adapters to a stage, which freezes it, and have its parameters of these names trained beside them."""
    added.prepare(model)
    for name, parameter in model.named_parameters():
        if name in parts.shapes:
            parameter.requires_grad_(True)


def _without_effect(
    patterns: Sequence[TrainablePattern], named: Sequence[Sequence[str]], names: Sequence[str], word: str
) -> Iterator[Problem]:
    """CFG-420: a pattern in no name. CFG-421: one in names that earlier patterns have all been in."""
    for index, (pattern, own) in enumerate(zip(patterns, named, strict=True)):
        if own:
            continue
        found = [name for name in names if pattern.is_in(name)]
        if not found:
            message = f"{word} {pattern.text!r} is in the name of no parameter of the model."
            yield Problem("CFG-420", message, _names_there(pattern.text, names))
            continue
        earlier = [other.text for other in patterns[:index] if any(other.is_in(name) for name in found)]
        message = f"{word} {pattern.text!r} has no effect: {' and '.join(map(repr, earlier))}, before it, "
        yield Problem(
            "CFG-421",
            f"{message}{'is' if len(earlier) == 1 else 'are'} in the names of all of its parameters.",
            "Put it first, or remove it.",
        )


def _names_there(text: str, names: Sequence[str]) -> str:
    """Remedy that says what the parameters are called, without the numbers of blocks."""
    of_block = re.compile(r"^(?:vace_)?blocks\.\d+\.")
    ends = dict.fromkeys(name.removesuffix(".weight").removesuffix(".bias") for name in names)
    modules = dict.fromkeys(of_block.sub("", end) for end in ends)
    known = [*dict.fromkeys(part for module in modules for part in (module, *module.split("."))), *ends]
    close = difflib.get_close_matches(text.strip("^."), [part for part in known if len(part) > 1], n=_SHOWN)
    meant = f"Did you mean {' or '.join(close)}? " if close else ""
    tops = dict.fromkeys(name.split(".")[0] for name in names)
    in_block = dict.fromkeys(of_block.sub("", end) for end in ends if of_block.match(end))
    return f"{meant}Names begin with {', '.join(tops)}, and in a block they go on with {', '.join(in_block)}."


def _both_ways(parts: TrainedParts, lora: LoRAPlan | None, word: str, targets: str) -> Iterator[Problem]:
    """CFG-422: linears that are trained themselves and have an adapter too."""
    adapted = [] if lora is None else [name for name in lora.adapted if f"{name}.weight" in parts.shapes]
    if adapted:
        shown = ", ".join(adapted[:_SHOWN]) + (", ..." if len(adapted) > _SHOWN else "")
        found = f"{len(adapted)} linears have an adapter ({targets}) and are trained themselves ({word}): {shown}."
        yield Problem("CFG-422", found, f"Leave them out of {word}, or of {targets}.")


def _in_low_bits(parts: TrainedParts, lora: LoRAPlan | None, word: str, base_dtype: Word) -> Iterator[Problem]:
    """CFG-424: linears of the base that are kept in 8 bits, which have no gradient."""
    if lora is None or lora.base_dtype is None:
        return
    linears = [name for name in lora.linears if {f"{name}.weight", f"{name}.bias"} & parts.shapes.keys()]
    if linears:
        said = base_dtype.with_value(lora.base_dtype)
        found = f"{word} trains {len(linears)} linears ({linears[0]}, ...) that {said} keeps in 8 bits."
        yield Problem("CFG-424", found, f"Remove {base_dtype.name}, or leave the linears of the blocks out of {word}.")
