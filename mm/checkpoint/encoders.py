"""The three encoders of Wan2.1 between their original files and the folders of diffusers and transformers.

A source is told apart by the names in it: one file of the original (`.pth`, read without running code, or safetensors),
or a component's folder. The configuration of a folder cannot be read off an original file, which is why only published
sizes are known without the config.json of another folder.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

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
from mm.wan.names_clip import clip_pairs
from mm.wan.names_t5 import t5_pairs
from mm.wan.names_vae import vae_pairs
from mm.wan.prefixes import common_prefix, unwrapped
from mm.wan.shards import DIFFUSERS_FILE

log = logging.getLogger(__name__)

FORMAT = "a file of torch.save"
TRANSFORMERS_FILE = "model.safetensors"
_WRAPPERS = ("state_dict", "module", "model_state")
"""The one key of an original file whose state dict is inside another dictionary."""


@dataclass(frozen=True)
class Encoder:
    """What is known of one of the encoders.

    Attributes:
        name: for messages. file: of its weights in the original release, without a suffix.
        hf_file: of its weights in a folder.
        mark, hf_mark: names that it alone has, in the original and elsewhere; the group counts layers.
        pairs: its tensors, by the number of layers.
        build: a model on the meta device and the text of its config.json, from a config.json's content or, for None, of
            the published size.
    """

    name: str
    file: str
    hf_file: str
    mark: str
    hf_mark: str
    pairs: Callable[[int], list[Pair]]
    build: Callable[[Mapping[str, Any] | None], tuple[nn.Module, str]]


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


class EncoderNames(NamedTuple):
    """Which encoder some names are of, whether they are those of the original, and the number of its layers."""

    encoder: Encoder
    original: bool
    num_layers: int


def encoder_of(names: Iterable[str]) -> EncoderNames | None:
    """The encoder that has tensors of these names, or None."""
    listed = list(names)
    prefix = common_prefix(listed)  # DiffSynth's `model.`, of the VAE
    bare = [unwrapped(name.removeprefix(prefix)) for name in listed]
    for encoder in ENCODERS:
        for original, mark in ((True, encoder.mark), (False, encoder.hf_mark)):
            layers = {int(match[1] or 0) for name in bare if (match := re.fullmatch(mark, name))}
            if layers:
                return EncoderNames(encoder, original, max(layers) + 1)
    return None


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
    entries = _hf_entries(source)
    found = {entry.name: tuple(entry.shape) for entry in entries}
    different = [f"{name} is {list(found[name])} there, {list(expected[name])} in the configuration"
                 for name in found if name in expected and found[name] != expected[name]]  # fmt: skip
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
    shapes = {_hf_name(name): tuple(value.shape) for name, value in model.state_dict().items()}
    shapes.pop(names_t5.TIED_EMBEDDING, None)
    return shapes, config if like is None else (like / "config.json").read_text(encoding="utf-8")


def _hf_entries(source: EncoderSource) -> list[Entry]:
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
        used = _one_embedding({_hf_name(name): place for name, place in used.items()})
    mine = {name: kinds[place] for name, place in used.items()}
    return EncoderSource(which.encoder, path, which.original, which.num_layers, mine, partial(_read_as, read, used))


def _read_as(read: Callable[[str], Tensor], places: Mapping[str, str], name: str) -> Tensor:
    return read(places[name])


def _hf_name(name: str) -> str:
    """As files have it: newer transformers leaves a prefix out of a model without a head; tied names are one."""
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


def _build_vae(values: Mapping[str, Any] | None) -> tuple[nn.Module, str]:
    from diffusers import AutoencoderKLWan  # only where an encoder is converted: it takes seconds to import

    model = AutoencoderKLWan() if values is None else AutoencoderKLWan.from_config(dict(values))
    return model, model.to_json_string()


def _build_t5(values: Mapping[str, Any] | None) -> tuple[nn.Module, str]:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(**_T5) if values is None else UMT5Config.from_dict(dict(values))
    config.architectures = ["UMT5EncoderModel"]
    return UMT5EncoderModel(config), config.to_json_string(use_diff=False)


def _build_clip(values: Mapping[str, Any] | None) -> tuple[nn.Module, str]:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(**_CLIP) if values is None else CLIPVisionConfig.from_dict(dict(values))
    config.architectures = ["CLIPVisionModelWithProjection"]
    return CLIPVisionModelWithProjection(config), config.to_json_string(use_diff=False)


_T5: dict[str, Any] = {
    "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}  # fmt: skip
"""UMT5-XXL (google/umt5-xxl), with the vocabulary of Wan's file."""
_CLIP: dict[str, Any] = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
    "patch_size": 14, "image_size": 224, "projection_dim": 1024, "hidden_act": "gelu",
}  # fmt: skip
"""The visual half of laion/CLIP-ViT-H-14-laion2B-s32B-b79K."""

VAE = Encoder(
    "the video VAE",
    "Wan2.1_VAE",
    DIFFUSERS_FILE,
    r"decoder\.upsamples\.(0)\.residual\.0\.gamma",
    r"decoder\.up_blocks\.(0)\.resnets\.0\.norm1\.gamma",
    lambda _: vae_pairs(),
    _build_vae,
)
T5 = Encoder(
    "the text encoder UMT5",
    "models_t5_umt5-xxl-enc-bf16",
    TRANSFORMERS_FILE,
    r"blocks\.(\d+)\.ffn\.gate\.0\.weight",
    r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.q\.weight",
    t5_pairs,
    _build_t5,
)
CLIP = Encoder(
    "the image encoder CLIP",
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14",
    TRANSFORMERS_FILE,
    r"visual\.transformer\.(\d+)\.attn\.to_qkv\.weight",
    r"(?:vision_model\.)?encoder\.layers\.(\d+)\.self_attn\.q_proj\.weight",
    clip_pairs,
    _build_clip,
)
ENCODERS = (VAE, T5, CLIP)
