"""Inspection of a path: the format of weights or an adapter, the model, its tensors, and what is wrong with them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mm.checkpoint.formats.folder import FolderWeights
from mm.checkpoint.formats.mindspeed import MindSpeedWeights
from mm.checkpoint.formats.source import WeightSource
from mm.checkpoint.formats.training import DECAY_KEY, TrainingWeights
from mm.checkpoint.identify import Found, identify
from mm.checkpoint.mismatch import require_exactly
from mm.checkpoint.safetensor_file import DTYPE_NAMES
from mm.checkpoint.weights import open_weights
from mm.config.model import PUBLISHED, WanConfig
from mm.errors import CheckpointError, DataError, MMError
from mm.lora.convert import read_any
from mm.wan.config_json import infer_config
from mm.wan.model import whole_shapes


@dataclass(frozen=True)
class Inspection:
    """Findings about a path.

    Attributes:
        path: what was opened, which may be below what was asked for. format: in words.
        model: a published model, or the sizes of another. step: of a training run.
        ema_decay: of the averaged weights that are there too.
        num_tensors, num_parameters: counts; num_bytes: of the tensors alone. dtypes: parameters of each dtype.
        files: relative to `path` where they are below it. problems: as errors print them.
    """

    path: str
    format: str
    model: str = "unknown"
    step: int | None = None
    ema_decay: float | None = None
    num_tensors: int = 0
    num_parameters: int = 0
    num_bytes: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Values for a file or a program."""
        return asdict(self)


def inspect(path: Path) -> tuple[Inspection, MMError | None]:
    """Look at weights or an adapter without changing anything; of tensors only the headers are read.

    Returns:
        What was found, and the error that using it for a model would give, or None.
    """
    try:
        found = identify(path)
        if found.content == "adapters":
            return _adapter(found)
        source = open_weights(found)
    except (CheckpointError, DataError) as error:
        return _unusable(path, error), error
    config, problem = _config(source)
    kinds = source.kinds()
    dtypes: Counter[str] = Counter()
    num_bytes = 0
    for kind in kinds.values():
        dtypes[DTYPE_NAMES.get(kind.dtype, str(kind.dtype))] += math.prod(kind.shape)
        num_bytes += math.prod(kind.shape) * kind.dtype.itemsize
    about = Inspection(
        path=str(source.path),
        format=_format(source),
        model="unknown" if config is None else _model(config),
        step=found.step,
        ema_decay=source.manifest.scalars.get(DECAY_KEY) if isinstance(source, TrainingWeights) else None,
        num_tensors=len(kinds),
        num_parameters=sum(dtypes.values()),
        num_bytes=num_bytes,
        dtypes=dict(dtypes.most_common()),
        files=_files(source, found),
        problems=[] if problem is None else [str(line) for line in problem.problems],
    )
    return about, problem


def _config(source: WeightSource) -> tuple[WanConfig | None, MMError | None]:
    """The model's shape, from the tensors where the format does not say it; and what is wrong with the tensors."""
    try:
        config = source.config() or infer_config(source.shapes(), source.path)
    except (CheckpointError, DataError) as error:
        return None, error
    try:
        require_exactly(source, whole_shapes(config))
    except CheckpointError as error:
        return config, error
    return config, None


def _model(config: WanConfig) -> str:
    known = [name for name, published in PUBLISHED.items() if not config.differing_fields(published)]
    sizes = f"{config.task.name}, width {config.hidden_size}, {config.num_layers} blocks, {config.num_heads} heads"
    return known[0] if known else sizes


def _format(source: WeightSource) -> str:
    if isinstance(source, MindSpeedWeights) and source.num_ranks > 1:
        chunks = f", {source.num_chunks} model chunks each" if source.num_chunks > 1 else ""
        return f"{source.label}, {source.num_ranks} pipeline ranks{chunks}"
    return source.label


def _files(source: WeightSource, found: Found) -> list[str]:
    if isinstance(source, TrainingWeights):
        return sorted(source.manifest.files)
    if isinstance(source, FolderWeights):
        return [shard.name for shard in source.folder.shards]
    if isinstance(source, MindSpeedWeights):
        return sorted({str(place.file.relative_to(source.path)) for place in source.places.values()})
    return list(found.files)


def _adapter(found: Found) -> tuple[Inspection, None]:
    """Inspection of an adapter; raises what `read_any` raises."""
    adapter = read_any(found)
    dtypes = Counter[str]()
    num_bytes = 0
    for value in adapter.parameters().values():
        dtypes[DTYPE_NAMES.get(value.dtype, str(value.dtype))] += value.numel()
        num_bytes += value.numel() * value.element_size()
    ranks = sorted({update.rank for update in adapter.updates.values()})
    alphas = sorted({update.alpha for update in adapter.updates.values()})
    about = Inspection(
        path=str(found.asked),
        format="a LoRA adapter",
        model=f"{len(adapter.updates)} linears, r {', '.join(map(str, ranks))}, alpha "
        f"{', '.join(f'{alpha:g}' for alpha in alphas)}",
        num_tensors=len(adapter.parameters()),
        num_parameters=sum(dtypes.values()),
        num_bytes=num_bytes,
        dtypes=dict(dtypes.most_common()),
    )
    return about, None


def _unusable(path: Path, error: MMError) -> Inspection:
    return Inspection(str(path), "unknown", problems=[str(problem) for problem in error.problems])
