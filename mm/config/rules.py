"""Rules that look at more than one flag or file. Each is one function with its id; all run, all problems are shown.

Those about the parallel axes are in `mm.config.rules_parallel`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mm.config.bad_samples import parse_on_bad_sample
from mm.config.layerzero import ZeroConfig
from mm.config.optimizer import DEFAULTS
from mm.config.request import Request
from mm.config.rules_checks import evaluation_is_complete, ranks_are_comparable, replicas_are_comparable
from mm.config.rules_lora import LORA_RULES
from mm.config.rules_parallel import PARALLEL_RULES
from mm.config.rules_recompute import RECOMPUTE_RULES
from mm.config.rules_saving import SAVING_RULES
from mm.config.train import PretrainModel, TrainFlags
from mm.errors import ConfigError, Problem, raise_all


def check_training(flags: TrainFlags, model: PretrainModel, zero: ZeroConfig | None, world_size: int) -> None:
    """Check a training run before any device is touched.

    Args:
        flags, model: the command line and pretrain_model.json.
        zero: the file of `--layerzero-config` as `mm.config.layerzero.load_zero` reads it.
        world_size: the processes that were started.

    Raises:
        ConfigError: with every violated rule.
    """
    request = Request(flags, model, zero, world_size)
    raise_all(ConfigError, [problem for rule in TRAINING_RULES for problem in rule(request)])


def _task_agrees(request: Request) -> Iterator[Problem]:
    """CFG-070: the task is said in two places, which must agree."""
    task, predictor = request.model.task, request.model.predictor
    if task is not None and task != predictor.task.name:
        yield Problem(
            "CFG-070",
            f'"task" in {request.flags.mm_model} is {task}, and {predictor.task_in_words}.',
            "Make them agree, or remove task.",
        )


def _precision_agrees(request: Request) -> Iterator[Problem]:
    """CFG-022: the precision is said in two places, which must agree."""
    flags, dtype = request.flags, request.model.predictor.dtype
    if dtype is not None and (dtype == "bf16") != flags.bf16:
        given = "given" if flags.bf16 else "absent"
        yield Problem(
            "CFG-022",
            f"--bf16 is {given}, and predictor.dtype in {flags.mm_model} is {dtype}.",
            "Make them agree, or remove predictor.dtype.",
        )


def _weights_are_named(request: Request) -> Iterator[Problem]:
    """CFG-023: nobody trains from random weights by accident."""
    flags = request.flags
    if flags.lora:  # the base is --load-base-model's (CFG-104), and new adapters need no file
        if flags.init_from_scratch:
            found = "--init-from-scratch is given with LoRA, whose base model is trained already."
            yield Problem("CFG-023", found, "Remove it; new adapters start at no change of the base.")
    elif flags.load is None and not flags.init_from_scratch:
        yield Problem("CFG-023", "--load is missing.", "Give it, or --init-from-scratch to start from random weights.")
    if flags.load is not None and flags.init_from_scratch:
        yield Problem("CFG-023", "--load and --init-from-scratch are both given.", "Give one of them.")
    if flags.finetune and flags.load is None:
        yield Problem("CFG-023", "--finetune needs the weights that it starts from.", "Give --load.")


def _bad_samples_are_said(request: Request) -> Iterator[Problem]:
    """CFG-110: what becomes of samples that cannot be read."""
    try:
        parse_on_bad_sample(request.flags.on_bad_sample)
    except ConfigError as error:
        yield from error.problems


def _schedule_fits(request: Request) -> Iterator[Problem]:
    """CFG-025: a learning-rate schedule that can be followed."""
    flags = request.flags
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


def _epsilon_is_used(request: Request) -> Iterator[Problem]:
    """CFG-029: a number that the optimizer does not have."""
    flags = request.flags
    if flags.adam_eps is not None and DEFAULTS[flags.optimizer].eps is None:
        yield Problem("CFG-029", f"--adam-eps has no effect with --optimizer {flags.optimizer}.", "Remove one of them.")


def _overlap_needs_distributed_optimizer(request: Request) -> Iterator[Problem]:
    """CFG-026: parameters are gathered only where they are sharded, and only behind the gradients."""
    flags = request.flags
    sharded = flags.layerzero or (flags.use_distributed_optimizer and flags.overlap_grad_reduce)
    if flags.overlap_param_gather and not sharded:  # layer-zero always overlaps both
        yield Problem(
            "CFG-026",
            "--overlap-param-gather works only with --use-distributed-optimizer and --overlap-grad-reduce.",
            "Add both, or remove it.",
        )


def _compiled_blocks_wait_for_nothing(request: Request) -> Iterator[Problem]:
    """CFG-069: no message is waited for inside a compiled block."""
    flags = request.flags
    if flags.compile_blocks and flags.overlap_param_gather and not flags.layerzero:
        yield Problem(
            "CFG-069",
            "With --overlap-param-gather every linear waits for its parameters, which --compile-blocks cannot contain.",
            "Remove one of them. --overlap-grad-reduce works with it, and so does --layerzero, which gathers blocks.",
        )


Rule = Callable[[Request], Iterator[Problem]]
TRAINING_RULES: tuple[Rule, ...] = (
    *PARALLEL_RULES,
    _task_agrees,
    _precision_agrees,
    _weights_are_named,
    *SAVING_RULES,
    _bad_samples_are_said,
    evaluation_is_complete,
    replicas_are_comparable,
    ranks_are_comparable,
    _schedule_fits,
    _epsilon_is_used,
    _overlap_needs_distributed_optimizer,
    _compiled_blocks_wait_for_nothing,
    *RECOMPUTE_RULES,
    *LORA_RULES,
)
