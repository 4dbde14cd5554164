"""Texts of rendered clips that the stores of a training hold: no encoder is loaded for them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from mm.config.run.encoders import EncodersSection
from mm.data.dataset import FeatureDataset
from mm.data.recipe import Recipe, folder_fingerprint, load_recipe
from mm.data.store.captions import read_caption

log = logging.getLogger(__name__)


def stored_texts(dataset: FeatureDataset, encoders: EncodersSection, texts: Sequence[str]) -> dict[str, Tensor]:
    """Features [L, text_dim] of those texts that a store holds, made as `encoders` would make them.

    Args:
        dataset: the stores. encoders: of the clips. texts: of all clips.

    Raises:
        DataError: what `mm.data.store.captions.read_caption` raises, DATA-040 and DATA-042 for encoders that are not
            there.
    """
    found: dict[str, Tensor] = {}
    for folder, _, _ in dataset.parts():
        recipe = load_recipe(folder)
        held = {text: read_caption(folder, text, recipe, dataset.model) for text in texts if text not in found}
        held_texts = {text: features for text, features in held.items() if features is not None}
        if held_texts and (others := _others(recipe, encoders)):
            log.info("%s holds texts of the clips that were made with another %s; they are encoded", folder, others)
        elif held_texts:
            log.info("%d of %d texts of the clips are taken from %s", len(held_texts), len(set(texts)), folder)
            found |= held_texts
    return found


def _others(recipe: Recipe, encoders: EncodersSection) -> str:
    """Names of what a recipe has otherwise than the encoders of clips."""
    text, tokenizer = encoders.text, encoders.tokenizer
    pairs = {
        "text encoder": (recipe.text_encoder, folder_fingerprint(Path(text.from_pretrained))),
        "tokenizer": (recipe.tokenizer, folder_fingerprint(Path(tokenizer.from_pretrained))),
        "precision": (recipe.text_dtype, text.precision),
        "model_max_length": (recipe.max_text_tokens, tokenizer.model_max_length),
    }
    return " and ".join(name for name, (stored, asked) in pairs.items() if stored != asked)
