"""Token ids with UMT5's layout of special pieces, against the published rules of unigram models."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.convert_slow_tokenizer import import_protobuf

from mm.errors import DataError
from mm.wan.encoders import TextEncoder
from mm.wan.tokenizer import open_tokenizer

CORPUS = [
    "a red circle moving left over a green field",
    "the hiker walks along a ridge at dawn",
    "two cats sleeping on a wooden chair in the sun",
    "slow motion of water falling into a lake",
] * 5
RARE = ["a red 圆 moving", "naïve façade", "🦙🦙 on a ridge", "ŁÓDŹ", "x\u200dy", "Ω≈ç√", "", "the the", "zq 日本語"]
SPECIAL = ["<pad>", "</s>", "<s>", "<unk>"]  # UMT5's order; T5's has no <s>
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@pytest.fixture(scope="module")
def pieces() -> list[tuple[str, float]]:
    """A trained vocabulary in UMT5's order: special pieces, bytes, then the learned ones."""
    learner = Tokenizer(models.Unigram())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    learner.train_from_iterator(CORPUS, trainer)
    learned = [tuple(row) for row in json.loads(learner.to_str())["model"]["vocab"] if row[0] != "<unk>"]
    return [(piece, 0.0) for piece in SPECIAL + BYTES] + learned


def backend(pieces: list[tuple[str, float]], unk_id: int = 3, byte_fallback: bool = True) -> Tokenizer:
    made = Tokenizer(models.Unigram(pieces, unk_id=unk_id, byte_fallback=byte_fallback))
    made.add_special_tokens(SPECIAL)
    made.normalizer = normalizers.Replace(" {2,}", " ")
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return made


def folder(path: Path, made: Tokenizer, **config: Any) -> Path:
    path.mkdir()
    made.save(str(path / "tokenizer.json"))
    names = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
    content = {"tokenizer_class": "T5Tokenizer", **names, **config}
    (path / "tokenizer_config.json").write_text(json.dumps(content))
    return path


def published(text: str, pieces: list[tuple[str, float]], byte_fallback: bool = True) -> list[int]:
    """The most probable segmentation (Kudo 2018, arXiv 1804.10959), unknown characters 10 below the worst piece."""
    normal = {piece: (index, score) for index, (piece, score) in enumerate(pieces) if index >= len(SPECIAL)}
    worst = min(score for _, score in pieces) - 10
    ids: list[int] = []
    for word in text.split():
        word = f"▁{word}"
        best: list[tuple[float, int, str | None]] = [(0.0, 0, None)] + [(-math.inf, 0, None)] * len(word)
        for stop in range(1, len(word) + 1):
            for start in range(stop):
                piece = word[start:stop]
                known = normal.get(piece)
                if known is None and stop - start > 1:
                    continue
                score = best[start][0] + (worst if known is None else known[1])
                if score > best[stop][0]:
                    best[stop] = (score, start, piece)
        parts: list[str] = []
        place = len(word)
        while place:
            parts.insert(0, word[best[place][1] : place])
            place = best[place][1]
        for part in parts:
            if part in normal:
                ids.append(normal[part][0])
            elif byte_fallback:
                ids += [len(SPECIAL) + byte for byte in part.encode()]
            elif not ids or ids[-1] != 3:  # neighbours that are unknown are one
                ids.append(3)
    return [*ids, 1]


@pytest.mark.parametrize("byte_fallback", [True, False])
def test_rare_characters_have_the_ids_of_the_file(
    pieces: list[tuple[str, float]], tmp_path: Path, byte_fallback: bool
) -> None:
    texts = [*RARE, *CORPUS[:4]]
    opened = open_tokenizer(folder(tmp_path / "tokenizer", backend(pieces, byte_fallback=byte_fallback)))
    assert opened.ids(texts) == [published(text, pieces, byte_fallback) for text in texts]
    flat = {token for row in opened.ids(texts) for token in row}
    assert 2 not in flat  # <s>, which transformers' own class takes for unknown text
    assert (3 in flat) != byte_fallback
    assert len(opened) == len(pieces)


def test_a_sentencepiece_model_alone_gives_the_same_ids(pieces: list[tuple[str, float]], tmp_path: Path) -> None:
    proto = import_protobuf().ModelProto()
    kinds = {"<unk>": 2} | dict.fromkeys(("<pad>", "</s>", "<s>"), 3) | dict.fromkeys(BYTES, 6)
    for piece, score in pieces:
        proto.pieces.add(piece=piece, score=score, type=kinds.get(piece, 1))
    rules = proto.trainer_spec
    rules.model_type, rules.byte_fallback = 1, True
    rules.pad_id, rules.eos_id, rules.bos_id, rules.unk_id = 0, 1, 2, 3
    (tmp_path / "spiece.model").write_bytes(proto.SerializeToString())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"unk_token": {"content": "<unk>"}}))
    assert open_tokenizer(tmp_path).ids(RARE) == [published(text, pieces) for text in RARE]


def test_limits_in_the_file_cut_nothing(pieces: list[tuple[str, float]], tmp_path: Path) -> None:
    made = backend(pieces)
    made.enable_truncation(5)
    made.enable_padding(length=5)
    opened = open_tokenizer(folder(tmp_path / "tokenizer", made))
    assert opened.ids([CORPUS[0], ""]) == [published(CORPUS[0], pieces), [1]]


@pytest.mark.parametrize("config", [{}, {"unk_token": {"content": "<unk>", "special": True}}])
def test_another_unknown_piece_than_the_folder_says_is_refused(
    pieces: list[tuple[str, float]], tmp_path: Path, config: dict[str, Any]
) -> None:
    path = folder(tmp_path / "tokenizer", backend(pieces, unk_id=2), **config)
    with pytest.raises(DataError, match=r"DATA-140.*piece 2 \(<s>\).*<unk> is 3"):
        open_tokenizer(path)


def test_what_transformers_writes_of_umt5_is_refused(pieces: list[tuple[str, float]], tmp_path: Path) -> None:
    """Saved again by transformers' T5 class, the file has that class's rules."""
    from transformers import T5TokenizerFast

    T5TokenizerFast(vocab=pieces, extra_ids=0).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(DataError, match="DATA-140"):
        open_tokenizer(tmp_path / "tokenizer")


def test_texts_that_are_not_closed_are_refused(pieces: list[tuple[str, float]], tmp_path: Path) -> None:
    made = backend(pieces)
    made.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(DataError, match=r"DATA-140.*does not close a text with </s>"):
        open_tokenizer(folder(tmp_path / "tokenizer", made))


def test_a_long_caption_keeps_its_end(pieces: list[tuple[str, float]], tmp_path: Path) -> None:
    from feature_samples import make_text_encoder, write_encoders

    weights = write_encoders(tmp_path / "weights")
    shutil.rmtree(weights / "text_encoder")
    make_text_encoder(len(pieces)).save_pretrained(weights / "text_encoder")
    made = folder(tmp_path / "tokenizer", backend(pieces))
    encoder = TextEncoder.from_pretrained(weights / "text_encoder", made, "fp32", torch.device("cpu"), max_length=8)
    ids = published(CORPUS[0], pieces)
    with torch.no_grad():
        whole = encoder.model(torch.tensor([[*ids[:7], 1]])).last_hidden_state[0]
    assert torch.allclose(encoder.encode([CORPUS[0], "a"])[0], whole, atol=1e-5)
