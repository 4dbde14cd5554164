"""The state of a training run on disk: what a checkpoint holds, saving it, going on from it, starting from weights.

A checkpoint holds the fp32 master weights (`model.<name>`), what the optimizer keeps (`optimizer.<its name>.<name>`),
and, where it is kept, the average (`ema.<name>`) of what is trained; of a model without adapters also what is frozen of
it (`model.<name>`), in its own dtype; and, as JSON, how far the run has come. Random numbers are keyed by seed and
sample (mm.rng), so the seed and the count of consumed samples are their whole state.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from mm.checkpoint.comm import Comm, on_rank_zero
from mm.checkpoint.formats import mindspeed
from mm.checkpoint.formats.found import Found
from mm.checkpoint.formats.training import (
    ADAPTERS_KEY,
    AVERAGE_PREFIX,
    CONFIG_KEY,
    DECAY_KEY,
    STATE_KEY,
    STEPS_KEY,
)
from mm.checkpoint.manifest import Manifest, damaged
from mm.checkpoint.mismatch import Expected
from mm.checkpoint.record import read_record
from mm.checkpoint.store import Derived, Piece, load, read_manifest
from mm.checkpoint.weights import open_weights
from mm.config.base import parse
from mm.config.model import WanConfig
from mm.config.optimizer import OptimizerName
from mm.config.run.origins import Origins
from mm.config.step import StepSettings
from mm.errors import ConfigError, Problem, ResumeError, raise_all
from mm.lora.record import AdapterRecord, export, record_of
from mm.optim.algorithms.base import Algorithm
from mm.optim.algorithms.make import ALGORITHMS
from mm.optim.optimizer import Optimizer
from mm.parallel.frozen import FrozenShard
from mm.train.pieces import frozen_pieces, pieces_of
from mm.train.resuming import Resuming

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Progress of a run.

    Attributes:
        step: steps taken. consumed_samples: where the plan and the rates stand, a global batch for each step.
        skipped_steps: of them, whose update was left out (`--on-nonfinite`).
        replaced_samples: that stood in for damaged ones (`--on-bad-sample`).
        trained_samples: samples seen, which are others than consumed where sources have micro-batches of their own.
    """

    step: int = 0
    consumed_samples: int = 0
    skipped_steps: int = 0
    replaced_samples: int = 0
    trained_samples: int = 0

    def recorded(self) -> dict[str, int]:
        """State that checkpoints keep; those of a run whose steps have a global batch each do not tell it twice."""
        values = asdict(self)
        if self.trained_samples == self.consumed_samples:
            del values["trained_samples"]
        return values

    @classmethod
    def of_record(cls, values: Mapping[str, Any]) -> Progress:
        """The inverse of `recorded`. In those of earlier versions nothing was skipped or replaced."""
        consumed = values["consumed_samples"]
        trained = values.get("trained_samples")
        return cls(
            values["step"],
            consumed,
            values.get("skipped_steps", 0),
            values.get("replaced_samples", 0),
            consumed if trained is None else trained,
        )


@dataclass(frozen=True)
class State:
    """Parts of a checkpoint on this rank, as `mm.checkpoint.store.save` takes them."""

    step: int
    pieces: list[Piece]
    scalars: dict[str, Any]
    derived: Derived | None


