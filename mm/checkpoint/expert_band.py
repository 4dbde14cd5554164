"""Noise levels that weights were trained on, where it is recorded beside them: of one of two experts a part of all.

diffusers' folders of two experts have that for much noise in `transformer` and that for little in `transformer_2`, and
`boundary_ratio` in model_index.json is the noise level between them. Checkpoints of a run record its objective, and
what is converted from them has it in a file beside the weights, which other systems do not look at.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

from mm.checkpoint.files import write_new
from mm.checkpoint.formats.training import STEPS_KEY
from mm.checkpoint.manifest import read_manifest
from mm.checkpoint.record import kind_of, read_record
from mm.config.base import load, load_json
from mm.config.diffusion import DiffusionConfig
from mm.config.run.experts import HIGH, LOW
from mm.config.run.origins import Origins
from mm.errors import ConfigError

logger = logging.getLogger(__name__)

INDEX, BOUNDARY = "model_index.json", "boundary_ratio"
BAND_NAME = "noise_levels.json"
"""File of the band of converted weights: the keys of the objective, `band_from` and `band_below`."""

Band = tuple[float, float]
"""Noise levels from the first on and below the second."""


def recorded_band(path: Path) -> Band | None:
    """The band of the weights at a path; None where nothing tells one.

    Args:
        path: a file or folder of weights, or a checkpoint of a run (`mm.checkpoint.formats.found.Found.path`).

    Raises:
        CheckpointError: CKPT-012 for a damaged checkpoint. ConfigError: CFG-001 and CFG-002 for a damaged index.
    """
    kind = kind_of(path)
    if kind is not None:
        steps = read_record(path).steps if kind == "torch" else read_manifest(path).scalars.get(STEPS_KEY)
        objective = (steps or {}).get("objective") or {}
        band = DiffusionConfig(band_from=objective.get("band_from"), band_below=objective.get("band_below")).band
        return None if band == (0.0, math.inf) else band
    beside = (path if path.is_dir() else path.parent) / BAND_NAME
    if beside.is_file():
        return load(DiffusionConfig, beside).band
    boundary = recorded_boundary(path)
    folder = path if path.is_dir() else path.parent
    if boundary is None or folder.name not in (HIGH, LOW):
        return None
    return (boundary, math.inf) if folder.name == HIGH else (0.0, boundary)


def write_band(folder: Path, source: Path) -> None:
    """Record in a folder that is being written the band of the weights that it is made from, if one is known.

    Args:
        folder: of the new weights. source: as for `recorded_band`.
    """
    band = recorded_band(source)
    if band is not None:
        low, high = band
        values = {"band_from": low or None, "band_below": None if high == math.inf else high}
        write_new(folder / BAND_NAME, json.dumps(values, indent=2) + "\n")


def recorded_boundary(path: Path) -> float | None:
    """The noise level between the experts of the diffusers folder that a path lies in; None where there is none."""
    folder = path if path.is_dir() else path.parent
    index = folder.parent / INDEX
    values = load_json(index) if index.is_file() else {}
    boundary = values.get(BOUNDARY) if isinstance(values, dict) else None
    return float(boundary) if isinstance(boundary, (int, float)) else None


def require_band(path: Path, objective: DiffusionConfig, words: Origins) -> None:
    """Check that weights which a run starts from were trained on noise levels that it draws.

    Where it draws others too, that is logged.

    Args:
        path: of the weights. objective: of the run. words: the user's.

    Raises:
        ConfigError: CFG-293 for weights of other noise levels, such as those of the other expert; and what
            `recorded_band` raises.
    """
    theirs, ours = recorded_band(path), objective.band
    if theirs is None or theirs == ours:
        return
    what = f"{path} was trained on noise levels {_said(theirs)}"
    if theirs[0] >= ours[1] or ours[0] >= theirs[1]:
        low, high = words["objective.band_from"].name, words["objective.band_below"].name
        found = f"{what}, and this run draws those {_said(ours)}: is it the other expert?"
        raise ConfigError("CFG-293", found, f"Name the other weights, or correct {low} and {high}.")
    logger.warning("%s, and this run draws those %s", what, _said(ours))


def _said(band: Band) -> str:
    low, high = band
    return f"from {low:g} on" if high == math.inf else f"from {low:g} to below {high:g}"
