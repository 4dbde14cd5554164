"""Captions of clips that a training renders: encoded by extraction, so that the training need not load the encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mm.config.run.extraction import ExtractionRun
from mm.config.run.generation import NEGATIVE_PROMPT
from mm.data.recipe import Recipe
from mm.data.store.captions import has_caption, write_caption
from mm.data.text_lines import read_prompts
from mm.extract.encode import ClipEncoder

RELEASE = "release"
"""Word for the negative prompt of the Wan2.1 release."""


def captions_of_clips(run: ExtractionRun) -> list[str]:
    """The captions that an extraction is to store beside those of its rows.

    Raises:
        DataError: DATA-053 and DATA-054 for the file of prompts.
    """
    asked = run.extraction
    prompts = [] if asked.clip_prompts is None else read_prompts(Path(asked.clip_prompts))
    negative = asked.negative_caption
    if negative == RELEASE:
        negative = run.task.negative + NEGATIVE_PROMPT
    return list(dict.fromkeys(prompts if negative is None else [negative, *prompts]))


def make_captions(store: Path, captions: Sequence[str], recipe: Recipe, encoders: Callable[[], ClipEncoder]) -> int:
    """Encode the captions that are not there; returns their number.

    Args:
        store: its folder. captions: which. recipe: of the store. encoders: called when one is needed.

    Raises:
        DataError: DATA-013 for values that are not finite, DATA-018 and DATA-019 when it cannot be written, and what
            the encoders raise.
    """
    missing = [caption for caption in captions if not has_caption(store, caption, recipe)]
    for caption in missing:
        write_caption(store, caption, encoders().prompt(caption), recipe)
    return len(missing)
