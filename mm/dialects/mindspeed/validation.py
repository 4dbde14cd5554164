"""inference_model.json of `--validation-config`: how clips are rendered with a model in training."""

from __future__ import annotations

from mm.config.inference import InferenceModel
from mm.config.run.around import validation_folder
from mm.config.run.training import TrainingRun
from mm.dialects.mindspeed.generate import GenerateFlags, load_inference
from mm.errors import ConfigError, Problem, raise_all


def load_validation(run: TrainingRun) -> InferenceModel | None:
    """Read the file, which must describe the model in training; None without validation.

    Raises:
        ConfigError: what `mm.dialects.mindspeed.generate.load_inference` raises; CFG-125 where the file tells another
            model.
    """
    asked, save = run.validation, run.checkpoint.save
    if asked is None or save is None:
        return None
    config = load_inference(
        GenerateFlags(
            mm_model=asked.config,
            load="(the model in training)",
            prompt=asked.prompts,
            image=asked.images,
            save_path=str(validation_folder(save)),
        )
    )
    file = run.origins["model.shape.num_layers"].file
    ours, theirs = run.wan, config.predictor.wan()
    fields = theirs.differing_fields(ours) + ["text_len"] * (theirs.text_len != ours.text_len)
    others = {f"predictor.{name} {getattr(theirs, name)}": f"{file} has {getattr(ours, name)}" for name in fields}
    if config.predictor.dtype != run.dtype:
        others[f"predictor.dtype {config.predictor.dtype}"] = f"the model is trained in {run.dtype}"
    if config.lora:
        others["lora"] = "the model is rendered as it is trained"
    raise_all(
        ConfigError,
        [
            Problem("CFG-125", f"{asked.config} has {has}, and {instead}.", "Make them agree.")
            for has, instead in others.items()
        ],
    )
    return config
