"""Rules about inference_model.json with the flags put over it. Each is one function with its ids; all run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from mm.config.inference import VAE_STRIDE, InferenceModel
from mm.config.tasks.registry import TASKS, named
from mm.errors import Problem


def _weights_are_named(config: InferenceModel, source: str) -> Iterator[Problem]:
    """CFG-062: the transformer is somewhere."""
    if config.predictor.from_pretrained is None:
        yield Problem(
            "CFG-062",
            f"Neither --load nor predictor.from_pretrained in {source} says where the transformer is.",
            "Give one of them.",
        )


def _solver_keys_have_their_solver(config: InferenceModel, source: str) -> Iterator[Problem]:
    """CFG-063: keys of UniPC."""
    unipc_only = sorted({"solver_order", "solver_type"} & config.diffusion.model_fields_set)
    if unipc_only and config.diffusion.solver == "euler":
        yield Problem(
            "CFG-063",
            f"{source}: diffusion.{' and diffusion.'.join(unipc_only)} has no effect with the Euler sampler.",
            "Remove it, or choose UniPC.",
        )


def _guidance_is_there(config: InferenceModel, source: str) -> Iterator[Problem]:
    """CFG-063: batching the two passes of guidance needs guidance."""
    if config.diffusion.batched_guidance and not config.diffusion.guided:
        yield Problem(
            "CFG-063",
            f"{source}: diffusion.batched_guidance (--batched-guidance) has no effect with guidance_scale 1.",
            "Remove it, or choose another guidance_scale.",
        )


def _prompts_fit(config: InferenceModel, source: str) -> Iterator[Problem]:
    """CFG-064: no text that the transformer cannot take."""
    if config.tokenizer.model_max_length > config.predictor.text_len:
        yield Problem(
            "CFG-064",
            f"{source}: tokenizer.model_max_length is {config.tokenizer.model_max_length}, more than the "
            f"{config.predictor.text_len} text tokens of predictor.text_len.",
            "Lower model_max_length; prompts are cut there.",
        )


def _inputs_fit_the_model(config: InferenceModel, source: str) -> Iterator[Problem]:
    """CFG-120: a model gets the images that it was trained with, and nothing that it cannot take."""
    task, of_images = config.predictor.task, {"image", "image_encoder", "pipeline_config.dual_image"}
    columns = {f"columns.{column.name}": column.name in config.columns for column in task.columns}
    given = {
        **columns,
        **{f"columns.{name}": True for name in config.columns},
        "image": config.image is not None,
        "image_encoder": config.image_encoder is not None,
        "pipeline_config.dual_image": config.pipeline_config.dual_image,
        "video": config.video is not None,
    }
    needed = columns.keys() | ({"image", "image_encoder"} if task.frames else set())
    useless = {f"columns.{name}" for name in config.columns} - columns.keys()
    useless |= (set() if task.frames else of_images) | (set() if task.with_video else {"video"})
    missing = [name for name in given if name in needed and not given[name]]
    if missing:
        found = f"{source}: {config.predictor.task_in_words}, which needs {' and '.join(missing)}."
        how = "Give --image and the section image_encoder" if task.frames else "Give --columns NAME=FILE"
        remedy = f"{how}, or use the weights of a text-to-video model."
        yield Problem("CFG-120", found, remedy)
    extra = [name for name in given if name in useless and given[name]]
    if extra:
        found = f"{source}: {config.predictor.task_in_words} (in_dim {config.predictor.in_dim}), which takes no "
        found += f"{' and no '.join(extra)}."
        wanted = "with_video" if "video" in extra else "frames" if of_images & set(extra) else "columns"
        works = [other for other in TASKS.values() if getattr(other, wanted)]
        yield Problem("CFG-120", found, "Remove it" + (f", or use a model of {named(works)}." if works else "."))


def _videos_have_a_strength(config: InferenceModel, source: str) -> Iterator[Problem]:
    """CFG-121: strength and start_frame belong to given videos, and some of the steps are taken."""
    about = config.pipeline_config
    if config.video is None:
        for name in ("strength", "start_frame"):
            if getattr(about, name) is not None:
                found = f"{source}: pipeline_config.{name} has no effect without video."
                yield Problem("CFG-121", found, "Remove it, or give --video.")
    elif about.strength is None:
        found = f"{source}: video is given without pipeline_config.strength."
        yield Problem("CFG-121", found, "Give --strength, for example 0.7: how much of the video is made anew.")
    elif not 0 < about.strength <= 1 or int(config.diffusion.num_inference_steps * about.strength) < 1:
        steps = config.diffusion.num_inference_steps
        yield Problem(
            "CFG-121",
            f"strength is {about.strength}, which takes none of the {steps} steps or more than all.",
            f"Use a number from {math.ceil(10_000 / steps) / 10_000} to 1.",
        )


def _frames_have_a_middle(config: InferenceModel, source: str) -> Iterator[Problem]:
    """CFG-123: a first and a last frame are two frames."""
    if len(config.row_task.frames) > 1 and config.pipeline_config.input_size[0] < VAE_STRIDE[0] + 1:
        found = f"{source}: a clip of {config.pipeline_config.input_size[0]} frames has no first and last one."
        yield Problem("CFG-123", found, f"Use {VAE_STRIDE[0] + 1} frames or more.")


def _impossible_size(config: InferenceModel, source: str) -> Iterator[Problem]:
    """CFG-060, CFG-061: a size that the VAE and the patches can make."""
    del source
    yield from size_problems(config.pipeline_config.input_size, config.predictor.patch_size, "input_size")


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


GENERATION_RULES: tuple[Callable[[InferenceModel, str], Iterator[Problem]], ...] = (
    _impossible_size,
    _weights_are_named,
    _solver_keys_have_their_solver,
    _guidance_is_there,
    _prompts_fit,
    _inputs_fit_the_model,
    _videos_have_a_strength,
    _frames_have_a_middle,
)
"""Each takes the configuration and what to call its file."""
