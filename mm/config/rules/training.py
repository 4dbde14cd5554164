"""All rules of a training run, and those that belong to no part of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mm.config.bad_samples import parse_on_bad_sample
from mm.config.diffusion import LEAST_MOTION_FRAMES
from mm.config.optimizer import DEFAULTS
from mm.config.output import require_writable_folder
from mm.config.rules.adapters import ADAPTER_RULES
from mm.config.rules.around import AROUND_RULES
from mm.config.rules.experts import EXPERT_RULES
from mm.config.rules.features import FEATURE_RULES
from mm.config.rules.live import LIVE_RULES
from mm.config.rules.packing import PACKING_RULES
from mm.config.rules.parallel import PARALLEL_RULES
from mm.config.rules.recompute import RECOMPUTE_RULES
from mm.config.rules.saving import SAVING_RULES
from mm.config.rules.timesteps import timesteps_are_of_the_model
from mm.config.run.training import TrainingRun
from mm.config.unread import broken, is_given
from mm.errors import ConfigError, Problem, raise_all


def check_training(run: TrainingRun) -> None:
    """Check a training run before any device is touched.

    Raises:
        ConfigError: with what could not be read, what contradicts itself, and every violated rule.
    """
    raise_all(ConfigError, [*run.problems, *broken(TRAINING_RULES, run)])


def require_places(run: TrainingRun) -> None:
    """Refuse folders that a run could not write to; CFG-131."""
    places = {"checkpoint.save": run.checkpoint.save, "logging.tensorboard": run.logging.tensorboard}
    for path, folder in places.items():
        if folder is not None:
            require_writable_folder(folder, run.origins[path].name)


def _weights_are_named(run: TrainingRun) -> Iterator[Problem]:
    """CFG-023: nobody trains from random weights by accident."""
    start, words = run.checkpoint, run.origins
    load, scratch = words["checkpoint.load"].name, words["checkpoint.from_scratch"].with_value(True)
    if run.adapters is not None:  # the base is theirs, and new adapters need no file
        if start.from_scratch:
            found = f"{scratch} is given with LoRA, whose base model is trained already."
            yield Problem("CFG-023", found, "Remove it; new adapters start at no change of the base.")
    elif start.load is None and not start.from_scratch:
        yield Problem("CFG-023", f"{load} is missing.", f"Give it, or {scratch} to start from random weights.")
    if start.load is not None and start.from_scratch:
        yield Problem("CFG-023", f"{load} and {scratch} are both given.", "Give one of them.")
    if start.weights_only and start.load is None:
        fresh = words["checkpoint.weights_only"].with_value(True)
        yield Problem("CFG-023", f"{fresh} needs the weights that it starts from.", f"Give {load}.")


def _bad_samples_are_said(run: TrainingRun) -> Iterator[Problem]:
    """CFG-110: what becomes of samples that cannot be read."""
    try:
        parse_on_bad_sample(run.data.on_bad_sample, run.origins["data.on_bad_sample"].name)
    except ConfigError as error:
        yield from error.problems


def _schedule_fits(run: TrainingRun) -> Iterator[Problem]:
    """CFG-025: a learning-rate schedule that can be followed."""
    optimizer, words = run.optimizer, run.origins
    decay = optimizer.decay_steps or run.training.steps
    lr, least, first = (words[f"optimizer.{name}"] for name in ("lr", "min_lr", "warmup_init"))
    warmup = words["optimizer.warmup_steps"]
    if optimizer.warmup_steps and optimizer.warmup_steps >= decay:
        longer = f"{words['optimizer.decay_steps'].name} or {words['training.steps'].name}"
        yield Problem(
            "CFG-025",
            f"{warmup.with_value(optimizer.warmup_steps)} is not below the {decay} steps of the schedule.",
            f"Shorten the warm-up, or lengthen {longer}.",
        )
    for word, value in ((least, optimizer.min_lr), (first, optimizer.warmup_init)):
        if value > optimizer.lr:
            found = f"{word.with_value(value)} is above {lr.with_value(optimizer.lr)}."
            yield Problem("CFG-025", found, f"Lower {word.name}.")


def _epsilon_is_used(run: TrainingRun) -> Iterator[Problem]:
    """CFG-029: a number that the optimizer does not have."""
    optimizer, words = run.optimizer, run.origins
    if optimizer.eps is not None and DEFAULTS[optimizer.name].eps is None:
        chosen = words["optimizer.name"].with_value(optimizer.name)
        yield Problem("CFG-029", f"{words['optimizer.eps'].name} has no effect with {chosen}.", "Remove one of them.")


def _limits_of_the_norm_are_used(run: TrainingRun) -> Iterator[Problem]:
    """CFG-425: how a limit of the gradient norm changes, where there is none, or no steps in which."""
    optimizer, words = run.optimizer, run.origins
    ratio, start = (words[f"optimizer.{name}"] for name in ("initial_clip_ratio", "abnormal_clip_start"))
    if is_given(optimizer.initial_clip_ratio) and optimizer.abnormal_clip_start is None:
        found = f"{ratio.with_value(optimizer.initial_clip_ratio)} has no effect without {start.name}"
        yield Problem("CFG-425", f"{found}, in whose steps the limit changes.", f"Add {start.name}, or remove it.")
    if is_given(optimizer.abnormal_clip_start) and optimizer.clip_norm == 0:
        off = words["optimizer.clip_norm"].with_value(optimizer.clip_norm)
        found = f"{start.with_value(optimizer.abnormal_clip_start)} has no effect with {off}, which clips nothing."
        yield Problem("CFG-425", found, "Remove one of them.")


def _first_frames_are_given(run: TrainingRun) -> Iterator[Problem]:
    """CFG-290: a share of clean first frames in a task that has none."""
    share, wan, words = run.objective.first_frame_share, run.wan, run.origins
    if is_given(share) and not wan.first_frame_share:
        forced = words["model.shape.force_2_1_time_embedding"].with_value(True)
        why = forced if wan.force_2_1_time_embedding else wan.task_in_words
        said = words["objective.first_frame_share"].with_value(share)
        found = f"{said} has no effect: {why}, and such a model is never given a clean frame."
        yield Problem("CFG-290", found, "Remove it.")


def _neighbouring_frames_are_there(run: TrainingRun) -> Iterator[Problem]:
    """CFG-426: a loss of motion of clips that have too few latent frames, or of tokens of several."""
    ratio, words, features = run.objective.motion_loss_ratio, run.origins, run.data.features
    if not is_given(ratio):
        return
    said = words["objective.motion_loss_ratio"].with_value(ratio)
    if is_given(run.wan.patch_size) and run.wan.patch_size[0] > 1:
        patch = words["model.shape.patch_size"].with_value(list(run.wan.patch_size))
        found = f"{said} compares tokens of neighbouring latent frames, and with {patch} a token has several."
        yield Problem("CFG-426", found, f"Remove {words['objective.motion_loss_ratio'].name}.")
    clip = features.clip if is_given(features) and is_given(features.clip) else None
    size = None if clip is None else clip.latent_size(run.wan.task.latent_pixels)
    if size is not None and size[0] < LEAST_MOTION_FRAMES:
        found = f"{said} has no effect: clips of {words.whole('data.features')} have {size[0]} latent frames"
        yield Problem("CFG-426", f"{found}, and it takes {LEAST_MOTION_FRAMES}.", "Remove it, or take longer clips.")


def _band_has_levels(run: TrainingRun) -> Iterator[Problem]:
    """CFG-291: a band of noise levels from which nothing can be drawn."""
    objective, words = run.objective, run.origins
    low, high = objective.band
    on_grid = objective.timestep_sampling == "grid"
    if low >= high or (on_grid and not any(low <= level < high for level in objective.levels())):
        names = words["objective.band_from"].with_value(low), words["objective.band_below"].with_value(high)
        yield Problem("CFG-291", f"No noise level is in the band of {' and '.join(names)}.", "Widen the band.")


def _overlap_needs_distributed_optimizer(run: TrainingRun) -> Iterator[Problem]:
    """CFG-026: parameters are gathered only where they are sharded, and only behind the gradients."""
    cut = run.parallel
    sharded = cut.layerzero is not None or (cut.distributed_optimizer and cut.overlap_grad_reduce)
    if cut.overlap_param_gather and not sharded:  # layer-zero always overlaps both
        gather, optimizer, reduce = (
            run.origins[f"parallel.{name}"].with_value(True)
            for name in ("overlap_param_gather", "distributed_optimizer", "overlap_grad_reduce")
        )
        yield Problem("CFG-026", f"{gather} works only with {optimizer} and {reduce}.", "Add both, or remove it.")


def _compiled_blocks_wait_for_nothing(run: TrainingRun) -> Iterator[Problem]:
    """CFG-069: no message is waited for inside a compiled block."""
    if run.memory.compile_blocks and run.parallel.overlap_param_gather and run.parallel.layerzero is None:
        gather, compiled, reduce = (
            run.origins[path].with_value(True)
            for path in ("parallel.overlap_param_gather", "memory.compile_blocks", "parallel.overlap_grad_reduce")
        )
        yield Problem(
            "CFG-069",
            f"With {gather} every linear waits for its parameters, which {compiled} cannot contain.",
            f"Remove one of them. {reduce} works with it, and so does {run.origins['parallel.layerzero'].name}, which "
            "gathers blocks.",
        )


Rule = Callable[[TrainingRun], Iterator[Problem]]
TRAINING_RULES: tuple[Rule, ...] = (
    *PARALLEL_RULES,
    *FEATURE_RULES,
    *PACKING_RULES,
    *LIVE_RULES,
    _weights_are_named,
    *SAVING_RULES,
    _bad_samples_are_said,
    *AROUND_RULES,
    _schedule_fits,
    _epsilon_is_used,
    _limits_of_the_norm_are_used,
    _first_frames_are_given,
    timesteps_are_of_the_model,
    _neighbouring_frames_are_there,
    _band_has_levels,
    _overlap_needs_distributed_optimizer,
    _compiled_blocks_wait_for_nothing,
    *RECOMPUTE_RULES,
    *ADAPTER_RULES,
    *EXPERT_RULES,
)