def state_of(
    optimizer: Optimizer,
    progress: Progress,
    config: WanConfig,
    seed: int,
    comm: Comm,
    *,
    steps: StepSettings,
    with_optimizer: bool,
    adapters: AdapterRecord | None = None,
) -> State:
    """The state of a run, whose steps are `steps`; every rank calls it. Pieces are views of what is trained.

    That of adapters has them in two files of other tools beside its shards.
    """
    scalars: dict[str, Any] = {
        **progress.recorded(),
        "seed": seed,
        **_optimizer_scalars(optimizer, comm, with_optimizer=with_optimizer),
        CONFIG_KEY: config.model_dump(mode="json"),
        STEPS_KEY: steps.model_dump(mode="json"),
    }
    if optimizer.average is not None:
        scalars[DECAY_KEY] = optimizer.average.decay
    derived = None
    if adapters is not None:
        scalars[ADAPTERS_KEY] = adapters.as_json()
        derived = Derived(partial(export, record=adapters), 2 * 4 * sum(map(math.prod, optimizer.shapes.values())))
    owned = [shard for shard in optimizer.shards if shard.owned]
    pieces = pieces_of(owned, with_optimizer, optimizer.average)
    if adapters is None:
        pieces += frozen_pieces([shard for shard in optimizer.frozen if shard.owned])
    return State(progress.step, pieces, scalars, derived)


def _optimizer_scalars(optimizer: Optimizer, comm: Comm, *, with_optimizer: bool) -> dict[str, Any]:
    """Scalars that say that the optimizer's state is there: its count of updates, or that it has none."""
    key = optimizer.algorithm.step_key
    if key is None:
        return {STATE_KEY: with_optimizer}
    # ranks of a stage without adapters have no count of their own
    return {key: max(comm.all_gather_object(optimizer.steps_made())) if with_optimizer else None}


def _require_state(path: Path, scalars: Mapping[str, Any], algorithm: Algorithm, words: Origins) -> None:
    """CKPT-072 and CKPT-073: the state of this run's optimizer must be there."""
    theirs = ALGORITHMS[_recorded_optimizer(scalars)]
    chosen, anew = words["optimizer.name"], words["checkpoint.load_optimizer"].with_value(False)
    if theirs.name != algorithm.name:
        raise ResumeError(
            "CKPT-073",
            f"{path} holds the state of {theirs.title}, and this run's {chosen.name} is {algorithm.name}.",
            f"Give {chosen.with_value(theirs.name)}, or {anew} to start {algorithm.title} anew from these weights.",
        )
    saved = scalars.get(STATE_KEY, False) if algorithm.step_key is None else scalars.get(algorithm.step_key) is not None
    if not saved:
        raise ResumeError(
            "CKPT-072",
            f"{path} was saved without the optimizer ({words['checkpoint.save_optimizer'].with_value(False)} or "
            f"{words['checkpoint.format'].with_value('torch')}).",
            f"Give {anew} to start {algorithm.title} anew from these weights.",
        )


def _recorded_optimizer(scalars: Mapping[str, Any]) -> OptimizerName:
    """Optimizer of a checkpoint, whose settings are those of `mm.config.step`; earlier versions had one."""
    recorded = scalars.get(STEPS_KEY)
    return "adamw" if recorded is None else StepSettings.model_validate(recorded).optimizer.optimizer


def load_state(
    found: Found,
    optimizer: Optimizer,
    expected: Expected,
    seed: int,
    comm: Comm,
    *,
    resuming: Resuming,
    with_optimizer: bool,
    with_average: bool,
    any_seed: bool,
    adapters: AdapterRecord | None = None,
) -> Progress:
    """Go on from a checkpoint, which any layout may have written.

    Args:
        found: the checkpoint.
        optimizer: of the model that goes on; its masters, state, step count and schedule are set.
        expected: the model, which must be the checkpoint's.
        seed: this run's; unless `any_seed`, it must be the checkpoint's.
        comm: the ranks.
        resuming: what the steps of this run mean, and what of it may differ from the checkpoint's.
        with_optimizer: take the optimizer's state too.
        with_average: take the average too; else it begins at the loaded weights, if this run has one.
        any_seed: go on with this run's seed although the checkpoint's differs.
        adapters: of a run that trains these alone.

    Raises:
        ResumeError: CKPT-071 for another seed, CKPT-072 and CKPT-073 where the optimizer's state is wanted and was not
            saved or is another one's, CKPT-085 and CKPT-086 where one of run and checkpoint has an average and the
            other has not, CKPT-080 and CKPT-081 for adapters where all parameters are trained and the reverse, CKPT-082
            and CKPT-083 for adapters of other linears or another base.
        CheckpointError: what `mm.checkpoint.store.load` raises.
        ConfigError: CFG-028 for another model, CFG-160 for every other change of what steps mean.
    """
    described = require_same_run(
        found,
        expected,
        seed,
        resuming=resuming,
        algorithm=optimizer.algorithm if with_optimizer else None,
        with_average=with_average,
        any_seed=any_seed,
        adapters=adapters,
    )
    path, scalars = found.path, described.scalars
    if described.manifest is None:
        load_weights(found, optimizer, expected, comm)
    else:
        frozen = optimizer.frozen if adapters is None else []
        _load_tensors(
            path, described.manifest, optimizer, frozen, comm, with_optimizer=with_optimizer, with_average=with_average
        )
        if with_optimizer and optimizer.algorithm.step_key is not None:
            optimizer.set_steps_made(scalars[optimizer.algorithm.step_key])
        optimizer.masters_to_model()
    optimizer.set_progress(scalars["consumed_samples"])
    return Progress.of_record(scalars)


