"""The tokenizer of a folder, by the rules that its own file states.

transformers' T5 class is not asked. It takes the pieces of tokenizer.json and states the rules itself: piece 2 stands
for what is unknown, and no character is spelled in bytes. Of UMT5 piece 2 is `<s>` and piece 3 the unknown one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers.convert_slow_tokenizer import import_protobuf

from mm.errors import DataError
from mm.wan.component import first_line
from mm.wan.foreign_code import refuse_code

TOKENIZER_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "spiece.model"
_CONTROL = 3  # of sentencepiece_model.proto, ModelProto.SentencePiece.Type
_SPACE = "▁"
_FIX_FOLDER = "Correct from_pretrained in tokenizer_config."
_COPY_AGAIN = "Copy the released tokenizer again; a newer library may have saved this one with other rules."


class TextTokenizer:
    """Token ids of texts, each closed by the end token."""

    def __init__(self, backend: Tokenizer) -> None:
        """Take a tokenizer that closes every text with one token."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend

    def __len__(self) -> int:
        """Tokens that it knows."""
        return int(self._backend.get_vocab_size())

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text at its true length, the end token included."""
        return [list(encoding.ids) for encoding in self._backend.encode_batch(list(texts))]


def open_tokenizer(folder: Path) -> TextTokenizer:
    """Read tokenizer.json of `folder`, else its SentencePiece model. No code of the folder is run.

    Raises:
        DataError: DATA-043 when there is neither or it cannot be read, DATA-140 when what it does with unknown text or
            at the end of a text is not what the folder says of its special tokens, DATA-120 when it asks for code of
            its own.
    """
    refuse_code(folder)
    try:
        file = next(folder / name for name in (TOKENIZER_FILE, SENTENCEPIECE_FILE) if (folder / name).is_file())
    except StopIteration:
        found = f"{folder} holds no tokenizer: neither {TOKENIZER_FILE} nor {SENTENCEPIECE_FILE}."
        raise DataError("DATA-043", found, _FIX_FOLDER) from None
    try:
        backend = Tokenizer.from_file(str(file)) if file.name == TOKENIZER_FILE else _of_sentencepiece(file)
        unknown, end = (_special(folder, which) for which in ("unk_token", "eos_token"))
        unknown_id = _unknown_id(file)
    except Exception as error:  # the libraries raise errors of many unrelated types here
        message = f"{file} cannot be read as a tokenizer ({first_line(error)})."
        raise DataError("DATA-043", message, _FIX_FOLDER) from None
    if unknown_id != backend.token_to_id(unknown):
        raise DataError(
            "DATA-140",
            f"{file} takes piece {unknown_id} ({backend.id_to_token(unknown_id)}) for unknown text, and the unknown "
            f"token {unknown} is {backend.token_to_id(unknown)}.",
            _COPY_AGAIN,
        )
    tokenizer = TextTokenizer(backend)
    if tokenizer.ids([""]) != [[backend.token_to_id(end)]]:
        raise DataError("DATA-140", f"{file} does not close a text with {end}.", _COPY_AGAIN)
    return tokenizer


def _special(folder: Path, which: str) -> str:
    """The text of a special token; T5's where the folder does not say it."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        content = json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).is_file() else {}
        token = content.get(which)
        if token is not None:
            return str(token["content"] if isinstance(token, dict) else token)
    return {"unk_token": "<unk>", "eos_token": "</s>"}[which]


def _unknown_id(file: Path) -> int:
    if file.name == SENTENCEPIECE_FILE:
        return int(_proto(file).trainer_spec.unk_id)
    model = json.loads(file.read_text(encoding="utf-8"))["model"]
    if model["type"] != "Unigram":
        raise ValueError(f"its model is {model['type']}, expected Unigram")
    return int(model["unk_id"])


def _proto(file: Path) -> Any:
    """The SentencePiece model's own description (sentencepiece_model.proto)."""
    proto = import_protobuf().ModelProto()
    proto.ParseFromString(file.read_bytes())
    return proto


def _of_sentencepiece(file: Path) -> Tokenizer:
    """The rules of a SentencePiece unigram model: its unknown piece, bytes where it was trained with them."""
    proto = _proto(file)
    rules = proto.trainer_spec
    if rules.model_type != 1:
        raise ValueError("it is no unigram model")
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    backend = Tokenizer(Unigram(pieces, unk_id=rules.unk_id, byte_fallback=rules.byte_fallback))
    control = [piece.piece for piece in proto.pieces if piece.type == _CONTROL]
    backend.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in control])
    spaces = [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), _SPACE)]
    charsmap = proto.normalizer_spec.precompiled_charsmap
    backend.normalizer = normalizers.Sequence(([normalizers.Precompiled(charsmap)] if charsmap else []) + spaces)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always")
    end = rules.eos_piece or "</s>"
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, rules.eos_id)]
    )
    return backend
