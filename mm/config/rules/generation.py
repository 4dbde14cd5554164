"""All rules of a generation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from mm.config.model import TASK_FIELD
from mm.config.rules.encoders import tile_problems
from mm.config.rules.mesh import MESH_RULES
from mm.config.rules.tasks import not_generated
from mm.config.run.generation import VAE_STRIDE, GenerationRun
from mm.config.tasks.registry import GENERATED, named
from mm.config.unread import broken, is_given
from mm.errors import ConfigError, Problem, raise_all


def check_generation(run: GenerationRun) -> None:
    """Check a generation before any device is touched.

    Raises:
        ConfigError: with what could not be read, what contradicts itself, and every violated rule.
    """
    raise_all(ConfigError, [*run.problems, *broken(GENERATION_RULES, run)])


def _weights_are_named(run: GenerationRun) -> Iterator[Problem]:
    """CFG-062: the transformer is somewhere."""
    if run.model.weights is None:
        named_by = run.origins.all_of("model.weights")
        said = f"Neither {' nor '.join(named_by)} says" if len(named_by) > 1 else f"{named_by[0]} does not say"
        yield Problem(
            "CFG-062", f"{said} where the transformer is.", "Give one of them." if len(named_by) > 1 else "Add it."
        )


def _solver_values_have_their_solver(run: GenerationRun) -> Iterator[Problem]:
    """CFG-063: values of UniPC."""
    sampling, words = run.sampling, run.origins
    given = {"solver_order": sampling.solver_order, "solver_type": sampling.solver_type}
    unipc_only = [words[f"sampling.{name}"] for name, value in given.items() if value is not None]
    if unipc_only and sampling.solver == "euler":
        names = " and ".join(word.name for word in unipc_only)
        found = f"{unipc_only[0].file}: {names} has no effect with the Euler sampler."
        yield Problem("CFG-063", found, "Remove it, or choose UniPC.")


def _guidance_is_there(run: GenerationRun) -> Iterator[Problem]:
    """CFG-063: batching the two passes of guidance needs guidance."""
    if run.sampling.batched_guidance and not run.sampling.guided:
        batched, scale = run.origins["sampling.batched_guidance"], run.origins["sampling.guidance_scale"]
        found = f"{batched.place()} has no effect with {scale.with_value(1)}."
        yield Problem("CFG-063", found, f"Remove it, or choose another {scale.name}.")


def _prompts_fit(run: GenerationRun) -> Iterator[Problem]:
    """CFG-064: no text that the transformer cannot take."""
    length, text_len = run.encoders.tokenizer.model_max_length, run.wan.text_len
    if length > text_len:
        word, most = run.origins["encoders.tokenizer.model_max_length"], run.origins["model.shape.text_len"]
        yield Problem(
            "CFG-064",
            f"{word.file}: {word.key or word.name} is {length}, more than the {text_len} text tokens of "
            f"{most.key or most.name}.",
            f"Lower {word.name}; prompts are cut there.",
        )


def _inputs_fit_the_model(run: GenerationRun) -> Iterator[Problem]:
    """CFG-120: a model gets the images that it was trained with, and nothing that it cannot take."""
    task, inputs, words = run.wan.task, run.inputs, run.origins
    of_images = {"inputs.images", "encoders.image", "inputs.last_frame"}
    columns = {f"inputs.columns.{column.name}": column.name in inputs.columns for column in task.columns}
    given = {
        **columns,
        **{f"inputs.columns.{name}": True for name in inputs.columns},
        "inputs.images": inputs.images is not None,
        "encoders.image": run.encoders.image is not None,
        "inputs.last_frame": inputs.last_frame,
        "inputs.videos": inputs.videos is not None,
    }
    needed = columns.keys() | ({"inputs.images", "encoders.image"} if task.frames else set())
    useless = {f"inputs.columns.{name}" for name in inputs.columns} - columns.keys()
    useless |= (set() if task.frames else of_images) | (set() if task.with_video else {"inputs.videos"})
    source = words[f"model.shape.{TASK_FIELD}"]
    said = f"{source.file}: {source.key or source.name} is {task.name}"
    missing = [path for path in given if path in needed and not given[path]]
    if missing:
        found = f"{said}, which needs {' and '.join(words[path].name for path in missing)}."
        how = f"Give {' and '.join(words[path].name for path in missing)}"
        yield Problem("CFG-120", found, f"{how}, or use the weights of a text-to-video model.")
    extra = [path for path in given if path in useless and given[path]]
    if extra:
        found = f"{said} (in_dim {run.wan.in_dim}), which takes no "
        found += f"{' and no '.join(words[path].name for path in extra)}."
        wanted = "with_video" if "inputs.videos" in extra else "frames" if of_images & set(extra) else "columns"
        works = [other for other in GENERATED.values() if getattr(other, wanted)]
        yield Problem("CFG-120", found, "Remove it" + (f", or use a model of {named(works)}." if works else "."))


def _videos_have_a_strength(run: GenerationRun) -> Iterator[Problem]:
    """CFG-121: strength and start_frame belong to given videos, and some of the steps are taken."""
    inputs, words, steps = run.inputs, run.origins, run.sampling.steps
    videos, strength = words["inputs.videos"], words["inputs.strength"]
    if inputs.videos is None:
        for name in ("strength", "start_frame"):
            if is_given(getattr(inputs, name)):
                found = f"{words[f'inputs.{name}'].place()} has no effect without {videos.name}."
                yield Problem("CFG-121", found, f"Remove it, or give {videos.name}.")
    elif inputs.strength is None:
        found = f"{videos.place()} is given without {strength.name}."
        yield Problem(
            "CFG-121", found, f"Give {strength.with_value(0.7)}, for example: how much of the video is made anew."
        )
    elif not 0 < inputs.strength <= 1 or int(steps * inputs.strength) < 1:
        yield Problem(
            "CFG-121",
            f"{strength.name} is {inputs.strength}, which takes none of the {steps} steps or more than all.",
            f"Use a number from {math.ceil(10_000 / steps) / 10_000} to 1.",
        )


def _frames_have_a_middle(run: GenerationRun) -> Iterator[Problem]:
    """CFG-123: a first and a last frame are two frames."""
    frames = run.output.num_frames
    if len(run.row_task.frames) > 1 and frames < VAE_STRIDE[0] + 1:
        found = f"{run.origins['output.num_frames'].place()}: a clip of {frames} frames has no first and last one."
        yield Problem("CFG-123", found, f"Use {VAE_STRIDE[0] + 1} frames or more.")


def _size_is_possible(run: GenerationRun) -> Iterator[Problem]:
    """CFG-060, CFG-061: a size that the VAE and the patches can make."""
    yield from size_problems(run.output.size, run.wan.patch_size, run.origins["output.num_frames"].name)


def _tiles_cover_the_frame(run: GenerationRun) -> Iterator[Problem]:
    """CFG-055."""
    yield from tile_problems(run.encoders.vae, run.origins)


def size_problems(size: tuple[int, int, int], patch_size: tuple[int, int, int], name_of_size: str) -> Iterator[Problem]:
    """CFG-060 and CFG-061 for a clip's frames, height and width that the VAE and the patches cannot make."""
    frames, height, width = size
    stride, patch = VAE_STRIDE, patch_size
    if frames < 1 or (frames - 1) % stride[0]:
        below = max(1, (frames - 1) // stride[0] * stride[0] + 1)
        yield Problem(
            "CFG-060",
            f"{name_of_size} asks for {frames} frames; the VAE makes 4k + 1.",
            f"Use {below} or {below + stride[0]}.",
        )
    for name, pixels, multiple in (("height", height, stride[1] * patch[1]), ("width", width, stride[2] * patch[2])):
        if pixels < multiple or pixels % multiple:
            below = max(multiple, pixels // multiple * multiple)
            yield Problem(
                "CFG-061",
                f"{name_of_size} asks for a {name} of {pixels} pixels, which is no positive multiple of {multiple}.",
                f"Use {below} or {below + multiple}.",
            )


def _task_is_made(run: GenerationRun) -> Iterator[Problem]:
    """CFG-274."""
    yield from not_generated(run.wan.task)


GENERATION_RULES: tuple[Callable[[GenerationRun], Iterator[Problem]], ...] = (
    _task_is_made,
    _size_is_possible,
    _weights_are_named,
    _solver_values_have_their_solver,
    _guidance_is_there,
    _prompts_fit,
    _tiles_cover_the_frame,
    _inputs_fit_the_model,
    _videos_have_a_strength,
    _frames_have_a_middle,
    *MESH_RULES,
)
