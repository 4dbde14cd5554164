"""Wan's encoders between their original files and the folders of diffusers and transformers.

A source is told apart by the names in it: one file of the original (`.pth`, read without running code, or safetensors),
or a component's folder. The configuration of a folder cannot be read off an original file, which is why only published
sizes are known without the config.json of another folder.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mm.checkpoint.encoder_kinds import CLIP, Encoder, encoder_of
from mm.checkpoint.files import new_folder, require_absent, require_free_space, write_new
from mm.checkpoint.formats.found import Found
from mm.checkpoint.formats.pt_file import SUFFIXES, read_pt
from mm.checkpoint.formats.shard_files import write_shards
from mm.checkpoint.formats.source import TensorKind
from mm.checkpoint.mismatch import raise_on_mismatch
from mm.checkpoint.safetensor_file import DTYPES, Entry
from mm.config.base import load_json
from mm.errors import CheckpointError
from mm.wan import names_clip, names_t5
from mm.wan.name_pairs import Pair
from mm.wan.prefixes import common_prefix, unwrapped

log = logging.getLogger(__name__)

FORMAT = "a file of torch.save"
_WRAPPERS = ("state_dict", "module", "model_state")
"""The one key of an original file whose state dict is inside another dictionary."""


@dataclass(frozen=True)
class EncoderSource:
    """The tensors of an encoder at a path.

    Attributes:
        encoder: which. path: the file or folder. original: whether its names are those of the original.
        num_layers: of the encoder; what is counted for nothing in a VAE is 0.
        kinds: of every tensor, by the names there. read: one of them.
    """

    encoder: Encoder
    path: Path
    original: bool
    num_layers: int
    kinds: Mapping[str, TensorKind]
    read: Callable[[str], Tensor]

    @property
    def pairs(self) -> list[Pair]:
        """The tensors that it should have."""
        return self.encoder.pairs(self.num_layers)


def recognise(path: Path) -> Found | None:
    """A file that `torch.save` wrote: an encoder of the original release, or unknown, readable or not."""
    if path.suffix not in SUFFIXES or not path.is_file():
        return None
    try:
        encoder = encoder_of(_state(path))
    except CheckpointError:  # `open_encoder` says so; whoever wants other weights has no use for such a file at all
        encoder = None
    if encoder is None:
        return Found(path, FORMAT, path)
    return Found(path, FORMAT, path, "encoder", encoder.encoder.name)


def open_encoder(found: Found) -> EncoderSource | None:
    """The encoder that was found, or None where it is something else, such as a transformer.

    Raises:
        CheckpointError: CKPT-021 for a `.pth` file that is damaged or needs code to be read.
    """
    path = found.path
    if found.format == FORMAT:
        state = _state(path)
        return _source(
            path, {name: TensorKind(tuple(v.shape), v.dtype) for name, v in state.items()}, state.__getitem__
        )
    if found.content != "encoder":
        return None
    stored: dict[str, tuple[Path, TensorKind]] = {}
    for file, header in found.headers.items():
        stored |= {
            name: (file, TensorKind(info.shape, DTYPES[info.dtype]))
            for name, info in header.items()
            if info.dtype in DTYPES
        }

    def read(name: str) -> Tensor:
        with safe_open(stored[name][0], framework="pt") as file:
            value: Tensor = file.get_tensor(name)
        return value

    return _source(path, {name: kind for name, (_, kind) in stored.items()}, read)


def encoder_to_hf(source: EncoderSource, target: Path, like: Path | None, max_shard_bytes: int) -> None:
    """Write an encoder as a folder of diffusers or transformers, dtypes untouched.

    Args:
        source: of either kind of names.
        target: must not exist, or be an empty folder.
        like: a folder of this component, whose config.json is taken; None for the published sizes.
        max_shard_bytes: of a shard.

    Raises:
        CheckpointError: CKPT-011 for tensors that are missing, left over or of another shape, CKPT-020, CKPT-023 for
            sizes whose configuration nobody knows, CKPT-030, CKPT-031.
        ConfigError: CFG-001, CFG-002 for the config.json of `like`.
    """
    require_absent(target)
    expected, config = _configuration(source.encoder, like)
    entries = hf_entries(source)
    found = {entry.name: tuple(entry.shape) for entry in entries}
    different = [
        f"{name} is {list(shape)} there, {list(expected[name])} in the configuration"
        for name, shape in found.items()
        if name in expected and shape != expected[name]
    ]
    if like is None and different:
        raise CheckpointError(
            "CKPT-023",
            f"{source.path} is {source.encoder.name} of other sizes than the published one ({different[0]}), and its "
            "configuration cannot be seen in the weights.",
            "Give a folder with its config.json with --ckpt_path.",
        )
    raise_on_mismatch(
        str(source.path), sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys()), different
    )
    _write(target, entries, source.encoder.hf_file, max_shard_bytes, config)


def encoder_to_native(source: EncoderSource, target: Path) -> None:
    """Write an encoder as one safetensors file with the name and names of the original release, in a new folder.

    Raises:
        CheckpointError: CKPT-011, CKPT-020, CKPT-030, CKPT-031.
    """
    require_absent(target)
    entries = _native_entries(source)
    size = sum(entry.num_bytes for entry in entries)
    _write(target, entries, f"{source.encoder.file}.safetensors", size, None)
    if source.encoder is CLIP:
        log.warning("Wrote the image encoder alone; the text tower of the original file is not part of Wan.")


def _write(target: Path, entries: Sequence[Entry], file: str, max_bytes: int, config: str | None) -> None:
    existing = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
    require_free_space(existing, sum(entry.num_bytes for entry in entries))
    with new_folder(target) as folder:
        write_shards(folder, entries, max_bytes, file)
        if config is not None:
            write_new(folder / "config.json", config)
    log.info("Wrote %d tensors to %s.", len(entries), target)


def _configuration(encoder: Encoder, like: Path | None) -> tuple[dict[str, tuple[int, ...]], str]:
    """The shapes that a configuration gives, and its text: of `like`, or of the published model."""
    values = None if like is None else load_json(like / "config.json")
    try:
        with torch.device("meta"):
            model, config = encoder.build(values)
    except Exception as error:  # the libraries raise errors of many unrelated types for values that make no sense
        from mm.wan.component import first_line  # it imports the libraries, which other conversions do without

        raise CheckpointError(
            "CKPT-022",
            f"--ckpt_path {like} is no folder of {encoder.name}: {first_line(error)}.",
            "Give the folder of this component of the Wan2.1 diffusers weights.",
        ) from None
    shapes = {hf_name(name): tuple(value.shape) for name, value in model.state_dict().items()}
    shapes.pop(names_t5.TIED_EMBEDDING, None)
    return shapes, config if like is None else (like / "config.json").read_text(encoding="utf-8")


def hf_entries(source: EncoderSource) -> list[Entry]:
    """Entries under the names of diffusers or transformers; of an original file its tensors are taken apart."""
    if not source.original:
        return [Entry(name, kind.dtype, kind.shape, partial(source.read, name)) for name, kind in source.kinds.items()]
    _require_names(source, [pair.native for pair in source.pairs])
    entries = []
    for pair in source.pairs:
        kind = source.kinds[pair.native]
        shapes = pair.to_hf(torch.empty(kind.shape, device="meta"))
        for index, (name, value) in enumerate(zip(pair.hf, shapes, strict=True)):
            entries.append(Entry(name, kind.dtype, tuple(value.shape), partial(_taken, source, pair, index)))
    return entries


def _native_entries(source: EncoderSource) -> list[Entry]:
    """Entries under the names of the original, put together from those of a folder."""
    if source.original:
        _require_names(source, [pair.native for pair in source.pairs])
        return [Entry(name, kind.dtype, kind.shape, partial(source.read, name)) for name, kind in source.kinds.items()]
    _require_names(source, [name for pair in source.pairs for name in pair.hf])
    entries = []
    for pair in source.pairs:
        kinds = [source.kinds[name] for name in pair.hf]
        value = pair.to_native(tuple(torch.empty(kind.shape, device="meta") for kind in kinds))
        entries.append(Entry(pair.native, kinds[0].dtype, tuple(value.shape), partial(_joined, source, pair)))
    return entries


def _taken(source: EncoderSource, pair: Pair, index: int) -> Tensor:
    return pair.to_hf(source.read(pair.native))[index].contiguous()


def _joined(source: EncoderSource, pair: Pair) -> Tensor:
    return pair.to_native(tuple(source.read(name) for name in pair.hf)).contiguous()


def _require_names(source: EncoderSource, expected: Iterable[str]) -> None:
    names = set(expected)
    missing, left_over = sorted(names - source.kinds.keys()), sorted(source.kinds.keys() - names)
    raise_on_mismatch(f"{source.path} ({source.encoder.name})", missing, left_over, [])


def _source(path: Path, kinds: dict[str, TensorKind], read: Callable[[str], Tensor]) -> EncoderSource | None:
    """The encoder that has these tensors, with the parts left out that are no part of it."""
    which = encoder_of(kinds)
    if which is None:
        return None
    prefix = common_prefix(kinds)
    names = {unwrapped(name.removeprefix(prefix)): name for name in kinds}
    used = {name: place for name, place in names.items() if not name.startswith(names_clip.UNUSED)}
    if len(used) < len(names):
        log.info("%s: %d tensors of the text tower are not part of Wan.", path, len(names) - len(used))
    if not which.original:
        used = _one_embedding({hf_name(name): place for name, place in used.items()})
    mine = {name: kinds[place] for name, place in used.items()}
    return EncoderSource(which.encoder, path, which.original, which.num_layers, mine, partial(_read_as, read, used))


def _read_as(read: Callable[[str], Tensor], places: Mapping[str, str], name: str) -> Tensor:
    return read(places[name])


def hf_name(name: str) -> str:
    """Spelling of files: newer transformers leaves a prefix out of a model without a head; tied names are one."""
    if name.startswith(("embeddings.", "pre_layrnorm.", "post_layernorm.", "encoder.layers.")):
        return names_clip.PREFIX + name
    return name


def _one_embedding(used: dict[str, str]) -> dict[str, str]:
    """The tied embedding of UMT5 under its first name."""
    tied = used.pop(names_t5.TIED_EMBEDDING, None)
    return used if tied is None else {names_t5.EMBEDDING: tied, **used}


def _state(file: Path) -> dict[str, Tensor]:
    """The tensors of an original file, mapped; CKPT-021 as `read_pt`."""
    content = read_pt(file)
    inner = next(iter(content.values())) if len(content) == 1 and next(iter(content)) in _WRAPPERS else content
    state = inner if isinstance(inner, dict) else content
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
