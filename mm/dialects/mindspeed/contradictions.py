"""Contradictions of a command line of MindSpeed-MM: a value said twice, or half of what belongs together.

No section can hold them; the rules tell them with everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from mm.config.flags import flag_name
from mm.config.unread import broken
from mm.dialects.mindspeed.pretrain_json import PretrainModel
from mm.dialects.mindspeed.train_flags import TrainFlags
from mm.errors import Problem

_LORA = "--lora-r 16 --lora-alpha 16 --lora-target-modules q k v o --load-base-model TRANSFORMER"


def contradictions(flags: TrainFlags, model: PretrainModel) -> Iterator[Problem]:
    """Every one that can be seen of what could be read."""
    yield from broken([partial(find, flags) for find in _ALL], model)


def _task_agrees(flags: TrainFlags, model: PretrainModel) -> Iterator[Problem]:
    """CFG-070: the task is said in two places, which must agree."""
    task, predictor = model.task, model.predictor
    if task is not None and task != predictor.task.name:
        yield Problem(
            "CFG-070",
            f'"task" in {flags.mm_model} is {task}, and {predictor.task_in_words}.',
            "Make them agree, or remove task.",
        )


def _precision_agrees(flags: TrainFlags, model: PretrainModel) -> Iterator[Problem]:
    """CFG-022: the precision is said in two places, which must agree."""
    dtype = model.predictor.dtype
    if dtype is not None and (dtype == "bf16") != flags.bf16:
        given = "given" if flags.bf16 else "absent"
        yield Problem(
            "CFG-022",
            f"--bf16 is {given}, and predictor.dtype in {flags.mm_model} is {dtype}.",
            "Make them agree, or remove predictor.dtype.",
        )


def _layerzero_has_its_file(flags: TrainFlags, model: PretrainModel) -> Iterator[Problem]:
    """CFG-045: layer-zero is switched on and described, or neither."""
    del model
    yield from layerzero_has_its_file(layerzero=flags.layerzero, config=flags.layerzero_config)


def layerzero_has_its_file(*, layerzero: bool, config: str | None) -> Iterator[Problem]:
    """CFG-045: as above, for any command that has the two flags."""
    if layerzero and config is None:
        yield Problem("CFG-045", "--layerzero needs --layerzero-config.", "Give --layerzero-config zero_config.yaml.")
    if config is not None and not layerzero:
        yield Problem("CFG-045", "--layerzero-config has no effect without --layerzero.", "Add it, or remove this.")


def _several_tensors_have_a_pipeline(flags: TrainFlags, model: PretrainModel) -> Iterator[Problem]:
    """CFG-044: a flag about what crosses a stage boundary; it is how it always works, so no section holds it."""
    del model
    if flags.use_multiparameter_pipeline_model_parallel and flags.pipeline_model_parallel_size == 1:
        yield Problem(
            "CFG-044",
            "--use-multiparameter-pipeline-model-parallel has no effect with --pipeline-model-parallel-size 1.",
            "Remove it, or raise --pipeline-model-parallel-size.",
        )


def _flags_of_adapters_belong_together(flags: TrainFlags, model: PretrainModel) -> Iterator[Problem]:
    """CFG-104: adapters have a width, an alpha, linears and a base model. CFG-105: only they have a base model."""
    del model
    if not flags.lora:
        if flags.load_base_model is not None:
            yield Problem(
                "CFG-105",
                "--load-base-model has no effect without LoRA.",
                f"To train adapters give {_LORA}; to train all parameters give the weights to --load.",
            )
        return
    needed = {
        "--lora-r": flags.lora_r is not None,
        "--lora-alpha": flags.lora_alpha is not None,
        "--lora-target-modules": bool(flags.lora_target_modules),
        "--load-base-model": flags.load_base_model is not None,
    }
    missing = [name for name, given in needed.items() if not given]
    if missing:
        found = f"LoRA needs {' and '.join(missing)} as well."
        yield Problem("CFG-104", found, f"Give all of {_LORA}, or none of LoRA's flags.")


def _adapters_are_in_range(flags: TrainFlags, model: PretrainModel) -> Iterator[Problem]:
    """CFG-102 and CFG-103: a width, a scale, and no dropout."""
    del model
    rank, alpha, dropout = flags.lora_r, flags.lora_alpha, flags.lora_dropout
    if rank is not None and rank < 1:
        yield Problem("CFG-102", f"--lora-r is {rank}, expected 1 or more.", "Use 16, for example.")
    if alpha is not None and alpha <= 0:
        found = f"--lora-alpha is {alpha}, expected a number above 0."
        yield Problem("CFG-102", found, "Use the value of --lora-r, which scales the update by 1.")
    if dropout:
        found = f"--lora-dropout is {dropout}; dropout is not offered, as its masks would depend on the layout."
        yield Problem("CFG-103", found, "Remove it, or give 0.")


def _evaluation_is_complete(flags: TrainFlags, model: PretrainModel) -> Iterator[Problem]:
    """CFG-124: flags that say nothing without each other."""
    del model
    groups = (("eval_interval", "eval_data"), ("validation_interval", "validation_prompts", "validation_config"))
    for names in groups:
        missing = [flag_name(name) for name in names if getattr(flags, name) is None]
        given = [flag_name(name) for name in names if getattr(flags, name) is not None]
        if given and missing:
            yield Problem("CFG-124", f"{given[0]} needs {' and '.join(missing)}.", "Give all of them, or none.")
    if flags.validation_images is not None and flags.validation_prompts is None:
        yield Problem("CFG-124", "--validation-images has no effect without --validation-prompts.", "Give both.")
    incomplete = flags.validation_prompts is None or flags.validation_config is None  # else a rule tells
    if flags.validation_interval is not None and flags.save is None and incomplete:
        yield Problem("CFG-124", "--validation-interval needs --save, where the clips go.", "Give --save.")


def _budget_is_of_features_that_are_made(flags: TrainFlags, model: PretrainModel) -> Iterator[Problem]:
    """CFG-245: a budget of nothing."""
    del model
    if flags.live_budget is not None and not flags.live:
        yield Problem("CFG-245", "--live-budget has no effect without --live.", "Give --live, or remove it.")


def _experts_have_a_boundary(flags: TrainFlags, model: PretrainModel) -> Iterator[Problem]:
    """CFG-315: what is said of two experts without a boundary between them."""
    del model
    names = ("load_low_noise", "load_base_model_low_noise", "expert_steps", "offload_expert")
    given = [flag_name(name) for name in names if name in flags.model_fields_set]
    if given and flags.expert_boundary is None:
        found = f"{given[0]} has no effect without --expert-boundary."
        yield Problem("CFG-315", found, "Give it, 0.875 for Wan2.2's T2V-A14B and 0.9 for I2V-A14B; or remove this.")
    if flags.validation_other_expert is not None and flags.validation_prompts is None:
        found = "--validation-other-expert has no effect without --validation-prompts."
        yield Problem("CFG-124", found, "Give both.")


_ALL: tuple[Callable[[TrainFlags, PretrainModel], Iterator[Problem]], ...] = (
    _layerzero_has_its_file,
    _several_tensors_have_a_pipeline,
    _task_agrees,
    _precision_agrees,
    _evaluation_is_complete,
    _budget_is_of_features_that_are_made,
    _experts_have_a_boundary,
    _flags_of_adapters_belong_together,
    _adapters_are_in_range,
)
