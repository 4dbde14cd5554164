"""MindSpeed-MM's files and command lines, each read and checked by itself."""

from pathlib import Path

from mm.config.rules.generation import check_generation
from mm.config.run.generation import GenerationRun
from mm.dialects.mindspeed.accepted import Note
from mm.dialects.mindspeed.extract_files import ExtractModel, ExtractTools
from mm.dialects.mindspeed.files import read_extract_model, read_extract_tools, read_pretrain_model
from mm.dialects.mindspeed.generate import translate
from mm.dialects.mindspeed.generate_flags import GenerateFlags
from mm.dialects.mindspeed.pretrain_json import PretrainModel
from mm.dialects.mindspeed.reading import Reading, alone


def load_pretrain_model(path: Path, notes: list[Note] | None = None) -> PretrainModel:
    return alone(lambda reading: read_pretrain_model(str(path), reading), notes)


def load_extract_model(path: Path, notes: list[Note] | None = None) -> ExtractModel:
    return alone(lambda reading: read_extract_model(str(path), reading), notes)


def load_extract_tools(path: Path, notes: list[Note] | None = None) -> ExtractTools:
    return alone(lambda reading: read_extract_tools(str(path), reading), notes)


def load_generation(flags: GenerateFlags) -> GenerationRun:
    run = translate(flags, Reading())
    check_generation(run)
    return run
