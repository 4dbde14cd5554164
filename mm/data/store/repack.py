"""A store of one file a sample as a store of shards; the first one stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from mm.data.features import EMPTY_PROMPT_ID, EXTRACT_AGAIN, LISTING, Feature, Header, checked_feature, read_header
from mm.data.files import make_folder, path_below, remove_temporaries
from mm.data.listing import FeatureRow, FeatureStore, open_feature_store
from mm.data.recipe import Recipe, load_recipe, save_recipe
from mm.data.store.blobs import REMEDY
from mm.data.store.catalog import Manifest, finish_store, is_sharded
from mm.data.store.checksum import DIGEST_BYTES, Checksum, checksum_of
from mm.data.store.shard import INDEX, KIND, SHARDS, shard_folder
from mm.data.store.table import open_table, read_table_header
from mm.data.store.writer import ShardWriter, identity_of, prompt_blob, prompt_key
from mm.errors import DataError

_ANOTHER = "Name another folder."


def repack(source: Path, target: Path, shard_bytes: int, done: Callable[[int, int], None]) -> Manifest:
    """Write a store of shards with the samples, recipe and ids of a store of one file a sample.

    It may be killed and started again: shards that are there are kept.

    Args:
        source: the store; a finished one.
        target: folder of the new store.
        shard_bytes: features of a shard, in bytes; it ends with the sample that reaches them.
        done: told after each sample its number and how many there are.

    Raises:
        DataError: what `mm.data.recipe.load_recipe` and `mm.data.listing.open_feature_store` raise of the source,
            DATA-011, DATA-012, DATA-013, DATA-016 and DATA-072 for a file of it that is not whole, DATA-068 when the
            target holds a store that is finished or other shards, DATA-018 and DATA-019 when writing fails.
    """
    recipe = load_recipe(source)
    old = open_feature_store(source, source / LISTING, recipe.key, recipe.task)
    if is_sharded(target) or (target / LISTING).exists():
        raise DataError("DATA-068", f"{target} holds a finished feature store.", _ANOTHER)
    cuts = _cuts(old, shard_bytes)
    make_folder(target / SHARDS, "--target")
    remove_temporaries(target)
    remove_temporaries(target / SHARDS)
    save_recipe(target, recipe)
    captions = _Captions(recipe)
    total, told = len(old), 0
    for number, rows in enumerate(cuts):
        if not _is_there(target, number, rows, recipe):
            _write_shard(old, target, number, rows, captions)
        captions.learn(target, number)
        told += len(rows)
        done(told, total)
    return finish_store(target, len(cuts), recipe.key)


class _Captions:
    """Captions whose embeddings are in the shards written so far: by key the shard and the blob's checksum."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._known: dict[bytes, tuple[int, Checksum]] = {}

    def learn(self, target: Path, number: int) -> None:
        """Take in a shard that is there."""
        table = open_table(shard_folder(target, number) / INDEX, KIND, REMEDY)
        for record in table.columns["prompts"]:
            checksum = Checksum(table.header.checksum.kind, bytes(record["digest"]))
            self._known[bytes(record["key"])] = number, checksum

    def add(self, writer: ShardWriter, number: int, caption: str, prompt: Tensor) -> tuple[int, bytes]:
        """Add an embedding to a shard, unless it is in that or another; returns its shard and key.

        Embeddings of one caption that differ, as encoders on two devices may give them, are all kept.
        """
        content = prompt_blob(caption, prompt, self.recipe.max_text_tokens, self.recipe.key)
        checksum = checksum_of([content])
        for key in (prompt_key(caption), blake2b(content, digest_size=DIGEST_BYTES).digest()):
            shard, found = self._known.setdefault(key, (number, checksum))
            if found.fits(content):
                if shard == number:
                    writer.add_prompt(key, content, len(prompt))
                break
        return shard, key


def _cuts(old: FeatureStore, shard_bytes: int) -> list[list[FeatureRow]]:
    """The samples of each shard: a function of the files' sizes, in the order of the list."""
    cuts: list[list[FeatureRow]] = [[]]
    size = 0
    for row in old.rows:
        if size >= shard_bytes:
            cuts.append([])
            size = 0
        cuts[-1].append(row)
        size += _file(old, row).stat().st_size
    return cuts


def _is_there(target: Path, number: int, rows: Sequence[FeatureRow], recipe: Recipe) -> bool:
    """Test that a shard was written before.

    Raises:
        DataError: DATA-068 when it holds other samples, DATA-150 when it is damaged.
    """
    folder = shard_folder(target, number)
    if not folder.exists():
        return False
    about = read_table_header(folder / INDEX, KIND, REMEDY).about
    if about.get("recipe") != recipe.key or about.get("identity") != identity_of(rows):
        raise DataError("DATA-068", f"{folder} holds other samples than this shard has now.", _ANOTHER)
    return True


def _write_shard(old: FeatureStore, target: Path, number: int, rows: Sequence[FeatureRow], captions: _Captions) -> None:
    key = captions.recipe.key
    with ShardWriter(target, number, key) as writer:
        if number == 0 and old.empty_prompt().exists():
            _, empty = _read(old.empty_prompt(), (EMPTY_PROMPT_ID, key))
            captions.add(writer, number, "", empty.prompt)
        for row in rows:
            header, feature = _read(_file(old, row), (row.sample, key))
            prompt = captions.add(writer, number, row.cap, feature.prompt)
            writer.add(row, feature, header.origin, prompt)
        writer.commit()


def _file(old: FeatureStore, row: FeatureRow) -> Path:
    return path_below(old.folder, row.file, str(old.folder / LISTING))


def _read(file: Path, origin: tuple[str, str]) -> tuple[Header, Feature]:
    """A feature file, whole, of the sample and recipe that it must be of."""
    header = read_header(file)
    if (header.origin.sample, header.origin.recipe) != origin:
        found = f'sample "{header.origin.sample}" of recipe {header.origin.recipe}'
        message = f'{file} holds {found}, expected sample "{origin[0]}" of recipe {origin[1]}.'
        raise DataError("DATA-016", message, EXTRACT_AGAIN)
    if not {"prompt", "prompt_mask"} <= header.tensors.keys():
        raise DataError("DATA-012", f"{file} holds {', '.join(sorted(header.tensors))}, and no prompt.", EXTRACT_AGAIN)
    try:
        tensors = load(file.read_bytes())
    except (SafetensorError, KeyError, OSError) as error:
        raise DataError("DATA-011", f"{file} cannot be read ({error}).", EXTRACT_AGAIN) from None
    return header, checked_feature(header, tensors, str(file), EXTRACT_AGAIN)
