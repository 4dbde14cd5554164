"""Clips between the steps of VideoX-Fun's trainers: `--validation_prompts` and what goes with them, as a generation.

The engine renders a generation's run.yaml (`mm.dialects.mindspeed.validation`); what the words mean is written as one,
with its lists, into `output_dir/sample` when the training is about to begin.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm.config.path_line import LineError, read_paths, write_paths
from mm.config.run.around import ValidationSection
from mm.config.run.extraction import ExtractionSections
from mm.config.run.file import whole_file
from mm.config.run.generation import (
    ClipsSection,
    GenerationEncoders,
    GenerationRun,
    GenerationSection,
    GenerationSections,
    GenerationVideoEncoder,
    InputsSection,
    SamplingSection,
    TransformerSection,
)
from mm.config.run.listed import Shown, lists_of, sees_images
from mm.config.run.origins import Origins, Word
from mm.config.tasks.task import ListName, MediaKind, Source
from mm.config.unread import UnreadError, built, if_read, is_given
from mm.dialects.videox_fun.flags import VideoxFlags
from mm.dialects.videox_fun.reading import Reading
from mm.dialects.videox_fun.training import Facts, precision_of, steps_of_pass

SAMPLE = "sample"
"""Folder in --output_dir where VideoX-Fun's users look for clips."""
_DEFAULT_STEPS = 2000  # between clips, as there
_SAMPLER_STEPS, _GUIDANCE, _FPS = 25, 4.5, 16  # as there
_SIDE = 16  # of which sides are multiples
_TITLES: Mapping[MediaKind, str] = {
    "video": "a control video",
    "image": "a start image",
    "images": "a start image",
    "poses": "a file of camera poses",
    "mask": "a mask",
}
Needed = Mapping[ListName, MediaKind]
"""The lists of which every prompt needs a line, each with its kind."""


@dataclass(frozen=True)
class Clips:
    """Clips between steps.

    Attributes:
        run: their generation, not yet checked, which reads the lists. file: where it is to be written.
        lists: lines of the lists by their files.
    """

    run: GenerationRun
    file: Path
    lists: Mapping[Path, list[str]]

    @property
    def texts(self) -> dict[Path, str]:
        """All of these files, with the generation's behind those that it names."""
        lists = {file: "".join(f"{line}\n" for line in lines) for file, lines in self.lists.items()}
        return {**lists, self.file: whole_file(self.run)}


def validation_section(flags: VideoxFlags, facts: Facts, reading: Reading) -> ValidationSection | None:
    """The training's section; None without prompts. Notes which of two intervals counts."""
    if not is_given(flags.validation_prompts):
        return None
    folder = Path(flags.output_dir, SAMPLE)
    values = {
        "interval": if_read(lambda: _interval(flags, facts, reading)),
        "prompts": str(_list(folder, "prompts")),
        "config": str(_file(folder)),
    }
    return built(ValidationSection, values)


def _list(folder: Path, name: str) -> Path:
    return folder / f"{name}.txt"


def _file(folder: Path) -> Path:
    return folder / "run.yaml"


def _interval(flags: VideoxFlags, facts: Facts, reading: Reading) -> int:
    steps, epochs = flags.validation_steps, flags.validation_epochs
    if not is_given(epochs):
        return steps if is_given(steps) else _DEFAULT_STEPS
    if not is_given(steps):
        return epochs * steps_of_pass(flags, facts)
    told = f"--validation_epochs {epochs} adds no clips: they come every {steps} steps, by --validation_steps"
    reading.notes.append(told)
    return steps


def clips_of(flags: VideoxFlags, facts: Facts, extraction: ExtractionSections, reading: Reading) -> Clips | None:
    """The clips that are asked for; None without prompts.

    Keeps CFG-430 for prompts and paths that do not go together, CFG-431 for prompts that are none.

    Raises:
        UnreadError: where something of them is not known.
    """
    if not is_given(flags.validation_prompts):
        if is_given(flags.validation_paths):
            found = "--validation_paths has no effect without --validation_prompts."
            reading.wrong("CFG-430", found, "Give a prompt for each, or remove it.")
        return None
    for number, prompt in enumerate(flags.validation_prompts, start=1):
        if not prompt.strip() or "\n" in prompt:
            found = f"Prompt {number} of --validation_prompts {'has a line end' if prompt.strip() else 'is empty'}."
            reading.wrong("CFG-431", found, "Give each as one line of text.")
    text_only = not is_given(flags.validation_paths) and bool(facts.task.made_by(Source.KNOWN_PIXELS))
    lists = lists_of(facts.shape.task, Shown(nothing=text_only))
    needed = {name: listed.kind for name, listed in lists.items() if listed.needed}
    rows = _rows(flags, needed, facts.shape.task.title, reading)
    folder = Path(flags.output_dir, SAMPLE)
    lines = {_list(folder, "prompts"): flags.validation_prompts}
    lines |= {_list(folder, name): [row[place] for row in rows] for place, name in enumerate(needed)}
    inputs = {name: str(_list(folder, name)) for name in ("prompts", *needed)} | {"text_only": text_only}
    sections = _sections(flags, facts, extraction, built(InputsSection, inputs))
    line = "the command line"
    words = {f"inputs.{name}": Word("--validation_paths") for name in lists_of(facts.shape.task, Shown())}
    words |= {f"output.{name}": Word("--video_sample_size", line) for name in ("height", "width")}
    words["output.num_frames"] = Word("--video_sample_n_frames", line)
    return Clips(GenerationRun.described(sections, Origins(words, file=line)), _file(folder), lines)


