"""Telling weights apart cheaply: sixteen digits that change when the weights are others."""

from __future__ import annotations

import hashlib
import json

from mm.checkpoint.formats.source import WeightSource
from mm.checkpoint.formats.training import TrainingWeights
from mm.checkpoint.safetensor_file import DTYPE_NAMES, bytes_of

_PLACES = 3
_ELEMENTS = 64


def identity(source: WeightSource) -> str:
    """Sixteen hexadecimal digits of a model's configuration, tensors and some of their values.

    Of every tensor 64 elements at its begin, its middle and its end count: training changes all elements of what it
    trains, so other weights differ in these, and about 10 MB of a 14B model are read. Of a training checkpoint the
    SHA-256 of its files count. Where files lie, how they are cut and a format's names make no difference.

    Args:
        source: any weights; their format is no part of the result, a training checkpoint's apart.
    """
    digest = hashlib.sha256()
    config = source.config()
    if config is not None:
        digest.update(config.model_dump_json(exclude={"text_len"}).encode())  # of a run, not of weights
    if isinstance(source, TrainingWeights):
        files = {name: record.sha256 for name, record in source.manifest.files.items()}
        digest.update(json.dumps(files, sort_keys=True).encode())
        return digest.hexdigest()[:16]
    for name, kind in sorted(source.kinds().items()):
        digest.update(f"{name} {DTYPE_NAMES[kind.dtype]} {list(kind.shape)}:".encode())
        flat = source.read(name).reshape(-1)
        for place in range(_PLACES):
            start = (len(flat) - _ELEMENTS) * place // (_PLACES - 1) if len(flat) > _ELEMENTS else 0
            digest.update(bytes_of(flat[start : start + _ELEMENTS]))
    return digest.hexdigest()[:16]
