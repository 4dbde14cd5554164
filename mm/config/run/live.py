"""The section `live`: features that are made in the training process, and kept."""

from __future__ import annotations

from pydantic import Field

from mm.config.base import Section


class LiveSection(Section):
    """Features that are made while training goes on.

    Attributes:
        extractions: files that describe an extraction each, as `mm run` takes them; the stores that they write to are
            among the features that are trained on.
        budget: what the features that are kept may take on the disk, `20GB`; None for no limit.
    """

    extractions: tuple[str, ...] = Field(min_length=1)
    budget: str | None = None
