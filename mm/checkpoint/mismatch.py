"""The one report about tensors that do not fit what they are loaded into."""

from __future__ import annotations

from collections.abc import Sequence

from mm.errors import CheckpointError


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
