"""Names of weights that others published, as names of this project, and the fingerprint of names and shapes."""

import hashlib
from collections.abc import Mapping, Sequence

from mm.wan.names import Convention, translate


def diffusers_to_native(name: str) -> str:
    return _to_native(name, "diffusers")


def mindspeed_to_native(name: str) -> str:
    return _to_native(name, "mm")


def _to_native(name: str, source: Convention) -> str:
    found = translate(name, source, "native")
    assert found is not None, f"{name} is no {source} name"
    return found


def key_shape_md5(shapes: Mapping[str, Sequence[int]]) -> str:
    """md5 of the sorted entries `name` and `name:d0_d1_...`, joined by commas.

    Source: DiffSynth-Studio's model detection, which publishes these md5s for every Wan model.
    """
    entries = [e for name, shape in shapes.items() for e in (name, f"{name}:{'_'.join(map(str, shape))}")]
    return hashlib.md5(",".join(sorted(entries)).encode(), usedforsecurity=False).hexdigest()
