"""The page: one HTML file that loads nothing, with pictures inside."""

from __future__ import annotations

import base64
import io
from importlib.resources import files

import numpy as np
from jinja2 import Environment, StrictUndefined
from PIL import Image

from mm.look.facts import Looked, Picture

_LONGEST = 320
_QUALITY = 80
_UNITS = ("", "k", "M", "G", "T", "P", "E")


def render_page(looked: Looked) -> bytes:
    """The page as UTF-8. All texts are escaped; its policy forbids scripts and everything that is not in the file."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"image": image_address, "operations": operations, "size": size_in_words, "share": share}
    template = environment.from_string(files("mm.look").joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(looked=looked, samples=sum(len(batch.samples) for batch in looked.batches)).encode(
        errors="replace"  # half a surrogate pair, which JSON can spell and no file can hold
    )


def image_address(picture: Picture) -> str:
    """A picture as the address of an image: WebP, at most 320 pixels a side."""
    content = io.BytesIO()
    thumbnail(picture, _LONGEST).save(content, "WEBP", quality=_QUALITY)
    return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()


def thumbnail(picture: Picture, longest: int) -> Image.Image:
    """A picture whose longer side is at most so many pixels."""
    image = Image.fromarray(np.ascontiguousarray(picture))
    scale = longest / max(image.size)
    if scale < 1:
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return image


def operations(count: float) -> str:
    """`12.3 T`: three digits and a unit of a thousand."""
    value = float(count)
    for unit in _UNITS:
        if value < 999.5 or unit == _UNITS[-1]:
            break
        value /= 1000
    return f"{value:.3g} {unit}".strip()


def size_in_words(size: tuple[int, int, int]) -> str:
    """`81 x 480 x 832`, or `image, 480 x 832`."""
    frames, height, width = size
    return f"{frames} × {height} × {width}" if frames > 1 else f"image, {height} × {width}"


def share(part: float) -> str:
    """`12.3 %`; what is more than nothing never reads as nothing."""
    return f"{part:.1%}".replace("%", " %") if part >= 0.0005 or part == 0 else "below 0.1 %"
