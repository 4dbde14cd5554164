"""Origins of a run's values, and the words that its user has for them.

Sections are addressed by dotted paths, `optimizer.lr`. A dialect says for each path which of its words stands for it;
rules and reports look a path up here and so speak of what the user wrote.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mm.config.unread import Unread, UnreadError

RUN_FILE = "run.yaml"


def same(value: Any) -> Any:
    """The value, spelled as it is."""
    return value


@dataclass(frozen=True)
class Word:
    """The word of one value: a flag, or a key of a file.

    Attributes:
        name: `--lr`, or a key such as `num_heads` or `optimizer.lr`.
        file: the file that the key is in; empty for a flag.
        key: the key with its parents, `predictor.num_heads`; default: `name`.
        file_word: what the command line calls the file, `--mm-model`; empty where it calls it nothing.
        is_json: whether the key is in a JSON file, where it wears quotes.
        spelled: how the word's value is written for a value of the section; True and False of a flag are its being
            there or not.
    """

    name: str
    file: str = ""
    key: str = ""
    file_word: str = ""
    is_json: bool = False
    spelled: Callable[[Any], Any] = same

    def place(self) -> str:
        """`--lr`, or `num_heads in m.json`."""
        return f"{self.name} in {self.file}" if self.file else self.name

    def full(self) -> str:
        """`--lr`, or `predictor.num_heads in m.json`."""
        return f"{self.key or self.name} in {self.file}" if self.file else self.name

    def quoted(self) -> str:
        """`--lr`, or `"num_heads" in m.json`."""
        return f'"{self.name}" in {self.file}' if self.is_json else self.place()

    def of(self) -> str:
        """`--lr`, or `diffusion.shift of --mm-model`: the value without the name of a file."""
        return f"{self.key or self.name} of {self.file_word}" if self.file_word else self.key or self.name

    def assigned(self, value: Any) -> str:
        """Text that gives it a value: `--lr 0.1`, `--bf16`, `"dtype": "bf16"`, `optimizer.lr: 0.1`."""
        spelled = self.spelled(value)
        if not self.file:
            return self.name if spelled is True else f"{self.name} {_as_words(spelled)}"
        return f'"{self.name}": {_as_json(spelled)}' if self.is_json else f"{self.name}: {_as_yaml(spelled)}"

    def with_value(self, value: Any) -> str:
        """Words for a sentence: `--lr 0.1`, `--no-save-optim`, `optimizer.lr 0.1`."""
        spelled = self.spelled(value)
        if not self.file and isinstance(spelled, bool):
            return self.name
        return f"{self.name} {_as_yaml(spelled)}" if self.file else f"{self.name} {_as_words(spelled)}"

    def states(self, value: Any) -> str:
        """A whole sentence: `--bf16 is absent`, `--lr is 0.1`, `model.precision in run.yaml is bf16`."""
        spelled = self.spelled(value)
        if not self.file and isinstance(spelled, bool):
            return f"{self.name} is {'given' if spelled else 'absent'}"
        return f"{self.place()} is {_as_yaml(spelled)}"


@dataclass(frozen=True)
class Origins:
    """The words of a run's values.

    Attributes:
        words: by path; a path that is not there is a key of `file`.
        file: the run's own file.
        also: further words that say the same value again, such as a precision that a flag and a file both say.
    """

    words: Mapping[str, Word] = field(default_factory=dict)
    file: str = RUN_FILE
    also: Mapping[str, tuple[Word, ...]] = field(default_factory=dict)

    def __getitem__(self, path: str) -> Word:
        return self.words.get(path) or Word(path, self.file)

    def all_of(self, path: str) -> list[str]:
        """Every word that says a value: `["--load", "predictor.from_pretrained in i.json"]`."""
        return [word.full() for word in (self[path], *self.also.get(path, ()))]

    def whole(self, path: str) -> str:
        """The word for a section that has a file of its own, `--mm-data`; else the section's path."""
        first = next((word for name, word in self.words.items() if name.startswith(f"{path}.")), None)
        return first.file_word if first is not None else path

    def assigned(self, values: Mapping[str, Any]) -> str:
        """Text that gives values to several paths: flags on one line, then each key with its file.

        `--bf16 --global-batch-size 8 and "dtype": "bf16" in m.json`
        """
        order = {path: number for number, path in enumerate(self.words)}
        flags, keys = [], []
        for path in sorted(values, key=lambda path: order.get(path, len(order))):
            for word in (self[path], *self.also.get(path, ())):
                text = word.assigned(values[path])
                if word.file:
                    keys.append(f"{text} in {word.file}")
                else:
                    flags.append(text)
        return " and ".join([" ".join(flags)] * bool(flags) + keys)

    def grouped(self, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Values by file and word, for comparing what processes were started with.

        Args:
            values: by path.

        Returns:
            `{"flags": {"lr": 0.1}, "m.json": {"predictor.num_heads": 12}}`.
        """
        groups: dict[str, dict[str, Any]] = {}
        for path, value in values.items():
            word = self[path]
            name = word.key or word.name if word.file else word.name.lstrip("-").replace("-", "_")
            groups.setdefault(word.file or "flags", {})[name] = word.spelled(value)
        return groups


def _as_json(value: Any) -> str:
    _require_read(value)
    return json.dumps(value)


def _as_words(value: Any) -> str:
    _require_read(value)
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _as_yaml(value: Any) -> str:
    """Spelling of a value as a person writes it: bare words, numbers, lists; true, false and null."""
    return value if isinstance(value, str) else _as_json(value)


def _require_read(value: Any) -> None:
    """A sentence about a value is a use of it, which raises where it could not be read."""
    if isinstance(value, Unread):
        raise UnreadError
