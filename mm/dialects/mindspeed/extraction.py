"""`mm extract`'s flags and the files that they name, as an extraction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mm.config.run.encoders import (
    EncodersSection,
    ImageEncoderSection,
    TextEncoderSection,
    Tiles,
    TokenizerSection,
    VideoEncoderSection,
)
from mm.config.run.extraction import (
    ExtractionRun,
    ExtractionSection,
    ExtractionSections,
    SourceClip,
    SourceSection,
    StoreSection,
    WaitingSection,
)
from mm.config.run.origins import Origins, Word
from mm.config.tasks.registry import DEFAULT
from mm.config.unread import UNREAD, UnreadError, broken, built, if_read, read_or
from mm.dialects.mindspeed.accepted_flags import ACCEPTED_EXTRACT_FLAGS
from mm.dialects.mindspeed.data_json import ExtractData
from mm.dialects.mindspeed.encoder_json import TokenizerConfig
from mm.dialects.mindspeed.extract_files import (
    RETIRED_EXTRACT_FLAGS,
    ExtractAutoencoder,
    ExtractFlags,
    ExtractModel,
    ExtractTools,
)
from mm.dialects.mindspeed.files import read_extract_data, read_extract_model, read_extract_tools
from mm.dialects.mindspeed.reading import Reading
from mm.dialects.mindspeed.words import EXTRACT_FLAGS
from mm.errors import Problem

_CLIP = {
    "num_frames": "num_frames",
    "frame_interval": "frame_interval",
    "height": "max_height",
    "width": "max_width",
    "min_num_frames": "min_num_frames",
    "reader": "video_reader_type",
}
"""Fields of a clip, here and in `preprocess_parameters`."""


@dataclass(frozen=True)
class ExtractFiles:
    """Contents of the files of a command line.

    Attributes:
        data: data.json. model: model_wan.json. tools: tools.json; None where it is not asked for.
    """

    data: ExtractData
    model: ExtractModel
    tools: ExtractTools | None


def read_extraction(argv: Sequence[str], world_size: int = 1) -> ExtractionRun:
    """The extraction that the words after `mm extract` ask for, with all that is wrong in them and in their files; not
    yet checked by the rules.
    """
    reading = Reading()
    flags = reading.flags(
        ExtractFlags, argv, "mm extract", accepted=ACCEPTED_EXTRACT_FLAGS, retired=RETIRED_EXTRACT_FLAGS
    )
    files = ExtractFiles(
        read_extract_data(flags.mm_data, reading),
        read_extract_model(flags.mm_model, reading),
        read_extract_tools(flags.mm_tool, reading),
    )
    return translate(flags, files, reading, world_size)


def translate(flags: ExtractFlags, files: ExtractFiles, reading: Reading, world_size: int = 1) -> ExtractionRun:
    """The extraction that a command line and its files describe, with what is wrong in them.

    Args:
        flags: the command line. files: what its files hold. reading: what reading these gave.
        world_size: the processes that were started.
    """
    data, model, tools = files.data, files.model, files.tools
    given: dict[str, dict[str, Any]] = {}
    for path, flag in EXTRACT_FLAGS.items():
        section, name = path.split(".")
        given.setdefault(section, {})[name] = flag.read(flags)
    task = if_read(lambda: _task(model, tools))
    place = tools.sorafeature.save_path if tools is not None else UNREAD
    sections = ExtractionSections(
        extraction=built(ExtractionSection, {**given["extraction"], "task": task}),
        data=source(data, given["data"]),
        encoders=encoders(model, data),
        output=built(StoreSection, {**given["output"], "path": place}),
        supervision=built(WaitingSection, given["supervision"]),
    )
    problems = [*reading.problems, *broken([partial(_tasks_agree, flags)], files)]
    return ExtractionRun.described(sections, extraction_origins(flags), world_size, tuple(problems), reading.told())


def source(data: ExtractData, reading: dict[str, Any] | None = None) -> SourceSection:
    """The videos and captions of data.json; `reading` has what it does not say."""
    basic, clip = data.dataset_param.basic_parameters, data.dataset_param.preprocess_parameters
    taken = built(SourceClip, {ours: getattr(clip, theirs) for ours, theirs in _CLIP.items()})
    values = {"path": basic.data_path, "folder": basic.data_folder, "clip": taken}
    return built(SourceSection, values | (reading or {}))


def encoders(model: ExtractModel, data: ExtractData) -> EncodersSection:
    """The encoders of model_wan.json, with the tokenizer of data.json."""
    ae, text = model.ae, model.text_encoder
    values = {
        "from_pretrained": ae.from_pretrained,
        "precision": ae.dtype,
        "tiling": ae.enable_tiling,
        "condition_tiling": if_read(lambda: _condition_tiling(ae)),
        "tiles": if_read(lambda: _tiles(ae)),
    }
    parts = {
        "vae": built(VideoEncoderSection, values),
        "text": built(TextEncoderSection, {"from_pretrained": text.from_pretrained, "precision": text.dtype}),
        "tokenizer": tokenizer(data.dataset_param.tokenizer_config),
        "image": if_read(lambda: _image_encoder(ae)),
    }
    return built(EncodersSection, parts)


def tokenizer(config: TokenizerConfig) -> TokenizerSection:
    """Section of the tokenizer that `tokenizer_config` names."""
    names = ("from_pretrained", "model_max_length")
    return built(TokenizerSection, {name: getattr(config, name) for name in names})


def _tiles(ae: ExtractAutoencoder) -> Tiles | None:
    given = ae.tiling_param
    return None if given is None else built(Tiles, {"size": given.tile_size, "stride": given.tile_stride})


def _condition_tiling(ae: ExtractAutoencoder) -> bool | None:
    asked = "auto" if ae.i2v_processor is None else ae.i2v_processor.i2v_vae_encode_tiling
    return None if asked == "auto" else asked


def _image_encoder(ae: ExtractAutoencoder) -> ImageEncoderSection | None:
    given = ae.i2v_processor
    return None if given is None else built(ImageEncoderSection, {"from_pretrained": given.image_encoder})


def _task(model: ExtractModel, tools: ExtractTools | None) -> str:
    """Task that the features are for; text to video where neither file says it, and unread where they disagree."""
    said = {task for task in (model.task, tools.task if tools is not None else None) if task is not None}
    if len(said) > 1:
        raise UnreadError
    return said.pop() if said else DEFAULT.name


def _tasks_agree(flags: ExtractFlags, files: ExtractFiles) -> Iterator[Problem]:
    """CFG-070: the task is said in two places, which must agree."""
    model, tools = files.model, files.tools
    if tools is None:
        return
    if model.task is not None and tools.task is not None and model.task != tools.task:
        message = f'"task" is {tools.task} in {flags.mm_tool} and {model.task} in {flags.mm_model}.'
        yield Problem("CFG-070", message, "Make them agree; the task decides what is extracted.")


def extraction_origins(flags: ExtractFlags) -> Origins:
    """The words of a command line and of the files that it names."""
    model = read_or(flags.mm_model, "model_wan.json")
    words = {path: flag.word() for path, flag in EXTRACT_FLAGS.items()}
    words |= words_of_source(read_or(flags.mm_data, "data.json")) | words_of_encoders(model)
    words["extraction.task"] = Word("task", model, file_word="--mm-model", is_json=True)
    tools = read_or(flags.mm_tool, "tools.json")
    words["output.path"] = Word("save_path", tools, "sorafeature.save_path", "--mm-tool", is_json=True)
    return Origins(words)


def words_of_source(file: str) -> dict[str, Word]:
    """The keys of data.json."""

    def key(name: str, parent: str) -> Word:
        return Word(name, file, f"dataset_param.{parent}.{name}", "--mm-data", is_json=True)

    words = {f"data.clip.{ours}": key(theirs, "preprocess_parameters") for ours, theirs in _CLIP.items()}
    words["data.path"] = key("data_path", "basic_parameters")
    words["data.folder"] = key("data_folder", "basic_parameters")
    for name in TokenizerSection.model_fields:
        words[f"encoders.tokenizer.{name}"] = key(name, "tokenizer_config")
    return words


def words_of_encoders(file: str) -> dict[str, Word]:
    """The keys of model_wan.json."""

    def key(dotted: str) -> Word:
        return Word(dotted, file, dotted, "--mm-model", is_json=True)

    return {
        "encoders.vae.from_pretrained": key("ae.from_pretrained"),
        "encoders.vae.precision": key("ae.dtype"),
        "encoders.vae.tiling": key("ae.enable_tiling"),
        "encoders.vae.condition_tiling": key("ae.i2v_processor.i2v_vae_encode_tiling"),
        "encoders.vae.tiles": key("ae.tiling_param"),
        "encoders.vae.tiles.size": key("ae.tiling_param.tile_size"),
        "encoders.vae.tiles.stride": key("ae.tiling_param.tile_stride"),
        "encoders.text.from_pretrained": key("text_encoder.from_pretrained"),
        "encoders.text.precision": key("text_encoder.dtype"),
        "encoders.image": key("ae.i2v_processor"),
        "encoders.image.from_pretrained": key("ae.i2v_processor.image_encoder"),
    }