def require_same_run(
    found: Found,
    expected: Expected,
    seed: int,
    *,
    resuming: Resuming,
    algorithm: Algorithm | None,
    with_average: bool,
    any_seed: bool,
    adapters: AdapterRecord | None,
) -> Described:
    """Compare what a checkpoint says of itself with the run that is to go on from it; no tensor is read.

    Args:
        found, expected, seed, resuming, with_average, any_seed, adapters: as in `load_state`.
        algorithm: of the optimizer whose state is wanted; None where it is not.

    Raises:
        ConfigError, CheckpointError, ResumeError: as `load_state`.
    """
    path, described, words = found.path, _described(found), resuming.sections.origins
    _require_same_kind(path, described.adapters, adapters, words)
    expected.require_config(path, described.config, text_len=True)
    _require_same_steps(path, described.scalars, seed, resuming, any_seed=any_seed)
    if algorithm is not None:
        _require_state(path, described.scalars, algorithm, words)
    if with_average:
        _require_same_average(path, described.scalars.get(DECAY_KEY), resuming.steps.ema_decay, words)
    return described


@dataclass(frozen=True)
class Described:
    """Facts that a checkpoint tells of itself.

    Attributes:
        scalars: how far it is, and what its steps mean. config: the model. adapters: those that are in it alone.
        manifest: of a sharded checkpoint; None in the MM format, which has no optimizer.
    """

    scalars: Mapping[str, Any]
    config: WanConfig
    adapters: AdapterRecord | None
    manifest: Manifest | None


def _described(found: Found) -> Described:
    path = found.path
    if found.format == mindspeed.FORMAT:
        record = read_record(path)
        scalars = record.model_dump(include={*asdict(Progress()), "seed", STEPS_KEY})
        config = record.wan_config or mindspeed.config_of(path)
        if config is None:
            raise damaged(path, "it does not say the model's configuration")
        return Described(scalars, config, None, None)
    manifest = read_manifest(path)
    config = parse(WanConfig, manifest.scalars[CONFIG_KEY], str(path))
    return Described(manifest.scalars, config, record_of(manifest, path), manifest)


def _require_same_steps(
    path: Path, scalars: Mapping[str, Any], seed: int, resuming: Resuming, *, any_seed: bool
) -> None:
    recorded = scalars.get(STEPS_KEY)
    before = None if recorded is None else parse(StepSettings, recorded, f"{path}: {STEPS_KEY}")
    problems = resuming.problems(path, before, scalars["step"], scalars["consumed_samples"])
    if scalars["seed"] == seed or any_seed:
        raise_all(ConfigError, problems)
        return
    word, other = (resuming.sections.origins[of] for of in ("training.seed", "checkpoint.same_seed"))
    other_seed = Problem(
        "CKPT-071",
        f"{path} was trained with {word.with_value(scalars['seed'])}, and {word.name} is {seed}.",
        f"Give {word.with_value(scalars['seed'])}, or {other.with_value(False)} to go on with other random numbers on "
        "purpose.",
    )
    raise_all(ResumeError, [other_seed, *problems])


