"""WebDataset: a tar file for each shard, in it three files a sample that share a name.

    000000037.json         what is listed of the sample: its id, draw, caption, clip, shape
    000000037.txt          the caption
    000000037.safetensors  latents, prompt, prompt_mask and what the task has beside them

The bytes are a function of the samples. Names are the samples' numbers in the store: ids hold slashes and dots, which
have a meaning to readers.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

from mm.data.exports.samples import ListedSample
from mm.data.features import Feature, serialised

SUFFIX = ".tar"


def write_tar(path: Path, samples: Iterable[ListedSample], recipe_key: str) -> None:
    """Write a tar file.

    Raises:
        OSError: the disk refuses. DataError: what reading a sample raises.
    """
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            header, tensors = sample.read(recipe_key)
            feature = Feature(None, tensors["prompt"], header.start_frame, {}, header.taken)
            content = serialised(tensors, header.origin, feature, sample.row["sample"])
            said = {"index": sample.index, "draw": sample.draw, **sample.row}
            _add(tar, sample.index, "json", json.dumps(said, ensure_ascii=False, sort_keys=True).encode())
            _add(tar, sample.index, "txt", str(sample.row["cap"]).encode())
            _add(tar, sample.index, "safetensors", content)


def _add(tar: tarfile.TarFile, index: int, suffix: str, content: bytes) -> None:
    entry = tarfile.TarInfo(f"{index:09d}.{suffix}")
    entry.size, entry.mode = len(content), 0o644
    tar.addfile(entry, io.BytesIO(content))
