"""Memory that the encoders of an extraction take, from the headers of their weights."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mm.checkpoint.encoders import open_encoder
from mm.checkpoint.identify import identify
from mm.config.model import Precision
from mm.config.run.extraction import ExtractionRun
from mm.errors import DataError
from mm.wan.encoders import DTYPES


def encoder_bytes(run: ExtractionRun) -> int:
    """Bytes of the weights of all encoders in their precision; what encoding needs beside them is not counted.

    Raises:
        DataError: DATA-042 for weights that cannot be read.
    """
    named = run.encoders
    folders: list[tuple[str, Precision]] = [
        (named.vae.from_pretrained, named.vae.precision),
        (named.text.from_pretrained, named.text.precision),
    ]
    if named.image is not None:
        folders.append((named.image.from_pretrained, named.image_precision))
    return sum(sum(_elements(Path(folder))) * DTYPES[precision].itemsize for folder, precision in folders)


def _elements(folder: Path) -> Iterator[int]:
    if folder.is_file():
        source = open_encoder(identify(folder))
        yield from (prod(kind.shape) for kind in source.kinds.values()) if source is not None else ()
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                yield from (prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            message = f"{file} cannot be read ({error})."
            raise DataError("DATA-042", message, "Download or copy the file again.") from None
