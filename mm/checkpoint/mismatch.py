"""The one report about weights of another model than the one that they are to be used for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mm.checkpoint.formats.source import WeightSource
from mm.config.model import WanConfig
from mm.config.run.origins import Word
from mm.errors import CheckpointError, ConfigError, MMError, Problem, raise_all
from mm.wan.model import whole_shapes


@dataclass(frozen=True)
class Expected:
    """The model that weights must be of.

    Attributes:
        config: its shape. word: the user's word for one of its fields.
        id, error, remedy: of the error about weights that say another one.
    """

    config: WanConfig
    word: Callable[[str], Word]
    id: str
    error: type[MMError] = ConfigError
    remedy: str = "Correct it, or name other weights."

    def require_config(self, place: object, theirs: WanConfig, *, text_len: bool = False) -> None:
        """Compare a configuration alone.

        Args:
            place: where the weights are. theirs: what they say.
            text_len: whether the number of text tokens must be the same too, which is a run's and not of weights.

        Raises:
            MMError: one problem for each value that differs.
        """
        fields = theirs.differing_fields(self.config)
        if text_len and theirs.text_len != self.config.text_len:
            fields = [*fields, "text_len"]
        problems = [
            f"{place} has {name} {getattr(theirs, name)}, and {self.word(name).full()} is {getattr(self.config, name)}."
            for name in fields
        ]
        raise_all(self.error, [Problem(self.id, message, self.remedy) for message in problems])

    def require(self, source: WeightSource) -> None:
        """Compare the configuration that weights have, if they have one, and all tensors.

        Raises:
            MMError: as `require_config`.
            CheckpointError: CKPT-011 for missing, unexpected or mis-shaped tensors.
        """
        theirs = source.config()
        if theirs is not None:
            self.require_config(source.path, theirs)
        require_exactly(source, whole_shapes(self.config))


def require_exactly(source: WeightSource, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check that `source` holds exactly the tensors of `expected` (native name to shape).

    Raises:
        CheckpointError: CKPT-011.
    """
    found = source.shapes()
    raise_on_mismatch(
        f"{source.path} ({source.label})",
        sorted(expected.keys() - found.keys()),
        sorted(found.keys() - expected.keys()),
        [
            f"{name} is {list(found[name])} there, {list(shape)} here"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ],
    )


def raise_on_mismatch(source: str, missing: Sequence[str], unexpected: Sequence[str], different: Sequence[str]) -> None:
    """Raise the one error about tensors that do not fit, with the counts and the first ten lines of each kind.

    Args:
        source: what was loaded from.
        missing: names that the model has and the source has not.
        unexpected: names that the source has and the model has not.
        different: lines about tensors whose shape or dtype differs.

    Raises:
        CheckpointError: CKPT-011 unless all three are empty.
    """
    kinds = {"missing": missing, "unexpected": unexpected, "different": different}
    if not any(kinds.values()):
        return
    counts = ", ".join(f"{len(lines)} {kind}" for kind, lines in kinds.items())
    details = "; ".join(
        f"{kind}: {', '.join(lines[:10])}{', ...' if len(lines) > 10 else ''}" for kind, lines in kinds.items() if lines
    )
    raise CheckpointError(
        "CKPT-011",
        f"{source} does not match the model: {counts}. {details}.",
        "Check that the model's configuration is that of the weights.",
    )
