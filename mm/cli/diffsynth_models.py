"""The models of a DiffSynth-Studio command line, found out by what is in their files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mm.checkpoint.encoder_kinds import CLIP, T5, VAE
from mm.checkpoint.formats.found import Found
from mm.checkpoint.identify import identify
from mm.checkpoint.weights import open_weights
from mm.config.model import WanConfig
from mm.config.tasks.task import Source
from mm.dialects.diffsynth.named_models import NamedModel
from mm.dialects.diffsynth.translation import FoundModels
from mm.errors import ConfigError, MMError, Problem, raise_all
from mm.wan.config_json import infer_config

MODELS = Path("models")
"""Folder of released models, `models/OWNER/NAME/FILE`."""
_TOKENIZER = Path("google/umt5-xxl")
_HOME_OF_TOKENIZER = MODELS / "Wan-AI" / "Wan2.1-T2V-1.3B"
_TRANSFORMER = "a transformer"
_KINDS = {VAE.name: "Wan2.1_VAE.pth", T5.name: "models_t5_umt5-xxl-enc-bf16.pth"}
"""Models that every training names, with the file of the release."""
_IMAGE_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"


def find_models(named: Sequence[NamedModel], tokenizer: str | None) -> FoundModels:
    """Find out which file holds which model.

    Args:
        named: the models of a command line. tokenizer: its folder, where it is said.

    Raises:
        ConfigError: CFG-382 for files that are not there, CFG-383 for those of unknown content, two of one kind and
            kinds that are missing; and what looking into a file says is wrong with it. All at once.
    """
    problems: list[Problem] = []
    found: dict[str, list[Path]] = {}
    for model in named:
        try:
            path = _place(_files(model))
            found.setdefault(_kind(path, model.word), []).append(path)
        except MMError as error:
            problems += error.problems
    problems += _twice(found)
    shape: WanConfig | None = None
    transformer = found.get(_TRANSFORMER, [])
    if transformer:
        try:
            shape = _shape(transformer[0])
        except MMError as error:
            problems += error.problems
    if not problems:
        problems += _missing(found, shape, named[0].word)
    text = found.get(T5.name, [])
    folder = _tokenizer(tokenizer, text[0] if text else None)
    if folder is None:
        wanted = tokenizer or str(_HOME_OF_TOKENIZER / _TOKENIZER)
        remedy = "Give --tokenizer_path, the folder google/umt5-xxl of a released model."
        problems.append(Problem("CFG-382", f"The tokenizer is not there: {wanted} is no folder.", remedy))
    raise_all(ConfigError, problems)
    assert shape is not None and folder is not None  # noqa: S101  told of above
    image = found.get(CLIP.name)
    return FoundModels(
        str(transformer[0]),
        shape,
        str(found[VAE.name][0]),
        str(text[0]),
        str(folder),
        str(image[0]) if image is not None else None,
    )


def _files(model: NamedModel) -> list[Path]:
    """Files of a model; CFG-382 for those that are not there."""
    if model.paths:
        paths = [Path(path) for path in model.paths]
        missing = ", ".join(str(path) for path in paths if not path.exists())
        if missing:
            raise ConfigError("CFG-382", f"{model.word}: {missing} does not exist.", "Correct the path.")
        return paths
    home = MODELS / model.model_id
    paths = sorted(home.glob(model.pattern))
    if not paths:
        raise ConfigError("CFG-382", f"{model.word}: nothing in {home} matches {model.pattern}.", "Correct it.")
    return paths


def _place(files: Sequence[Path]) -> Path:
    """The path that stands for a model's files: their folder, or a file that lies there beside others."""
    folder = files[0].parent
    weights = {path.name for path in folder.glob("*.safetensors")}
    if files[0].suffix == ".safetensors" and weights == {file.name for file in files}:
        return folder  # with its config.json
    if len(files) == 1:
        return files[0]
    names = ", ".join(file.name for file in files[:3])
    found = f"{names}, ... are not all of the safetensors in {folder}: shards of one model lie in a folder of its own."
    raise ConfigError("CFG-382", found, "Name all of them, or move them into one.")


def _kind(path: Path, word: str) -> str:
    """Kind of a model; CFG-383 for a file of something else."""
    found: Found = identify(path)
    if found.content == "model":
        return _TRANSFORMER
    if found.content == "encoder":
        return found.names
    message = f"{word}: {path} holds neither a transformer of Wan nor its VAE, text or image encoder."
    raise ConfigError("CFG-383", message, "Correct the path; the shards of one model stand in a list of their own.")


def _shape(path: Path) -> WanConfig:
    source = open_weights(path)
    return source.config() or infer_config(source.shapes(), source.path)


def _twice(found: dict[str, list[Path]]) -> list[Problem]:
    return [
        Problem(
            "CFG-383",
            f"{' and '.join(map(str, paths))} are {kind} each, and a training has one.",
            "Name one; the shards of one model stand in a list of their own.",
        )
        for kind, paths in found.items()
        if len(paths) > 1
    ]


def _missing(found: dict[str, list[Path]], shape: WanConfig | None, word: str) -> list[Problem]:
    wanted = {_TRANSFORMER: "diffusion_pytorch_model*.safetensors", **_KINDS}
    if shape is not None and shape.task.made_by(Source.IMAGE_ENCODER):
        wanted[CLIP.name] = _IMAGE_FILE
    return [
        Problem("CFG-383", f"{word} names no {kind.removeprefix('a ').removeprefix('the ')}.", f"Add {file}.")
        for kind, file in wanted.items()
        if kind not in found
    ]


def _tokenizer(said: str | None, text: Path | None) -> Path | None:
    """The tokenizer's folder: the one that is said, or that beside the text encoder, or that of the released models."""
    if said is not None:
        return Path(said) if Path(said).is_dir() else None
    homes = [text.parent] if text is not None else []
    return next((home / _TOKENIZER for home in (*homes, _HOME_OF_TOKENIZER) if (home / _TOKENIZER).is_dir()), None)
