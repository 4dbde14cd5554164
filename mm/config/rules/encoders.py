"""Rules about encoders, which extraction and generation share."""

from __future__ import annotations

from collections.abc import Iterator

from mm.config.run.encoders import Tiles, VideoEncoderSection
from mm.config.run.origins import Origins
from mm.errors import Problem


def tile_problems(vae: VideoEncoderSection, words: Origins) -> Iterator[Problem]:
    """CFG-055: tiles are used, and leave no gaps.

    Args:
        vae: the section, at `encoders.vae` of the run. words: of the run.
    """
    tiles, tiling, stride = (words[f"encoders.vae.{name}"] for name in ("tiles", "tiling", "tiles.stride"))
    if vae.tiles is not None and vae.tiles_of_clips() is None and vae.tiles_of_conditions() is None:
        yield Problem(
            "CFG-055",
            f"{tiles.file}: {tiles.name} has no effect while {tiling.name} is false.",
            f"Remove it or set {tiling.name} to true.",
        )
    used = vae.tiles or Tiles()
    for axis, size, step in zip(("height", "width"), used.size, used.stride, strict=True):
        if step > size:
            yield Problem(
                "CFG-055",
                f"{tiles.file}: tiles of {axis} {size} every {step} latent pixels leave gaps.",
                f"Give a {stride.name.rpartition('.')[2]} of at most the tile's size.",
            )
