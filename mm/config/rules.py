"""Rules that look at more than one flag or file. Each is one function with its id; all run, all problems are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mm.config.train import PretrainModel, TrainFlags
from mm.errors import ConfigError, Problem, raise_all


def check_training(flags: TrainFlags, model: PretrainModel, world_size: int) -> None:
    """Check a training run before any device is touched.

    Raises:
        ConfigError: with every violated rule.
    """
    problems = [problem for rule in TRAINING_RULES for problem in rule(flags, model, world_size)]
    raise_all(ConfigError, problems)


def _only_data_parallel(flags: TrainFlags, model: PretrainModel, world_size: int) -> Iterator[Problem]:
    """CFG-020: the model-parallel axes that this version cannot split along."""
    sizes = {
        "--tensor-model-parallel-size": flags.tensor_model_parallel_size,
        "--pipeline-model-parallel-size": flags.pipeline_model_parallel_size,
        "--virtual-pipeline-model-parallel-size": flags.virtual_pipeline_model_parallel_size or 1,
        "--context-parallel-size": flags.context_parallel_size,
    }
    for name, size in sizes.items():
        if size > 1:
            yield Problem(
                "CFG-020",
                f"{name} is {size}, and this version splits along the data axis only.",
                "Set it to 1 and use more data-parallel processes.",
            )


def _batch_divides(flags: TrainFlags, model: PretrainModel, world_size: int) -> Iterator[Problem]:
    """CFG-021: a step is a whole number of micro-batches on every replica."""
    replica = flags.tensor_model_parallel_size * flags.pipeline_model_parallel_size * flags.context_parallel_size
    per_forward = flags.micro_batch_size * max(1, world_size // replica)
    if flags.global_batch_size is not None and flags.global_batch_size % per_forward:
        below = flags.global_batch_size // per_forward * per_forward
        near = f"{below} or {below + per_forward}" if below else f"{per_forward}"
        yield Problem(
            "CFG-021",
            f"--global-batch-size {flags.global_batch_size} is not a multiple of --micro-batch-size "
            f"{flags.micro_batch_size} x {per_forward // flags.micro_batch_size} replicas.",
            f"Use {near}.",
        )


def _precision_agrees(flags: TrainFlags, model: PretrainModel, world_size: int) -> Iterator[Problem]:
    """CFG-022: the precision is said in two places, which must agree."""
    dtype = model.predictor.dtype
    if dtype is not None and (dtype == "bf16") != flags.bf16:
        given = "given" if flags.bf16 else "absent"
        yield Problem(
            "CFG-022",
            f"--bf16 is {given}, and predictor.dtype in {flags.mm_model} is {dtype}.",
            "Make them agree, or remove predictor.dtype.",
        )


def _weights_are_named(flags: TrainFlags, model: PretrainModel, world_size: int) -> Iterator[Problem]:
    """CFG-023: nobody trains from random weights by accident."""
    if flags.load is None and not flags.init_from_scratch:
        yield Problem("CFG-023", "--load is missing.", "Give it, or --init-from-scratch to start from random weights.")
    if flags.load is not None and flags.init_from_scratch:
        yield Problem("CFG-023", "--load and --init-from-scratch are both given.", "Give one of them.")
    if flags.finetune and flags.load is None:
        yield Problem("CFG-023", "--finetune needs the weights that it starts from.", "Give --load.")


def _saving_is_meant(flags: TrainFlags, model: PretrainModel, world_size: int) -> Iterator[Problem]:
    """CFG-024: flags about checkpoints without a place for them."""
    for name in ("save_interval", "keep_latest", "no_save_optim"):
        if getattr(flags, name) and flags.save is None:
            flag = "--" + name.replace("_", "-")
            yield Problem("CFG-024", f"{flag} has no effect without --save.", "Give --save, or remove it.")


def _schedule_fits(flags: TrainFlags, model: PretrainModel, world_size: int) -> Iterator[Problem]:
    """CFG-025: a learning-rate schedule that can be followed."""
    decay = flags.lr_decay_iters or flags.train_iters
    if flags.lr_warmup_iters and flags.lr_warmup_iters >= decay:
        yield Problem(
            "CFG-025",
            f"--lr-warmup-iters {flags.lr_warmup_iters} is not below the {decay} steps of the schedule.",
            "Shorten the warm-up, or lengthen --lr-decay-iters or --train-iters.",
        )
    if flags.min_lr > flags.lr:
        yield Problem("CFG-025", f"--min-lr {flags.min_lr} is above --lr {flags.lr}.", "Lower --min-lr.")
    if flags.lr_warmup_init > flags.lr:
        yield Problem(
            "CFG-025", f"--lr-warmup-init {flags.lr_warmup_init} is above --lr {flags.lr}.", "Lower --lr-warmup-init."
        )


def _overlap_needs_distributed_optimizer(flags: TrainFlags, model: PretrainModel, world_size: int) -> Iterator[Problem]:
    """CFG-026: parameters are gathered only where they are sharded, and only behind the gradients."""
    if flags.overlap_param_gather and not (flags.use_distributed_optimizer and flags.overlap_grad_reduce):
        yield Problem(
            "CFG-026",
            "--overlap-param-gather works only with --use-distributed-optimizer and --overlap-grad-reduce.",
            "Add both, or remove it.",
        )


def _pipeline_layers_need_a_pipeline(flags: TrainFlags, model: PretrainModel, world_size: int) -> Iterator[Problem]:
    """CFG-027: a list of stages is only read with pipeline parallelism; then it must fit the model."""
    layers = model.predictor.pipeline_num_layers
    if layers is not None and sum(_flat(layers)) != model.predictor.num_layers:
        yield Problem(
            "CFG-027",
            f"predictor.pipeline_num_layers in {flags.mm_model} adds up to {sum(_flat(layers))}, "
            f"and num_layers is {model.predictor.num_layers}.",
            "Make them agree.",
        )


def _flat(layers: list[int] | list[list[int]]) -> list[int]:
    return [number for item in layers for number in (item if isinstance(item, list) else [item])]


Rule = Callable[[TrainFlags, PretrainModel, int], Iterator[Problem]]
TRAINING_RULES: tuple[Rule, ...] = (
    _only_data_parallel,
    _batch_divides,
    _precision_agrees,
    _weights_are_named,
    _saving_is_meant,
    _schedule_fits,
    _overlap_needs_distributed_optimizer,
    _pipeline_layers_need_a_pipeline,
)