def _load_tensors(
    path: Path,
    manifest: Manifest,
    optimizer: Optimizer,
    frozen: Sequence[FrozenShard],
    comm: Comm,
    *,
    with_optimizer: bool,
    with_average: bool,
) -> None:
    average = optimizer.average if with_average else None
    wanted = ("model.",) + ("optimizer.",) * with_optimizer + (AVERAGE_PREFIX,) * with_average
    # a kind that nobody asked for is left alone; otherwise nothing may be left over, of whatever kind
    complete = ("",) if with_optimizer and with_average else wanted
    pieces = [*pieces_of(optimizer.shards, with_optimizer, average), *frozen_pieces(frozen)]
    load(path, pieces, comm, complete=complete, manifest=manifest)
    if optimizer.average is not None and average is None:
        optimizer.average.restart()


def load_weights(found: Found, optimizer: Optimizer, expected: Expected, comm: Comm) -> None:
    """Start from weights of any known format: fill the fp32 masters, then round them into the model.

    Raises:
        CheckpointError: CKPT-011 for missing or unexpected tensors or other shapes, and what `open_weights` raises.
        ConfigError: CFG-028 when the weights say that they belong to another model.
        DataError: what `open_weights` raises.
    """
    source = open_weights(found)
    on_rank_zero(comm, lambda: expected.require(source))
    for shard in optimizer.frozen:
        shard.fill(source.read(shard.name))
    fill_masters(optimizer, source.read)
    logger.info("loaded %s (%s): no tensor missing, none left over", source.path, source.label)


def fill_masters(optimizer: Optimizer, read: Callable[[str], Tensor]) -> None:
    """Set this rank's part of every master from whole parameters by native name, then round them into the model."""
    for shard in optimizer.shards:
        if shard.start < shard.stop:
            part = shard.placement.of(read(shard.name))
            shard.master.copy_(part.reshape(-1)[shard.start : shard.stop])
    optimizer.masters_to_model()
    if optimizer.average is not None:
        optimizer.average.restart()


def _require_same_kind(path: Path, theirs: AdapterRecord | None, ours: AdapterRecord | None, words: Origins) -> None:
    base, save = words["adapters.base"], words["checkpoint.save"].name
    if theirs is not None and ours is not None:
        ours.require_same(theirs, path, words)
    elif theirs is not None:
        raise ResumeError(
            "CKPT-080",
            f"{path} holds adapters of a LoRA run, and this run trains all parameters.",
            f"Train adapters, with {base.with_value(theirs.base_path)}; or give other folders to "
            f"{words['checkpoint.load'].name} and {save}.",
        )
    elif ours is not None:
        raise ResumeError(
            "CKPT-081",
            f"{path} holds a whole model, and this run trains adapters.",
            f"Give it to {base.name} if it is the base, and another folder to {save}.",
        )


def _require_same_average(path: Path, theirs: float | None, ours: float | None, words: Origins) -> None:
    decay, without = words["optimizer.ema_decay"], words["checkpoint.load_average"].with_value(False)
    if theirs is None and ours is not None:
        raise ResumeError(
            "CKPT-085",
            f"{path} has no average of its weights, and {decay.name} is {ours:g}.",
            f"Give {without} to begin an average at its weights, or remove {decay.name}.",
        )
    if theirs is not None and ours is None:
        raise ResumeError(
            "CKPT-086",
            f"{path} has an average of its weights ({decay.with_value(theirs)}), and this run keeps none.",
            f"Give {decay.with_value(theirs)}, or {without} to go on without the average.",
        )
