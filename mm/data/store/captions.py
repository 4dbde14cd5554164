"""Captions of a store that no sample has: those of clips that a training renders.

    STORE/captions/<hash>.safetensors   prompt [L, D], prompt_mask [512] of the caption with that `text_hash`

They stand beside the shards, whose bytes are those of a store without them, and can be added to a finished store.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from mm.config.model import WanConfig
from mm.config.storage import Location
from mm.data.features import (
    EXTRACT_AGAIN,
    PROMPT_ID,
    Feature,
    Origin,
    check_header,
    checked_feature,
    parse_feature,
    read_header,
    text_hash,
    write_feature,
)
from mm.data.files import make_folder
from mm.data.recipe import Recipe
from mm.data.remote.reading import read_bytes
from mm.errors import DataError

CAPTIONS = "captions"


def has_caption(store: Path, caption: str, recipe: Recipe) -> bool:
    """Tell whether the embedding of a caption is there, whole and of a recipe."""
    try:
        return read_header(store / CAPTIONS / _name(caption)).origin == _origin(caption, recipe.key)
    except DataError:
        return False


def write_caption(store: Path, caption: str, prompt: Tensor, recipe: Recipe) -> None:
    """Store the embedding [L, D] of a caption; raises what `mm.data.features.write_feature` raises."""
    make_folder(store / CAPTIONS, "the store's folder")
    path = store / CAPTIONS / _name(caption)
    write_feature(path, Feature(None, prompt), _origin(caption, recipe.key), recipe.max_text_tokens)


def read_caption(store: Location, caption: str, recipe: Recipe, model: WanConfig) -> Tensor | None:
    """The embedding [L, D] of a caption; None where the store has none of it.

    Raises:
        DataError: DATA-011 for a damaged file, DATA-072 for one that cannot be read, DATA-016 for one of something
            else, DATA-012, DATA-013 and DATA-017 as `mm.data.features.read_feature`; of object storage what
            `mm.data.remote.client.attempt` raises.
    """
    place = store / CAPTIONS / _name(caption)
    try:
        content = read_bytes(place)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError("DATA-072", f"{place} cannot be read ({error}).", "Check the disk it is on.") from None
    try:
        header, tensors = parse_feature(memoryview(bytearray(content)))
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError("DATA-011", f"{place} is no complete feature file ({error}).", EXTRACT_AGAIN) from None
    expected = _origin(caption, recipe.key)
    if header.origin != expected:
        message = f"{place} holds {header.origin}, expected {expected}."
        raise DataError("DATA-016", message, EXTRACT_AGAIN)
    check_header(header, str(place), model, EXTRACT_AGAIN)
    return checked_feature(header, tensors, str(place), EXTRACT_AGAIN).prompt


def _name(caption: str) -> str:
    return f"{text_hash(caption)}.safetensors"


def _origin(caption: str, recipe_key: str) -> Origin:
    return Origin(PROMPT_ID, recipe_key, text_hash(caption), "")