def _rows(flags: VideoxFlags, needed: Needed, models: str, reading: Reading) -> list[list[str]]:
    """The paths of each prompt, in the order of the lists, each as a line of its list; keeps CFG-430."""
    prompts, words = flags.validation_prompts or [], flags.validation_paths
    if not needed:
        if is_given(words):
            found = f"--validation_paths names files, and models of {models} see text alone."
            reading.wrong("CFG-430", found, "Remove it.")
        return []
    title = " and ".join(_TITLES[kind] for kind in needed.values())
    form = ', as "ONE,OTHER"' if len(needed) > 1 else ""
    remedy = f"Give {title} for each prompt{form}."
    if not is_given(words) or len(words) != len(prompts):
        found = f"--validation_paths names {len(words or [])} for {len(prompts)} in --validation_prompts."
        reading.wrong("CFG-430", found, remedy)
        raise UnreadError
    rows = []
    for word in words:
        try:
            paths = read_paths(word, (len(needed),), lambda paths: all(map(os.path.isfile, paths)))
        except LineError as error:
            reading.wrong("CFG-430", f'"{word}" of --validation_paths {error}.', remedy)
            continue
        for path in paths:
            if not os.path.isfile(path):
                found = f"{path} of --validation_paths does not exist."
                reading.wrong("CFG-430", found, "Correct the path, or add the file.")
        rows.append([write_paths([path]) for path in paths])
    return rows


def _sections(
    flags: VideoxFlags, facts: Facts, extraction: ExtractionSections, inputs: InputsSection
) -> GenerationSections:
    height, width = _sides(flags)
    transformer = {
        "shape": facts.shape,
        "precision": precision_of(flags, facts.launch),
        "weights": flags.transformer_path or flags.pretrained_model_name_or_path,
    }
    sampling = {
        "solver": "euler",
        "steps": _SAMPLER_STEPS,
        "shift": facts.config.scheduler_kwargs.shift,
        "guidance_scale": _GUIDANCE,
    }
    clips = {
        "path": str(Path(flags.output_dir, SAMPLE)),
        "num_frames": flags.video_sample_n_frames,
        "height": height,
        "width": width,
        "fps": _FPS,
    }
    chance = {"seed": extraction.extraction.seed, "device": extraction.extraction.device}
    values: dict[str, Any] = {
        "generation": built(GenerationSection, chance),
        "model": built(TransformerSection, transformer),
        "encoders": _encoders(facts, extraction, inputs),
        "inputs": inputs,
        "sampling": built(SamplingSection, sampling),
        "output": built(ClipsSection, clips),
    }
    return built(GenerationSections, values)


def _sides(flags: VideoxFlags) -> tuple[int, int]:
    """Height and width of the clips."""
    sides = flags.fix_sample_size
    if not is_given(sides) or len(sides) != 2:
        sides = [flags.video_sample_size] * 2
    return sides[0] // _SIDE * _SIDE, sides[1] // _SIDE * _SIDE


def _encoders(facts: Facts, extraction: ExtractionSections, inputs: InputsSection) -> GenerationEncoders:
    """The extraction's, with no more text than the model takes, and the image encoder where an image is shown."""
    own, task = extraction.encoders, facts.shape.task
    length = min(own.tokenizer.model_max_length, facts.shape.text_len)
    values = {
        "vae": built(
            GenerationVideoEncoder, {"from_pretrained": own.vae.from_pretrained, "precision": own.vae.precision}
        ),
        "text": own.text,
        "tokenizer": own.tokenizer.model_copy(update={"model_max_length": length}),
        "image": own.image if sees_images(task, frozenset(inputs.lists), inputs.shown) else None,
    }
    return built(GenerationEncoders, values)
