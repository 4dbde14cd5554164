"""Linears of a Wan model that the words of `--lora-target-modules` name.

A word names linears by the end of their name, cut at dots: `q` is `self_attn.q` and `cross_attn.q` of every block. It
may be spelled in any of the three conventions (`mm.wan.names`): `q`, `proj_q` and `to_q` are the same.

Only linears of the blocks can have an adapter. So `proj_out` means MindSpeed-MM's name of the attention's output and
not diffusers' name of the head.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

from mm.errors import ConfigError, Problem, raise_all
from mm.wan.names import CONVENTIONS, Convention, translate

FLAG, SKIP_FLAG = "--lora-target-modules", "--lora-skip-modules"
Sizes = tuple[int, int]
"""(out_features, in_features) of a linear."""


def linears_of(shapes: Mapping[str, Sequence[int]]) -> dict[str, Sizes]:
    """The linears that can have an adapter, in the order of `shapes`.

    Args:
        shapes: shape of every parameter of the model by native name.

    Returns:
        Native module name, for example `blocks.0.self_attn.q`, to (out_features, in_features).
    """
    return {name: sizes for name, sizes in every_linear(shapes).items() if _IN_BLOCK.match(name)}


_IN_BLOCK = re.compile(r"(vace_)?blocks\.\d+\.(self_attn|cross_attn|ffn)\.")


def every_linear(shapes: Mapping[str, Sequence[int]]) -> dict[str, Sizes]:
    """All linears of a model, those outside the blocks too, which adapters of other tools may be of.

    Args and result: as of `linears_of`.
    """
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2
    }


def target_linears(words: Sequence[str], linears: Mapping[str, Sizes], flag: str = FLAG) -> list[str]:
    """The linears that the words name, each once, in the order of `linears`.

    Args:
        words: the targets. linears: from `linears_of` the whole model. flag: what the user calls the targets.

    Raises:
        ConfigError: CFG-100 for a word that names no linear, CFG-101 for one that names different linears in different
            conventions; all bad words at once.
    """
    spelled = {convention: _spelled(linears, convention) for convention in CONVENTIONS}
    found: set[str] = set()
    problems: list[Problem] = []
    if not words:
        problems.append(Problem("CFG-100", f"{flag} names nothing.", f"Give it words such as {_examples(spelled)}."))
    for word in words:
        meanings = {convention: _ending_in(word, names) for convention, names in spelled.items()}
        distinct = {frozenset(meaning) for meaning in meanings.values() if meaning}
        if not distinct:
            problems.append(_matches_nothing(f"{flag} {word!r}", word, spelled))
        elif len(distinct) > 1:
            problems.append(_ambiguous(f"{flag} {word!r}", meanings))
        else:
            found |= distinct.pop()
    raise_all(ConfigError, problems)
    return [name for name in linears if name in found]


def without_skipped(names: Sequence[str], words: Sequence[str], flag: str = SKIP_FLAG) -> list[str]:
    """The linears whose native name contains none of the words, in their order.

    Args:
        names: from `target_linears`. words: what is left out. flag: what the user calls these.

    Raises:
        ConfigError: CFG-427 for words that are in no name, all at once, and where nothing is left.
    """
    problems = [
        Problem("CFG-427", f"{flag} {word!r} is in the name of no linear that would get an adapter.", "Remove it.")
        for word in words
        if not word or not any(word in name for name in names)
    ]
    left = [name for name in names if not any(word in name for word in words)]
    if not left and not problems:
        said = " ".join(words)
        problems.append(Problem("CFG-427", f"{flag} {said} leaves no linear with an adapter.", "Remove some of it."))
    raise_all(ConfigError, problems)
    return left


def _spelled(linears: Mapping[str, Sizes], convention: Convention) -> dict[str, str]:
    """A convention's name of every linear to the native one."""
    names = {}
    for native in linears:
        other = translate(f"{native}.weight", "native", convention)
        if other is not None:
            names[other.removesuffix(".weight")] = native
    return names


def _ending_in(word: str, names: Mapping[str, str]) -> list[str]:
    return [native for name, native in names.items() if name == word or name.endswith(f".{word}")]


def _endings(names: Mapping[str, str]) -> list[str]:
    """Every word that would name linears, without those of one block only."""
    inside = (name.split(".")[2:] for name in names)
    return list(dict.fromkeys(".".join(parts[start:]) for parts in inside for start in range(len(parts))))


def _examples(spelled: Mapping[Convention, Mapping[str, str]]) -> str:
    native = dict.fromkeys(name.split(".", 2)[2] for name in spelled["native"])
    return ", ".join(native)


def _matches_nothing(said: str, word: str, spelled: Mapping[Convention, Mapping[str, str]]) -> Problem:
    known = list(dict.fromkeys(ending for names in spelled.values() for ending in _endings(names)))
    close = difflib.get_close_matches(word, known, n=3)
    remedy = f"Did you mean {' or '.join(close)}?" if close else f"The linears of a block are {_examples(spelled)}."
    return Problem("CFG-100", f"{said} names no linear of the model's blocks.", remedy)


def _ambiguous(said: str, meanings: Mapping[Convention, Sequence[str]]) -> Problem:
    shown = "; ".join(f"{convention}: {', '.join(names[:2])}, ..." for convention, names in meanings.items() if names)
    return Problem(
        "CFG-101",
        f"{said} names different linears in different conventions ({shown}).",
        "Give more of the name, for example ffn.0 or to_out.0.",
    )
