"""Rules about what is looked at between the steps of a training run: losses on held-out features, rendered clips."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mm.config.generate import GenerateFlags, load_inference
from mm.config.inference import InferenceModel
from mm.config.request import Request
from mm.config.train import PretrainModel, TrainFlags
from mm.errors import ConfigError, Problem, raise_all


def evaluation_is_complete(request: Request) -> Iterator[Problem]:
    """CFG-124: flags that say nothing without each other."""
    flags = request.flags
    groups = (("eval_interval", "eval_data"), ("validation_interval", "validation_prompts", "validation_config"))
    for names in groups:
        missing = [_flag(name) for name in names if getattr(flags, name) is None]
        given = [_flag(name) for name in names if getattr(flags, name) is not None]
        if given and missing:
            yield Problem("CFG-124", f"{given[0]} needs {' and '.join(missing)}.", "Give all of them, or none.")
    if flags.validation_images is not None and flags.validation_prompts is None:
        yield Problem("CFG-124", "--validation-images has no effect without --validation-prompts.", "Give both.")
    if flags.validation_interval is not None and flags.save is None:
        yield Problem("CFG-124", "--validation-interval needs --save, where the clips go.", "Give --save.")


def replicas_are_comparable(request: Request) -> Iterator[Problem]:
    """CFG-126: comparing weights needs ranks that hold the same ones."""
    if request.flags.check_replica_hash_interval is None or request.dp is None:
        return
    holders = request.dp * request.cp
    if holders == (1 if request.zero is None else request.zero.zero3_size):
        yield Problem(
            "CFG-126",
            "--check-replica-hash-interval has no effect: no two of the processes hold the same weights.",
            "Remove it.",
        )


def ranks_are_comparable(request: Request) -> Iterator[Problem]:
    """CFG-128: a slow rank is one that is slower than others."""
    if request.flags.straggler_interval is not None and request.world_size == 1:
        yield Problem("CFG-128", "--straggler-interval has no effect: there is one process.", "Remove it.")


def load_validation(flags: TrainFlags, model: PretrainModel) -> InferenceModel | None:
    """Read the file of `--validation-config`, which must describe the model in training; None without validation.

    Args:
        flags, model: accepted by `evaluation_is_complete`.

    Raises:
        ConfigError: what `mm.config.generate.load_inference` raises; CFG-125 where the file tells another model.
    """
    if flags.validation_interval is None or flags.validation_config is None or flags.save is None:
        return None
    config = load_inference(
        GenerateFlags(
            mm_model=flags.validation_config,
            load="(the model in training)",
            prompt=flags.validation_prompts,
            image=flags.validation_images,
            save_path=str(validation_folder(flags.save)),
        )
    )
    ours, theirs = model.predictor.wan(), config.predictor.wan()
    fields = theirs.differing_fields(ours) + ["text_len"] * (theirs.text_len != ours.text_len)
    problems = [
        _another(flags, f"predictor.{name} {getattr(theirs, name)}", f"{flags.mm_model} has {getattr(ours, name)}")
        for name in fields
    ]
    dtype = "bf16" if flags.bf16 else "fp32"
    if config.predictor.dtype != dtype:
        problems.append(
            _another(flags, f"predictor.dtype {config.predictor.dtype}", f"the model is trained in {dtype}")
        )
    if config.lora:
        problems.append(_another(flags, "lora", "the model is rendered as it is trained"))
    raise_all(ConfigError, problems)
    return config


def validation_folder(save: str) -> Path:
    """Where the clips of a run go."""
    return Path(save) / "validation"


def _another(flags: TrainFlags, has: str, instead: str) -> Problem:
    return Problem("CFG-125", f"{flags.validation_config} has {has}, and {instead}.", "Make them agree.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
