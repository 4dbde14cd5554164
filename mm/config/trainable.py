"""Words of `training.trainable`: parameters that are trained, by what is in their names, and how fast.

`self_attn` names every parameter with that in its native name, `^blocks.` those that begin with it, `.` all. A factor
may follow, `ffn:0.5`, which scales the learning rate wherever it stands. Of several words the first that is in a name
counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator

_START = "^"
_FACTOR = ":"


@dataclass(frozen=True)
class TrainablePattern:
    """One word.

    Attributes:
        text: as it stands before the factor. lr_scale: the factor, above 0.
    """

    text: str
    lr_scale: float = 1.0

    @classmethod
    def of(cls, word: str) -> TrainablePattern:
        """The pattern that a word is; ValueError for anything else."""
        text, separator, factor = word.partition(_FACTOR)
        lr_scale = float(factor) if separator else 1.0
        if not text.removeprefix(_START) or any(character.isspace() for character in text):
            raise ValueError("expected part of a parameter's name")
        if not (math.isfinite(lr_scale) and lr_scale > 0):
            raise ValueError("expected a factor above 0")
        return cls(text, lr_scale)

    def is_in(self, name: str) -> bool:
        """Tell whether it names the parameter of this native name."""
        anchored = self.text.startswith(_START)
        return name.startswith(self.text[len(_START) :]) if anchored else self.text in name


def _checked(word: str) -> str:
    try:
        TrainablePattern.of(word)
    except ValueError:
        raise ValueError("expected part of a parameter's name, and after a colon a factor above 0") from None
    return word


TrainableWord = Annotated[str, AfterValidator(_checked)]
"""A word as a section or a flag has it."""


def patterns_of(words: Sequence[str]) -> list[TrainablePattern]:
    """The patterns of checked words."""
    return [TrainablePattern.of(word) for word in words]


def names_by_pattern(patterns: Sequence[TrainablePattern], names: Iterable[str]) -> list[list[str]]:
    """The parameters that each pattern is the first to name, in the order of `names`."""
    found: list[list[str]] = [[] for _ in patterns]
    for name in names:
        first = next((index for index, pattern in enumerate(patterns) if pattern.is_in(name)), None)
        if first is not None:
            found[first].append(name)
    return found
