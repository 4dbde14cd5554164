"""Rules about where frozen weights are."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mm.config.run.generation import GenerationRun
from mm.config.run.residency import Residency
from mm.config.units import parse_bytes
from mm.config.unread import is_given
from mm.errors import Problem

NameOf = Callable[[str], str]
"""Field of the section -> the user's word for it."""


def residency_problems(residency: Residency, name_of: NameOf) -> Iterator[Problem]:
    """CFG-371 for sizes that are none, CFG-372 for values that contradict each other or have no effect."""
    for field in ("device_limit", "device_buffer", "host_limit"):
        text = getattr(residency, field)
        if is_given(text) and not _is_size(text):
            found = f"{name_of(field)} is {text!r}, and no size."
            yield Problem("CFG-371", found, "Give a number with kB, MB, GB, TB, or KiB to TiB: 24GiB.")
    limited, counted = is_given(residency.device_limit), is_given(residency.staying_parameters)
    if limited and counted:
        found = f"{name_of('device_limit')} and {name_of('staying_parameters')} say each what stays on the device."
        yield Problem("CFG-372", found, "Give one of them.")
    if is_given(residency.device_buffer) and not limited:
        found = f"{name_of('device_buffer')} has no effect without {name_of('device_limit')}."
        yield Problem("CFG-372", found, f"Remove it, or give {name_of('device_limit')}.")
    if is_given(residency.host_limit) and not (limited or counted):
        found = f"{name_of('host_limit')} has no effect while all weights stay on the device."
        yield Problem("CFG-372", found, f"Remove it, or give {name_of('device_limit')}.")


def residency_rules(run: GenerationRun) -> Iterator[Problem]:
    """CFG-371 and CFG-372 for a generation's section; CFG-375 beside layer-zero, which has the weights already."""
    words = run.origins
    yield from residency_problems(run.residency, lambda field: words[f"residency.{field}"].place())
    given = [
        field for field in ("device_limit", "staying_parameters", "fp8") if is_given(getattr(run.residency, field))
    ]
    if run.parallel.layerzero is not None and given:
        names = " and ".join(words[f"residency.{field}"].place() for field in given)
        found = f"{names} cannot be with layer-zero, which divides the weights over the processes itself."
        yield Problem("CFG-375", found, "Remove either; tensor parallelism divides weights that are copied, too.")


def _is_size(text: str) -> bool:
    try:
        parse_bytes(text)
    except ValueError:
        return False
    return True
