"""pretrain_model.json of training, and model_wan.json and tools.json of feature extraction, read and checked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from mm.config.base import Section, load_json, parse
from mm.config.extract import ExtractAutoencoder, ExtractModel, ExtractTools, TilingParam
from mm.dialects.mindspeed.accepted import Kind, Note, settle
from mm.dialects.mindspeed.train_flags import PretrainModel
from mm.errors import ConfigError, Problem, raise_all

SectionT = TypeVar("SectionT", bound=Section)


def load_pretrain_model(path: Path, notes: list[Note] | None = None) -> PretrainModel:
    """Read and check pretrain_model.json.

    Args:
        path: the file. notes: gets what is taken as it is done here anyway, and what goes by another name here.

    Raises:
        ConfigError: what `mm.config.base.load_json` and `mm.config.base.parse` raise.
    """
    return _load(PretrainModel, path, "pretrain_model.json", notes)


def load_extract_model(path: Path, notes: list[Note] | None = None) -> ExtractModel:
    """Read and check model_wan.json; takes what `load_pretrain_model` does.

    Raises:
        ConfigError: what that raises, CFG-055 for tiles that cannot work; all at once.
    """
    model = _load(ExtractModel, path, "model_wan.json", notes)
    raise_all(ConfigError, list(_impossible_tiles(model.ae, str(path))))
    return model


def load_extract_tools(path: Path, notes: list[Note] | None = None) -> ExtractTools:
    """Read and check tools.json; takes and raises what `load_pretrain_model` does."""
    return _load(ExtractTools, path, "tools.json", notes)


def _load(section: type[SectionT], path: Path, kind: Kind, notes: list[Note] | None) -> SectionT:
    values, found = settle(load_json(path), kind)
    if notes is not None:
        notes += found
    return parse(section, values, str(path))


def _impossible_tiles(ae: ExtractAutoencoder, source: str) -> Iterator[Problem]:
    if ae.tiling_param is not None and ae.tiling() is None and ae.condition_tiling() is None:
        yield Problem(
            "CFG-055",
            f"{source}: ae.tiling_param has no effect while ae.enable_tiling is false.",
            "Remove it or set enable_tiling to true.",
        )
    tiling = ae.tiling_param or TilingParam()
    for axis, size, stride in zip(("height", "width"), tiling.tile_size, tiling.tile_stride, strict=True):
        if stride > size:
            yield Problem(
                "CFG-055",
                f"{source}: tiles of {axis} {size} every {stride} latent pixels leave gaps.",
                "Give a tile_stride of at most tile_size.",
            )
