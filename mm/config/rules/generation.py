"""All rules of a generation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from mm.config.data import TEMPORAL_STRIDE
from mm.config.model import TASK_FIELD
from mm.config.rules.encoders import tile_problems
from mm.config.rules.mesh import MESH_RULES
from mm.config.rules.residency import residency_rules
from mm.config.rules.sampling import SAMPLING_RULES
from mm.config.rules.timesteps import timesteps_are_of_the_model
from mm.config.run.generation import GenerationRun
from mm.config.run.listed import LISTS, begins_as, every_list_of
from mm.config.tasks.frames import CONDITION_TILES
from mm.config.tasks.registry import SETTINGS, TASKS, named
from mm.config.tasks.task import Source, Task
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
    """CFG-063: values of UniPC, of which DPM++ has an order too."""
    sampling, words = run.sampling, run.origins
    without = {"euler": ("solver_order", "solver_type"), "dpm++": ("solver_type",)}.get(sampling.solver, ())
    extra = [words[f"sampling.{name}"] for name in without if getattr(sampling, name) is not None]
    if extra:
        names, title = " and ".join(word.name for word in extra), {"euler": "Euler", "dpm++": "DPM++"}[sampling.solver]
        found = f"{extra[0].file}: {names} has no effect with the {title} sampler."
        yield Problem("CFG-063", found, "Remove it, or choose UniPC.")


def _guidance_is_there(run: GenerationRun) -> Iterator[Problem]:
    """CFG-063: batching the two passes of guidance needs guidance."""
    if run.sampling.batched_guidance and not run.guided:
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
    """CFG-120: a model gets what it was trained with, and nothing that it cannot take."""
    if len(_ways_to_show(run)) > 1:
        return  # CFG-280
    task, inputs, words = run.wan.task, run.inputs, run.origins
    columns = {f"inputs.columns.{name}": name for name in (*(column.name for column in task.columns), *inputs.columns)}
    given = {
        **{path: name in inputs.columns for path, name in columns.items()},
        **{f"inputs.{name}": name in inputs.lists for name in LISTS},
        "encoders.image": run.encoders.image is not None,
        "inputs.last_frame": inputs.last_frame,
        "inputs.text_only": inputs.text_only,
        **{f"inputs.{name}": name in inputs.settings for name in SETTINGS},
    }
    needed = {f"inputs.columns.{column.name}" for column in task.columns}
    needed |= {f"inputs.{name}" for name, listed in run.row_lists.items() if listed.needed}
    needed |= {"encoders.image"} if run.sees_images else set()
    taken = {f"inputs.{name}" for name in (*run.row_lists, *(of.name for of in task.made_by(Source.SETTING)))} | needed
    taken |= {"inputs.last_frame"} if task.frames else set()
    taken |= {"inputs.text_only"} if task.with_mask else set()
    taken |= {"encoders.image"} if task.made_by(Source.IMAGE_ENCODER) else set()
    source = words[f"model.shape.{TASK_FIELD}"]
    said = f"{source.file}: {source.key or source.name} is {task.name}"
    missing = [path for path in given if path in needed and not given[path]]
    if missing:
        names = " and ".join(words[path].name for path in missing)
        how = f"Give {names}, or use the weights of a text-to-video model."
        yield Problem("CFG-120", f"{said}, which needs {names}.", how)
    extra = [path for path in given if path not in taken and given[path]]
    if "inputs.input_videos" in extra and "videos" in run.row_lists:
        extra.remove("inputs.input_videos")
        found = f"{said}, which sees no video beside {words['inputs.input_videos'].name}."
        yield Problem("CFG-120", found, f"Give it as {words['inputs.videos'].name}: the clip begins as that.")
    if extra:
        found = f"{said} (in_dim {run.wan.in_dim}), which takes no "
        found += f"{' and no '.join(words[path].name for path in extra)}."
        works = [other for other in TASKS.values() if all(_takes(other, path) for path in extra)]
        yield Problem("CFG-120", found, "Remove it" + (f", or use a model of {named(works)}." if works else "."))


def _first_frames_can_be_given(run: GenerationRun) -> Iterator[Problem]:
    """CFG-306: a first frame for a model that cannot be told that it is clean."""
    if run.wan.force_2_1_time_embedding and run.inputs.images is not None:
        forced = run.origins["model.shape.force_2_1_time_embedding"].with_value(True)
        found = f"With {forced} nothing tells the model of the frame that {run.origins['inputs.images'].name} gives."
        yield Problem("CFG-306", found, "Remove one of them.")


def _takes(task: Task, path: str) -> bool:
    """Tell whether models of a task can be given the value at a path of `inputs` or `encoders`."""
    name = path.removeprefix("inputs.")
    if path == "encoders.image":
        return bool(task.made_by(Source.IMAGE_ENCODER))
    if name.startswith("columns."):
        return name.removeprefix("columns.") in {column.name for column in task.columns}
    if name == "last_frame":
        return task.with_last_frame is not None
    if name == "text_only":
        return task.with_mask
    return name in every_list_of(task) | {feature.name for feature in task.made_by(Source.SETTING)}


def _ways_to_show(run: GenerationRun) -> list[str]:
    """Paths of the ways in which a model with given frames is told what it sees, where it can be told in several."""
    inputs = run.inputs
    if not run.wan.task.with_mask:
        return []
    ways = {"images": inputs.images is not None, "masks": inputs.masks is not None, "text_only": inputs.text_only}
    return [f"inputs.{name}" for name, is_given in ways.items() if is_given]


def _one_way_to_show(run: GenerationRun) -> Iterator[Problem]:
    """CFG-280: frames, or a video and its mask, or nothing."""
    ways = [run.origins[path].name for path in _ways_to_show(run)]
    if len(ways) > 1:
        found = f"{' and '.join(ways)} say each what the model sees of its clip."
        yield Problem("CFG-280", found, "Give one of them.")


_OF_STRENGTH = ("strength", "strength_steps")


def _videos_have_a_strength(run: GenerationRun) -> Iterator[Problem]:
    """CFG-121: strength and start_frame belong to given videos, and some of the steps are taken.

    Clips have no strength where the model sees the videos themselves, and is given none that they begin as.
    """
    inputs, words, steps = run.inputs, run.origins, run.sampling.steps
    begins = begins_as(run.row_task, inputs.shown)
    videos, strength, edited = words[f"inputs.{begins}"], words["inputs.strength"], words["inputs.videos"]
    if inputs.videos is None and inputs.input_videos is None and is_given(inputs.start_frame):
        found = f"{words['inputs.start_frame'].place()} has no effect without {edited.name}."
        yield Problem("CFG-121", found, f"Remove it, or give {edited.name}.")
    if getattr(inputs, begins) is None:
        sees = inputs.videos is not None and begins != "videos"
        why = f"on a model that sees {edited.name}" if sees else f"without {videos.name}"
        for word in (words[f"inputs.{name}"] for name in _OF_STRENGTH if is_given(getattr(inputs, name))):
            found = f"{word.place()} has no effect {why}."
            yield Problem("CFG-121", found, f"Remove it, or give {videos.name}, which clips begin as.")
    elif inputs.strength is None:
        found = f"{videos.place()} is given without {strength.name}."
        yield Problem(
            "CFG-121", found, f"Give {strength.with_value(0.7)}, for example: how much of the video is made anew."
        )
    elif not 0 < inputs.strength <= 1 or inputs.num_evaluated(steps) < 1:
        yield Problem(
            "CFG-121",
            f"{strength.name} is {inputs.strength}, which takes none of the {steps} steps or more than all.",
            f"Use a number from {math.ceil(10_000 / steps) / 10_000} to 1.",
        )


def _frames_have_a_middle(run: GenerationRun) -> Iterator[Problem]:
    """CFG-123: a first and a last frame are two frames."""
    frames = run.output.num_frames
    if len(run.row_task.frames) > 1 and frames < TEMPORAL_STRIDE + 1:
        found = f"{run.origins['output.num_frames'].place()}: a clip of {frames} frames has no first and last one."
        yield Problem("CFG-123", found, f"Use {TEMPORAL_STRIDE + 1} frames or more.")


def _size_is_possible(run: GenerationRun) -> Iterator[Problem]:
    """CFG-060, CFG-061: a size that the VAE and the patches can make."""
    yield from size_problems(run.output.size, run.wan.patch_size, run.wan.task, run.origins["output.num_frames"].name)


def _tiles_cover_the_frame(run: GenerationRun) -> Iterator[Problem]:
    """CFG-055."""
    yield from tile_problems(run.encoders.vae, run.origins)
    vae, conditions = run.encoders.vae, run.origins["encoders.vae.condition_tiling"]
    if is_given(vae.condition_tiling) and not run.wan.task.recipe >= CONDITION_TILES:
        found = f"{conditions.place()} has no effect: the VAE makes nothing that {run.wan.task.title} models see."
        yield Problem("CFG-055", found, "Remove it.")
    if is_given(vae.tile_blend) and vae.tiles_of_clips() is None and vae.tiles_of_conditions() is None:
        blend, tiling = (run.origins[f"encoders.vae.{name}"] for name in ("tile_blend", "tiling"))
        found = f"{blend.file}: {blend.name} has no effect while {tiling.name} is false."
        yield Problem("CFG-055", found, f"Remove it or set {tiling.name} to true.")


def size_problems(
    size: tuple[int, int, int], patch_size: tuple[int, int, int], task: Task, name_of_size: str
) -> Iterator[Problem]:
    """CFG-060 and CFG-061 for a clip's frames, height and width that the VAE and the patches cannot make."""
    frames, height, width = size
    if frames < 1 or (frames - 1) % TEMPORAL_STRIDE:
        below = max(1, (frames - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1)
        yield Problem(
            "CFG-060",
            f"{name_of_size} asks for {frames} frames; the VAE makes 4k + 1.",
            f"Use {below} or {below + TEMPORAL_STRIDE}.",
        )
    for name, pixels, patch in (("height", height, patch_size[1]), ("width", width, patch_size[2])):
        multiple = task.latent_pixels * patch
        if pixels < multiple or pixels % multiple:
            below = max(multiple, pixels // multiple * multiple)
            yield Problem(
                "CFG-061",
                f"{name_of_size} asks for a {name} of {pixels} pixels, which is no positive multiple of {multiple}.",
                f"Use {below} or {below + multiple}.",
            )


GENERATION_RULES: tuple[Callable[[GenerationRun], Iterator[Problem]], ...] = (
    _size_is_possible,
    _weights_are_named,
    _solver_values_have_their_solver,
    _guidance_is_there,
    _prompts_fit,
    timesteps_are_of_the_model,
    _first_frames_can_be_given,
    _tiles_cover_the_frame,
    _inputs_fit_the_model,
    _one_way_to_show,
    _videos_have_a_strength,
    _frames_have_a_middle,
    residency_rules,
    *SAMPLING_RULES,
    *MESH_RULES,
)
