"""The file of `--validation-config`, inference_model.json or run.yaml: clips of a model in training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mm.config.rules.generation import GENERATION_RULES
from mm.config.run.around import ValidationSection, validation_folder
from mm.config.run.file import load_run, of_kind
from mm.config.run.generation import GenerationRun
from mm.config.run.parallel import MeshSection
from mm.config.run.residency import Residency
from mm.config.run.training import TrainingRun
from mm.config.unread import broken, built, if_read, read_or
from mm.dialects.mindspeed.generate import translate
from mm.dialects.mindspeed.generate_flags import GenerateFlags
from mm.dialects.mindspeed.reading import Reading
from mm.errors import ConfigError, Problem, raise_all

_IN_TRAINING = "(the model in training)"


def read_validation(run: TrainingRun) -> tuple[GenerationRun | None, list[Problem]]:
    """Generation by which clips of a model in training are rendered, and its problems; nothing without validation.

    Args:
        run: the training, not yet checked. The file must describe its model (CFG-125).
    """
    try:
        rendering = read_or(if_read(lambda: _rendering(run)), None)
    except ConfigError as error:
        return None, [*error.problems]
    if rendering is None:
        return None, []
    problems = [*rendering.problems, *broken(GENERATION_RULES, rendering)]
    return rendering, problems or list(broken([_is_the_model], (run, rendering)))


def _rendering(run: TrainingRun) -> GenerationRun | None:
    asked, save = run.validation, run.checkpoint.save
    if asked is None or save is None:
        return None
    if asked.config.endswith((".yaml", ".yml")):
        return _of_file(asked, save)
    words = {
        "mm_model": asked.config,
        "load": _IN_TRAINING,
        "prompt": asked.prompts,
        "image": asked.images,
        "save_path": str(validation_folder(save)),
    }
    return translate(built(GenerateFlags, words), Reading())


def _of_file(asked: ValidationSection, save: str) -> GenerationRun:
    """The generation of a run.yaml, with the prompts and images that the training's words name.

    Raises:
        ConfigError: what `load_run` raises, what is wrong in the file, and CFG-194 for a run of another kind.
    """
    rendering = of_kind(load_run(Path(asked.config)), GenerationRun)
    raise_all(ConfigError, rendering.problems)
    folder = str(validation_folder(save))
    values = {"inputs.prompts": asked.prompts, "model.weights": _IN_TRAINING, "output.path": folder}
    return rendering.changed(values | ({} if asked.images is None else {"inputs.images": asked.images}))


def _is_the_model(both: tuple[TrainingRun, GenerationRun]) -> Iterator[Problem]:
    run, rendering = both
    file = run.origins["model.shape.num_layers"].file

    def said(path: str, value: object) -> str:
        word = rendering.origins[path]
        return f"{word.key or word.name} {value}"

    ours, theirs = run.wan, rendering.wan
    fields = theirs.differing_fields(ours) + ["text_len"] * (theirs.text_len != ours.text_len)
    others = {
        said(f"model.shape.{name}", getattr(theirs, name)): f"{file} has {getattr(ours, name)}" for name in fields
    }
    if rendering.dtype != run.dtype:
        others[said("model.precision", rendering.dtype)] = f"the model is trained in {run.dtype}"
    if rendering.model.adapters:
        others["lora"] = "the model is rendered as it is trained"
    if rendering.model.low_noise is not None:
        others["low_noise"] = "the model in training is rendered alone"
    if rendering.sampling.attention != "exact":
        others["diffusion.attention sage"] = "the model is rendered as it is trained"
    if rendering.parallel != MeshSection() or rendering.residency != Residency():
        others["a layout"] = "the model is rendered where it is trained"
    asked = run.validation
    for has, instead in others.items():
        name = asked.config if asked is not None else ""
        yield Problem("CFG-125", f"{name} has {has}, and {instead}.", "Make them agree.")
