"""Captions of clips that a training renders: stored once, beside shards that know nothing of them."""

import logging
from pathlib import Path

import pytest
import torch
from extraction_runs import MODEL, opened, run, words
from feature_samples import make_text_encoder, make_tokenizer
from store_content import content

from mm.config.run.generation import NEGATIVE_PROMPT
from mm.data.recipe import load_recipe
from mm.data.store.captions import read_caption
from mm.data.store.copying import copy_store
from mm.dialects.mindspeed.extraction import read_extraction
from mm.errors import DataError
from mm.extract.run import ExtractReport
from mm.train.stored_texts import stored_texts
from mm.wan.encoders import TextEncoder

PROMPTS = ["a red circle", "a green disc"]


def captions(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (store / "captions").iterdir()}


def test_captions_of_clips_are_what_the_text_encoder_gives(files: dict[str, Path], tmp_path: Path) -> None:
    """Recomputed with transformers alone; the first prompt is a row's, too, and has the bits that the row has."""
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, PROMPTS[0]]))
    run(files)
    before = content(tmp_path / "store")
    asked = {"negative_caption": "blurry", "clip_prompts": tmp_path / "prompts.txt"}
    assert run(files, **asked) == ExtractReport(listed=5, encoded=0, reused=5), "they are added to a finished store"
    after = content(tmp_path / "store")
    assert {name: after[name] for name in before} == before and len(captions(tmp_path / "store")) == 3
    assert len(after) == len(before) + 3
    recipe, tokenizer = load_recipe(tmp_path / "store"), make_tokenizer()
    text_encoder = make_text_encoder(len(tokenizer))
    found = {text: read_caption(tmp_path / "store", text, recipe, MODEL) for text in ["blurry", *PROMPTS]}
    for text, features in found.items():
        with torch.no_grad():
            expected = text_encoder(tokenizer(text, return_tensors="pt").input_ids).last_hidden_state[0]
        assert features is not None and torch.allclose(features, expected, rtol=1e-5, atol=1e-5)
    row = opened(tmp_path / "store", tmp_path)[0]["prompt"]
    assert found[PROMPTS[0]] is not None and torch.equal(found[PROMPTS[0]], row)
    assert read_caption(tmp_path / "store", "another", recipe, MODEL) is None

    kept = captions(tmp_path / "store")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "store" / "captions").iterdir()}
    run(files, **asked)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps, "what is there is not made again"
    copy_store(tmp_path / "store", tmp_path / "copy", lambda done, total: None)
    assert captions(tmp_path / "copy") == kept


def test_a_training_takes_the_texts_that_its_store_has(
    files: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Bit for bit those that the encoder gives; none where the clips have another precision or tokens."""
    run(files, negative_caption="blurry")
    data, encoders = opened(tmp_path / "store", tmp_path), read_extraction(words(files)).encoders
    named, text = encoders.tokenizer, encoders.text
    encoder = TextEncoder.from_pretrained(
        Path(text.from_pretrained), Path(named.from_pretrained), text.precision, torch.device("cpu"), 512
    )
    found = stored_texts(data, encoders, ["blurry", "another"])
    assert found.keys() == {"blurry"} and torch.equal(found["blurry"], encoder.encode(["blurry"])[0])
    with caplog.at_level(logging.INFO):
        longer = {"tokenizer": named.model_copy(update={"model_max_length": 77})}
        assert stored_texts(data, encoders.model_copy(update=longer), ["blurry"]) == {}
        other = {"text": text.model_copy(update={"precision": "bf16"})}
        assert stored_texts(data, encoders.model_copy(update=other), ["blurry"]) == {}
    assert "another model_max_length; they are encoded" in caplog.text and "another precision;" in caplog.text


def test_the_release_has_a_negative_caption_of_its_own(files: dict[str, Path], tmp_path: Path) -> None:
    run(files, negative_caption="release")
    recipe = load_recipe(tmp_path / "store")
    assert read_caption(tmp_path / "store", NEGATIVE_PROMPT, recipe, MODEL) is not None


def test_a_damaged_caption_is_told_and_made_again(files: dict[str, Path], tmp_path: Path) -> None:
    run(files, negative_caption="blurry")
    (path,) = (tmp_path / "store" / "captions").iterdir()
    whole = path.read_bytes()
    recipe = load_recipe(tmp_path / "store")
    for id, damaged in (("DATA-011", whole[:-1]), ("DATA-016", whole.replace(recipe.key.encode(), b"0" * 16))):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=id):
            read_caption(tmp_path / "store", "blurry", recipe, MODEL)
        run(files, negative_caption="blurry")
        assert path.read_bytes() == whole
