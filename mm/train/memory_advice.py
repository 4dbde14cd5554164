"""Advice to a run that is out of memory: chosen from what it does not use and what is largest.

Every candidate is a whole run with some values changed, and the rules of `mm.config.rules` decide whether it is
legal. What it saves is the measured split times closed ratios of bytes before and after:

| kind | bytes an element of the model, on a rank |
| --- | --- |
| parameters | 4, in bf16 2, over PP, of the blocks' linears over TP x PP; layer-zero: 4 over that x zero3_size |
| gradients | 4 over the same |
| optimizer | AdamW 8, Lion 4, in bf16 4 more, over the same, over DP x CP when distributed; layer-zero: as parameters |
| its average | 4 over the same as the optimizer, on those who own it |

With LoRA the base has 2 or 4 bytes, 1 in 8 bits, over the same (layer-zero: x zero3_size); gradients and optimizer are
those of the adapters, which layer-zero replicates. Of parts that are trained they are those of the parts' share.

Sources: Rajbhandari et al. 2020 (arXiv 1910.02054) section 3; for activations Korthikanti et al. 2022 (arXiv
2205.05198) section 4. Layer-zero's gathered blocks, and stages with embeddings and head, are left out: estimates.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from mm.config.layout import balanced_stages
from mm.config.model import WanConfig
from mm.config.recompute import Recompute, recompute_of
from mm.config.rules.training import TRAINING_RULES
from mm.config.run.training import TrainingRun
from mm.config.trainable import names_by_pattern, patterns_of
from mm.lora.targets import linears_of
from mm.optim.algorithms.make import ALGORITHMS
from mm.train.memory_breakdown import MemoryBreakdown
from mm.wan.model import whole_shapes

_LARGEST_FACTOR = 8
"""By how much a degree is raised at most; the smallest legal factor is proposed."""
_ADAPTERS = 0.01
"""Elements of adapters for each of the model, about: only how much of an unfinished model is what depends on it."""


@dataclass(frozen=True)
class MemoryAdvice:
    """One change that lowers what a rank needs.

    Attributes:
        after: the run with the change. before: the run.
        text: what the user writes, and into which file.
        saved: bytes on a rank, estimated.
    """

    after: TrainingRun
    before: TrainingRun
    text: str
    saved: float

    @property
    def score(self) -> float:
        """Bytes saved for each device that is used."""
        return self.saved * self.before.world_size / self.after.world_size

    def __str__(self) -> str:
        text, batches = self.text, (_samples_of_step(self.after), _samples_of_step(self.before))
        if self.after.world_size != self.before.world_size:
            text += f" on {self.after.world_size} processes instead of {self.before.world_size}"
        if batches[0] != batches[1]:
            text += f" (a global batch of {batches[0]} instead of {batches[1]})"
        return text


@dataclass(frozen=True)
class _Change:
    """Change that a candidate makes: values by path, and the processes."""

    values: Mapping[str, Any]
    world_size: int = 0


def advise(run: TrainingRun, breakdown: MemoryBreakdown, count: int = 3) -> list[MemoryAdvice]:
    """The changes that lower this rank's memory most for each device, best first.

    Fewer than `count` come back only where the rules leave fewer: with one head, one block and everything else in use.

    Args:
        run: the run, which the rules have accepted.
        breakdown: what the rank held. count: how many changes to name.
    """
    found = [advice for family in _families(run) if (advice := _first_that_helps(run, breakdown, family))]
    return sorted(found, key=lambda advice: advice.score, reverse=True)[:count]


def freed_bytes(before: TrainingRun, after: TrainingRun, breakdown: MemoryBreakdown) -> float:
    """Bytes that a rank needs less, estimated; of what failed to be allocated and of moments to come too."""
    old, new = ((*_model_bytes(r), _activation_bytes(r)) for r in (before, after))
    return sum(size * (1 - less / more) for size, less, more in zip(_needed(breakdown, old), new, old, strict=True))


def _needed(breakdown: MemoryBreakdown, ratios: tuple[float, ...]) -> tuple[float, ...]:
    """Bytes of parameters, gradients, optimizer and activations, with the allocation that failed."""
    if breakdown.phase == "building the model":  # nobody knows what is what yet: as much of each as a whole model has
        model = breakdown.held - breakdown.program + breakdown.asked
        return (*(model * ratio / sum(ratios[:3]) for ratio in ratios[:3]), 0.0)
    in_step = breakdown.phase == "forward and backward"
    optimizer = breakdown.optimizer + max(breakdown.moments_to_come, 0 if in_step else breakdown.asked)
    return (
        breakdown.parameters,
        breakdown.gradients,
        optimizer,
        breakdown.activations + (breakdown.asked if in_step else 0),
    )


def _first_that_helps(run: TrainingRun, breakdown: MemoryBreakdown, family: Iterator[_Change]) -> MemoryAdvice | None:
    for change in family:
        candidate = _changed(run, change)
        if any(problem for rule in TRAINING_RULES for problem in rule(candidate)):
            continue
        old, new = ((*_model_bytes(r), _activation_bytes(r)) for r in (run, candidate))
        saved = freed_bytes(run, candidate, breakdown)
        if saved >= 0 and any(less < more for less, more in zip(new, old, strict=True)):
            return MemoryAdvice(candidate, run, _text(run, candidate, change), saved)
    return None


def _families(run: TrainingRun) -> Iterator[Iterator[_Change]]:
    """Changes of one kind together, the mildest first; one of each kind is proposed."""
    sequence = run.tp > 1 and not run.parallel.sequence_parallel
    yield _recompute(run)
    yield iter([_Change({"memory.offload": True})])  # the rules refuse it where no block keeps its attention
    yield iter([_Change({"experts.offload": True})] if run.experts is not None and not run.experts.offload else [])
    yield iter([_Change({"data.micro_batch_size": 1})] if run.data.micro_batch_size > 1 else [])
    yield _shorter_sequences(run)
    yield iter([] if run.model.precision == "bf16" else [_bf16(run)])
    yield iter([_Change({"adapters.base_dtype": "int8"})] if _base_has_more_bits(run) else [])
    yield _distributed_optimizer(run)
    yield _layerzero(run)
    yield iter([_Change({"parallel.sequence_parallel": True})] if sequence else [])
    yield _tensor_parallel(run)
    yield _context_parallel(run)
    yield _pipeline_parallel(run)


def _recompute(run: TrainingRun) -> Iterator[_Change]:
    """Keeping attention costs least time; of groups a single block keeps least, as it has one whole block at work."""
    memory = run.memory
    plan = recompute_of(memory)
    if plan is None:
        yield _Change({"memory.recompute": "selective"})
        return
    if plan.group_size > 1:
        yield _Change({"memory.blocks": 1})
    if memory.method == "block" and memory.keep_attention:
        left = max(run.blocks_of_stages) - (memory.blocks or 0)
        yield _Change({"memory.keep_attention_blocks": left})
    single = {} if memory.blocks is None else {"memory.blocks": 1}
    yield _Change({"memory.recompute": "full", "memory.method": "uniform", **single})


def _shorter_sequences(run: TrainingRun) -> Iterator[_Change]:
    """Packs of half as many tokens; where a sample is longer than that, the start says so (DATA-077)."""
    budget = run.data.pack_tokens
    if budget is not None and budget > 1:
        yield _Change({"data.pack_tokens": budget // 2})


def _bf16(run: TrainingRun) -> _Change:
    zero = run.parallel.layerzero
    again = {} if zero is None or zero.param_dtype is None else {"parallel.layerzero.param_dtype": "bf16"}
    return _Change({"model.precision": "bf16", **again})


def _base_has_more_bits(run: TrainingRun) -> bool:
    return run.adapters is not None and run.adapters.base_dtype is None


def _distributed_optimizer(run: TrainingRun) -> Iterator[_Change]:
    if not run.parallel.distributed_optimizer:
        yield _Change({"parallel.distributed_optimizer": True})
        yield _Change({"parallel.distributed_optimizer": True}, 2 * run.world_size)


def _layerzero(run: TrainingRun) -> Iterator[_Change]:
    """Parameters over all ranks that hold the same ones, or over more of them."""
    zero = run.parallel.layerzero
    for world_size in (run.world_size, 2 * run.world_size):
        ranks = world_size // (run.tp * run.pp)
        if ranks > (zero.zero3_size if zero else 1):
            yield _Change({"parallel.layerzero.zero3_size": ranks}, world_size)


def _tensor_parallel(run: TrainingRun) -> Iterator[_Change]:
    for factor, world_size in _more_of_an_axis(run):
        yield _Change({"parallel.tensor_size": factor * run.tp, "parallel.sequence_parallel": True}, world_size)


def _context_parallel(run: TrainingRun) -> Iterator[_Change]:
    """The same algorithm, or where heads do not suffice a ring around the groups that there are."""
    for factor, world_size in _more_of_an_axis(run):
        size = {"parallel.context_size": factor * run.cp}
        ring: dict[str, Any] = {"parallel.context_algorithm": "ring"}
        if run.cp > 1:
            ring = {"parallel.context_algorithm": "hybrid", "parallel.ulysses_size": run.cp}
        yield _Change(size, world_size)
        if run.parallel.context_algorithm == "ulysses":
            yield _Change({**size, **ring}, world_size)


def _pipeline_parallel(run: TrainingRun) -> Iterator[_Change]:
    num_layers = run.wan.num_layers
    for factor, world_size in _more_of_an_axis(run):
        pp_size = factor * run.pp
        change: dict[str, Any] = {"parallel.pipeline_size": pp_size}
        if pp_size * run.vp > num_layers:
            return
        if run.parallel.stages is not None or num_layers % (pp_size * run.vp):
            change["parallel.stages"] = [list(row) for row in balanced_stages(num_layers, pp_size, run.vp)]
        yield _Change(change, world_size)


def _more_of_an_axis(run: TrainingRun) -> Iterator[tuple[int, int]]:
    """(factor, processes): replicas give up their processes where they can, else more are needed."""
    for factor in range(2, _LARGEST_FACTOR + 1):
        if run.world_size // run.replica % factor == 0:
            yield factor, run.world_size
        yield factor, factor * run.world_size


def _changed(run: TrainingRun, change: _Change) -> TrainingRun:
    """The run with a change, and the same global batch, or the next that more replicas can share."""
    candidate = run.changed(change.values, change.world_size)
    unit = candidate.data.micro_batch_size * _replicas(candidate)
    batch = math.ceil(_samples_of_step(run) / unit) * unit
    if _samples_of_step(candidate) == batch:
        return candidate
    return candidate.changed({"data.global_batch_size": batch})


def _text(before: TrainingRun, after: TrainingRun, change: _Change) -> str:
    """Words that a user types and writes: "`--bf16` and `"dtype": "bf16"` in pretrain_model.json"."""
    old, new = before.values(), after.values()
    if before.parallel.layerzero is None and after.parallel.layerzero is not None:  # a file of defaults
        old |= before.changed({"parallel.layerzero": {}}).values() | {"parallel.layerzero": None}
    first = change.values.keys() - before.values().keys()  # said in any case: no file was there
    told = {path: value for path, value in new.items() if path in first or old[path] != value}
    return before.origins.assigned(told)


def _model_bytes(run: TrainingRun) -> tuple[float, float, float]:
    """Bytes of parameters, gradients and optimizer state an element of the whole model, on one rank; of all models."""
    models = 2 if run.experts is not None and not run.experts.offload else 1
    parameters, gradients, state = _bytes_of_one(run)
    return models * parameters, models * gradients, models * state


def _bytes_of_one(run: TrainingRun) -> tuple[float, float, float]:
    share = _share_of_linears(run.wan)
    cut, sharing = run.pp / (share / run.tp + 1 - share), _replicas(run) * run.cp
    distributed = sharing if run.parallel.distributed_optimizer else 1
    zero, bf16 = run.parallel.layerzero, run.model.precision == "bf16"
    state = ALGORITHMS[run.optimizer.name].bytes_per_element
    state += 4 if run.optimizer.ema_decay is not None else 0
    trained = _trained_share(run)
    if run.adapters is not None:
        base = (1 if run.adapters.base_dtype else 2 if bf16 else 4) / cut
        if zero is not None:  # a block that runs and the next are gathered beside the shards
            base *= min(1.0, 1 / zero.zero3_size + 2 / max(run.blocks_of_stages))
        replicas = 1 if zero is not None else distributed
        return base, 4 * (_ADAPTERS + trained) / cut, state * (_ADAPTERS + trained) / (cut * replicas)
    if zero is not None:
        shard, held = cut * zero.zero3_size, 4 if trained == 1 or not bf16 else 4 * trained + 2 * (1 - trained)
        return held / shard, 4 * trained / shard, state * trained / max(shard, cut * distributed)
    if bf16:
        return 2 / cut, 4 * trained / cut, (4 + state) * trained / (cut * distributed)
    return 4 / cut, 4 * trained / cut, state * trained / (cut * distributed)


def _trained_share(run: TrainingRun) -> float:
    """Share of the model's own parameters that are trained."""
    words = run.training.trainable
    if words is None:
        return 0.0 if run.adapters is not None else 1.0
    return _share_of_words(run.wan, words)


