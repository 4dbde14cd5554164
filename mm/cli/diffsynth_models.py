"""The models of a DiffSynth-Studio command line, found out by what is in their files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mm.api.model import config_of
from mm.api.model_config import ModelConfig
from mm.api.pipeline_parts import Parts, find_parts
from mm.checkpoint.convert import write_as_native
from mm.checkpoint.identify import identify
from mm.checkpoint.identity import identity
from mm.checkpoint.joined import WithModule
from mm.checkpoint.weights import WeightSource, open_weights
from mm.config.tasks.task import Source
from mm.dialects.diffsynth.named_models import NamedModel
from mm.dialects.diffsynth.translation import FoundModels
from mm.errors import ConfigError

MODELS = Path("models")
"""Folder of released models, `models/OWNER/NAME/FILE`."""
_TOKENIZER = ModelConfig(model_id="Wan-AI/Wan2.1-T2V-1.3B", origin_file_pattern="google/*")
_BESIDE = Path("google/umt5-xxl")
"""Place of the tokenizer beside the text encoder."""


def find_models(named: Sequence[NamedModel], tokenizer: str | None, joined: Path, *, may_download: bool) -> FoundModels:
    """Find out which file holds which model.

    Args:
        named: the models of a command line. tokenizer: its folder, where it is said.
        joined: the folder that gets a transformer which is released in two parts.
        may_download: fetch files of released models that are not there.

    Raises:
        ConfigError: CFG-382 for shards that are not alone in their folder, CFG-383 for an image encoder that is
            missing, and what `mm.api.pipeline_parts.find_parts` raises for files that are not there, of something else,
            or twice.
        MMError: what looking into a file raises.
    """
    parts = _parts(named, tokenizer, may_download=may_download)
    source, image = parts.transformer, parts.image_encoder
    shape = config_of(source)
    if shape.task.made_by(Source.IMAGE_ENCODER) and image is None:
        found = f"{named[0].word} names no image encoder, and {shape.task.title} models are given its features."
        remedy = "Add models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth."
        raise ConfigError("CFG-383", found, remedy)
    is_joined = isinstance(source, WithModule)
    if not is_joined:
        _require_alone(source)
    return FoundModels(
        str(joined if is_joined else source.path),
        shape,
        str(parts.vae.path),
        str(parts.text_encoder.path),
        str(parts.tokenizer),
        str(image.path) if image is not None else None,
        joins=is_joined,
    )


def join_models(named: Sequence[NamedModel], tokenizer: str | None, joined: Path) -> None:
    """Write a transformer that is released in two parts into one folder, where it is not there yet.

    Args: as of `find_models`, which has found nothing wrong.

    Raises:
        ConfigError: CFG-445 where the folder holds another one.
        CheckpointError: what `mm.checkpoint.convert.write_as_native` raises.
    """
    source = _parts(named, tokenizer, may_download=False).transformer
    if not joined.exists():
        write_as_native(source, joined)
    elif identity(open_weights(identify(joined))) != identity(source):
        found = f"{joined} is not made of the models that {named[0].word} names."
        raise ConfigError("CFG-445", found, f"Name those of the run in {joined.parent}, or give another --output_path.")


def _parts(named: Sequence[NamedModel], tokenizer: str | None, *, may_download: bool) -> Parts:
    configs = [
        ModelConfig(path=list(one.paths))
        if one.paths
        else ModelConfig(model_id=one.model_id, origin_file_pattern=one.pattern)
        for one in named
    ]
    return find_parts(configs, _tokenizer(named, tokenizer), MODELS, may_download=may_download, shared=True)


def _require_alone(source: WeightSource) -> None:
    """CFG-382 where training, which opens a path, would find other weights there than are named."""
    if open_weights(identify(source.path)).kinds() != source.kinds():
        found = f"The shards that are named are not all of the safetensors in {source.path}."
        raise ConfigError("CFG-382", found, "Move the model's own into a folder of theirs.")


def _tokenizer(named: Sequence[NamedModel], said: str | None) -> ModelConfig:
    """The tokenizer that is said, or one beside the files that are named, or that of the released models."""
    if said is not None:
        return ModelConfig(path=said)
    folders = [Path(path).parent / _BESIDE for model in named for path in model.paths]
    beside = next((folder for folder in folders if folder.is_dir()), None)
    return _TOKENIZER if beside is None else ModelConfig(path=beside)
