"""Content of a file, as far as its tensors' names tell: a transformer's, an adapter's, an encoder's."""

from __future__ import annotations

from collections.abc import Sequence

from mm.checkpoint.encoder_kinds import encoder_of
from mm.checkpoint.formats.found import Content
from mm.errors import DataError
from mm.wan.adapter_keys import other_kinds, sort_keys
from mm.wan.names import convention
from mm.wan.prefixes import common_prefix, unwrapped


def content_of(names: Sequence[str]) -> tuple[Content, str]:
    """The content and how its names are spelled, from the names of all tensors.

    A name of a whole model makes it one: what is there beside shows when it is compared with the model.
    """
    if (encoder := encoder_of(names)) is not None:
        return "encoder", encoder.encoder.name
    prefix = common_prefix(names)
    try:
        return "model", f"{convention(unwrapped(name.removeprefix(prefix)) for name in names)} names"
    except DataError:  # no convention knows any name
        pass
    if (keys := sort_keys(names)) is not None:
        return "adapters", keys.spelling
    others = other_kinds(names)
    return ("adapters", next(iter(others))) if others else ("unknown", "")
