"""Writing a shard: its body as it comes, then its index and list, and one rename that makes it part of the store."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from hashlib import blake2b, sha256
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

import numpy as np
from torch import Tensor

from mm.data.features import EMPTY_PROMPT_ID, PROMPT_ID, Feature, Origin, prompt_tensors, serialised, text_hash
from mm.data.files import TEMPORARY_PREFIX, make_folder, sync_folder, write_atomically, write_error
from mm.data.listing import FeatureRow
from mm.data.store.checksum import DIGEST_BYTES, checksum_of
from mm.data.store.shard import BODY, INDEX, KIND, LISTING, PROMPT, SAMPLE, LatentShape, shard_folder
from mm.data.store.table import aligned, write_table


def prompt_key(caption: str) -> bytes:
    """Key of a caption's embedding; its first half is `mm.data.features.text_hash`."""
    return sha256(caption.encode()).digest()[:DIGEST_BYTES]


def prompt_blob(caption: str, prompt: Tensor, text_len: int, recipe_key: str) -> bytes:
    """Content of the blob of a caption's embedding [L, D]; `text_len`: length of its mask.

    Raises:
        DataError: DATA-013 when a value is not finite.
    """
    origin = Origin(PROMPT_ID if caption else EMPTY_PROMPT_ID, recipe_key, text_hash(caption), "")
    return serialised(prompt_tensors(prompt, text_len), origin, Feature(None, prompt), f'the caption "{caption[:80]}"')


class ShardWriter:
    """Writes one shard under a temporary name; `commit` gives it its own. Leaving it otherwise deletes what there is.

    The bytes are a function of what is added, in which order.
    """

    def __init__(self, store: Path, number: int, recipe_key: str, target: Path | None = None) -> None:
        """
        Args:
            store: its folder. number: of the shard. recipe_key: of the store.
            target: the folder that it becomes; None, the one of its number in the store.

        Raises:
            DataError: DATA-018 and DATA-019 when nothing can be written there; so do the methods.
        """
        self._recipe_key = recipe_key
        self._target = shard_folder(store, number) if target is None else target
        self._folder = self._target.with_name(f"{TEMPORARY_PREFIX}{self._target.name}-{uuid4().hex[:12]}")
        try:
            make_folder(self._folder, "the store's folder")
            self._body = open(self._folder / BODY, "xb")  # noqa: SIM115  closed by `commit` or by leaving
        except OSError as error:  # whoever finishes the store removes the folders of workers that seem dead
            raise write_error(self._folder / BODY, 0, error) from error
        except BaseException:  # a signal, while nobody has entered this yet
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        self._end = 0
        self._samples: list[tuple[Any, ...]] = []
        self._prompts: dict[bytes, tuple[Any, ...]] = {}
        self._names = bytearray()
        self._rows: list[FeatureRow] = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._body.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def add_prompt(self, key: bytes, content: bytes, tokens: int) -> None:
        """Add the embedding of a caption, once.

        Args:
            key: 16 bytes by which samples name it. content: what `prompt_blob` gives. tokens: L.

        Raises:
            DataError: DATA-018 and DATA-019 when it cannot be written.
        """
        if key not in self._prompts:
            self._prompts[key] = (*self._write(content), list(key), tokens)

    def add(self, row: FeatureRow, feature: Feature, origin: Origin, prompt: tuple[int, bytes]) -> None:
        """Add a sample without its caption's embedding.

        Args:
            row: what is listed of it. feature: its tensors. origin: what it was made from.
            prompt: the shard to which its caption's embedding is or will be added, and its key there.

        Raises:
            DataError: DATA-013 when a value is not finite, DATA-018 and DATA-019 when it cannot be written.
        """
        tensors = {} if feature.latents is None else {"latents": feature.latents}
        content = serialised({**feature.features, **tensors}, origin, feature, f'sample "{row.sample}"')
        name = row.sample.encode()
        where = (prompt[0], list(prompt[1]), len(self._names), len(name))
        record = (*self._write(content), list(row.latent_shape), row.text_tokens, *where)
        self._samples.append(record)
        self._names += name
        self._rows.append(row)

    def commit(self, said: Mapping[str, Any] | None = None, files: Mapping[str, bytes] | None = None) -> None:
        """Make the shard part of the store. Where another process did that before, its shard stays, which is equal.

        Args:
            said: further facts for the index's header. files: further files of the shard, by name.

        Raises:
            DataError: DATA-018 and DATA-019 when it cannot be written.
        """
        try:
            self._body.flush()
            os.fsync(self._body.fileno())
        except OSError as error:
            raise write_error(self._folder / BODY, self._end, error) from error
        lines = [(row.model_dump_json(exclude={"file"}) + "\n").encode() for row in self._rows]
        write_atomically(self._folder / LISTING, lines, sum(map(len, lines)))
        for name, content in (files or {}).items():
            write_atomically(self._folder / name, [content], len(content))
        samples = np.array(self._samples, SAMPLE)
        prompts = np.array([self._prompts[key] for key in sorted(self._prompts)], PROMPT)
        order, shapes = order_by_shape(samples["shape"])
        columns = {
            "samples": samples,
            "prompts": prompts,
            "names": np.frombuffer(bytes(self._names), np.uint8),
            "order": order,
        }
        about: Mapping[str, Any] = {
            "recipe": self._recipe_key,
            "samples": len(samples),
            "body_bytes": self._end,
            "shapes": [[*shape, count] for shape, count in shapes.items()],
            "identity": identity_of(self._rows),
            **(said or {}),
        }
        write_table(self._folder / INDEX, KIND, about, columns)
        target = self._target
        try:
            if not target.exists():
                os.rename(self._folder, target)
                sync_folder(target.parent)
        except OSError as error:
            if not target.exists():  # two may finish one shard at once
                raise write_error(target, self._end, error) from error

    def _write(self, content: bytes) -> tuple[int, int, list[int]]:
        """Append a blob; returns its offset, length and checksum."""
        offset = self._end
        padded = aligned(len(content))
        try:
            self._body.write(content)
            self._body.write(b"\0" * (padded - len(content)))
        except OSError as error:
            raise write_error(self._folder / BODY, padded, error) from error
        self._end += padded
        return offset, len(content), list(checksum_of([content]).value)


def identity_of(rows: Sequence[FeatureRow]) -> str:
    """Digest of the names, clips, captions and videos of a shard's samples in their order."""
    digest = blake2b(digest_size=DIGEST_BYTES)
    for row in rows:
        said = (row.sample, row.cap, row.start_frame_idx, row.latent_shape, row.text_tokens, row.video)
        digest.update(f"{json.dumps(said)}\n".encode())
    return digest.hexdigest()


def order_by_shape(shapes: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], dict[LatentShape, int]]:
    """Numbers of samples by shape, those of one shape in their order, and the count of each; shapes are in the order of
    their first samples.

    Args:
        shapes: [n, 4], each sample's (C, F, H, W).
    """
    found, first, which, counts = np.unique(
        shapes.reshape(-1, 4), axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    by_first = np.argsort(first, kind="stable")
    rank = np.empty(len(found), np.int64)
    rank[by_first] = np.arange(len(found))
    order = np.argsort(rank[which.reshape(-1)], kind="stable").astype("<u4")
    told = {}
    for number in by_first:
        channels, frames, height, width = map(int, found[number])
        told[channels, frames, height, width] = int(counts[number])
    return order, told