@cache
def _share_of_words(wan: WanConfig, words: tuple[str, ...]) -> float:
    shapes = whole_shapes(wan)
    named = [name for names in names_by_pattern(patterns_of(words), shapes) for name in names]
    return sum(math.prod(shapes[name]) for name in named) / sum(map(math.prod, shapes.values()))


@cache
def _share_of_linears(wan: WanConfig) -> float:
    """Share of the parameters that tensor parallelism cuts: the linears of the blocks."""
    shapes = whole_shapes(wan)
    return sum(map(math.prod, linears_of(shapes).values())) / sum(map(math.prod, shapes.values()))


def _activation_bytes(run: TrainingRun) -> float:
    """Bytes of one rank, for each token of a sample, or with packs for each of a sequence, and unit of width.

    The unit inside is a block's input. A block keeps 17.5 of them and both sides of the feed-forward's activation:
    the bytes of tests/wan/test_kept_bytes.py for both published shapes. A recomputed one keeps its input, and what it
    keeps of attention, until it is computed again; of offloaded ones two are on the device. 1F1B has as many
    micro-batches in flight on the first stage as there are stages.
    """
    whole = 17.5 + 2 * run.wan.ffn_dim / run.wan.hidden_size
    plan = recompute_of(run.memory) or Recompute(full_layers=0)
    modes = Counter(mode for _, mode in plan.groups(max(run.blocks_of_stages)))
    of_attention = plan.group_size * (4 if plan.kept == "q,k,v,O" else 1)
    keeping = min(modes["keep attention"], 2) if plan.offload else modes["keep attention"]
    kept = modes["full"] + keeping * (1 + of_attention) + whole * modes["none"]
    at_work = whole * plan.group_size if modes["full"] or modes["keep attention"] else 0.0
    in_flight = min(run.pp, run.micro_batches_of_step(_replicas(run)))
    cut = run.tp if run.parallel.sequence_parallel else 34 / (10 + 24 / run.tp)
    itemsize = 2 if run.model.precision == "bf16" else 4
    tokens = run.data.pack_tokens or run.data.micro_batch_size  # runs are compared that both pack, or do not
    return tokens * (kept * run.vp * in_flight + at_work) / cut / run.cp * itemsize


def _samples_of_step(run: TrainingRun) -> int:
    return run.samples_of_step(_replicas(run))


def _replicas(run: TrainingRun) -> int:
    return run.world_size // run.replica
