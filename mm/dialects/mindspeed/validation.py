"""inference_model.json of `--validation-config`: how clips are rendered with a model in training."""

from __future__ import annotations

from collections.abc import Iterator

from mm.config.rules.generation import GENERATION_RULES
from mm.config.run.around import validation_folder
from mm.config.run.generation import GenerationRun
from mm.config.run.training import TrainingRun
from mm.config.unread import broken, built, if_read, read_or
from mm.dialects.mindspeed.generate import translate
from mm.dialects.mindspeed.generate_flags import GenerateFlags
from mm.dialects.mindspeed.reading import Reading
from mm.errors import Problem


def read_validation(run: TrainingRun) -> tuple[GenerationRun | None, list[Problem]]:
    """Generation by which clips of a model in training are rendered, and its problems; nothing without validation.

    Args:
        run: the training, not yet checked. The file must describe its model (CFG-125).
    """
    flags = read_or(if_read(lambda: _flags(run)), None)
    if flags is None:
        return None, []
    rendering = translate(flags, Reading())
    problems = [*rendering.problems, *broken(GENERATION_RULES, rendering)]
    return rendering, problems or list(broken([_is_the_model], (run, rendering)))


def _flags(run: TrainingRun) -> GenerateFlags | None:
    asked, save = run.validation, run.checkpoint.save
    if asked is None or save is None:
        return None
    words = {
        "mm_model": asked.config,
        "load": "(the model in training)",
        "prompt": asked.prompts,
        "image": asked.images,
        "save_path": str(validation_folder(save)),
    }
    return built(GenerateFlags, words)


def _is_the_model(both: tuple[TrainingRun, GenerationRun]) -> Iterator[Problem]:
    run, rendering = both
    file = run.origins["model.shape.num_layers"].file
    ours, theirs = run.wan, rendering.wan
    fields = theirs.differing_fields(ours) + ["text_len"] * (theirs.text_len != ours.text_len)
    others = {f"predictor.{name} {getattr(theirs, name)}": f"{file} has {getattr(ours, name)}" for name in fields}
    if rendering.dtype != run.dtype:
        others[f"predictor.dtype {rendering.dtype}"] = f"the model is trained in {run.dtype}"
    if rendering.model.adapters:
        others["lora"] = "the model is rendered as it is trained"
    if rendering.model.low_noise is not None:
        others["low_noise"] = "the model in training is rendered alone"
    if rendering.sampling.attention != "exact":
        others["diffusion.attention sage"] = "the model is rendered as it is trained"
    asked = run.validation
    for has, instead in others.items():
        name = asked.config if asked is not None else ""
        yield Problem("CFG-125", f"{name} has {has}, and {instead}.", "Make them agree.")
