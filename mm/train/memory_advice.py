"""Which flags would make a run that is out of memory need less: chosen from what it does not use and what is largest.

Every candidate is a whole request with some flags changed, and the rules of `mm.config.rules` decide whether it is
legal. What it saves is the measured split times closed ratios of bytes before and after:

| kind | bytes an element of the model, on a rank |
| --- | --- |
| parameters | 4, in bf16 2, over TP x PP; layer-zero: 4 over TP x PP x zero3_size |
| gradients | 4 over the same |
| optimizer | AdamW 8, Lion 4, in bf16 4 more, over TP x PP, over DP x CP when distributed; layer-zero: as parameters |
| its average | 4 over the same as the optimizer, on those who own it |

With LoRA the base has 2 or 4 bytes, 1 in 8 bits, over TP x PP (layer-zero: x zero3_size); gradients and optimizer are
those of the adapters, which layer-zero replicates.

Sources: Rajbhandari et al. 2020 (arXiv 1910.02054) section 3; for activations Korthikanti et al. 2022 (arXiv
2205.05198) section 4. Layer-zero's gathered blocks, embeddings and head are left out, so these are estimates.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mm.config.flags import as_words
from mm.config.layerzero import ZeroConfig
from mm.config.layout import balanced_stages
from mm.config.recompute import Recompute, recompute_of
from mm.config.request import Request
from mm.config.rules import TRAINING_RULES
from mm.config.train import PredictorConfig, PretrainModel, TrainFlags
from mm.optim.algorithms.make import ALGORITHMS
from mm.train.memory_breakdown import MemoryBreakdown

_ZERO_FILE = "zero_config.yaml"
_LARGEST_FACTOR = 8
"""By how much a degree is raised at most; the smallest legal factor is proposed."""
_ADAPTERS = 0.01
"""Elements of adapters for each of the model, about: only how much of an unfinished model is what depends on it."""


@dataclass(frozen=True)
class MemoryAdvice:
    """One change that lowers what a rank needs.

    Attributes:
        request: the run with the change. before: the run.
        text: the flags to add, and what to write into which file.
        saved: bytes on a rank, estimated.
    """

    request: Request
    before: Request
    text: str
    saved: float

    @property
    def score(self) -> float:
        """Bytes saved for each device that is used."""
        return self.saved * self.before.world_size / self.request.world_size

    def __str__(self) -> str:
        text, batches = self.text, (_samples_of_step(self.request), _samples_of_step(self.before))
        if self.request.world_size != self.before.world_size:
            text += f" on {self.request.world_size} processes instead of {self.before.world_size}"
        if batches[0] != batches[1]:
            text += f" (a global batch of {batches[0]} instead of {batches[1]})"
        return text


@dataclass(frozen=True)
class _Change:
    """What a candidate changes: fields of the flags, of `predictor` in the model's file, of layer-zero's file."""

    flags: Mapping[str, Any]
    predictor: Mapping[str, Any] = field(default_factory=dict)
    zero: Mapping[str, Any] = field(default_factory=dict)
    world_size: int = 0


def reliefs(request: Request, split: MemoryBreakdown, count: int = 3) -> list[MemoryAdvice]:
    """The changes that lower this rank's memory most for each device, best first.

    Fewer than `count` come back only where the rules leave fewer: with one head, one block and everything else in use.

    Args:
        request: the run, which the rules have accepted.
        split: what the rank held. count: how many changes to name.
    """
    found = [relief for family in _families(request) if (relief := _first_that_helps(request, split, family))]
    return sorted(found, key=lambda relief: relief.score, reverse=True)[:count]


def saved_bytes(before: Request, after: Request, split: MemoryBreakdown) -> float:
    """Bytes that a rank needs less, estimated; of what failed to be allocated and of moments to come too."""
    old, new = ((*_model_bytes(r), _activation_bytes(r)) for r in (before, after))
    return sum(size * (1 - less / more) for size, less, more in zip(_needed(split, old), new, old, strict=True))


def _needed(split: MemoryBreakdown, ratios: tuple[float, ...]) -> tuple[float, ...]:
    """Bytes of parameters, gradients, optimizer and activations, with the allocation that failed."""
    if split.phase == "building the model":  # nobody knows what is what yet: as much of each as a whole model has
        model = split.held - split.program + split.asked
        return (*(model * ratio / sum(ratios[:3]) for ratio in ratios[:3]), 0.0)
    in_step = split.phase == "forward and backward"
    optimizer = split.optimizer + max(split.moments_to_come, 0 if in_step else split.asked)
    return split.parameters, split.gradients, optimizer, split.activations + (split.asked if in_step else 0)


def _first_that_helps(request: Request, split: MemoryBreakdown, family: Iterator[_Change]) -> MemoryAdvice | None:
    for change in family:
        candidate = _changed(request, change)
        if any(problem for rule in TRAINING_RULES for problem in rule(candidate)):
            continue
        old, new = ((*_model_bytes(r), _activation_bytes(r)) for r in (request, candidate))
        saved = saved_bytes(request, candidate, split)
        if saved >= 0 and any(less < more for less, more in zip(new, old, strict=True)):
            return MemoryAdvice(candidate, request, _text(request, candidate), saved)
    return None


def _families(request: Request) -> Iterator[Iterator[_Change]]:
    """Changes of one kind together, the mildest first; one of each kind is proposed."""
    yield _recompute(request)
    yield _offload(request)
    yield iter([_Change({"micro_batch_size": 1})] if request.flags.micro_batch_size > 1 else [])
    yield iter([] if request.flags.bf16 else [_bf16(request)])
    yield iter([_Change({"lora_base_dtype": "int8"})] if _base_has_more_bits(request) else [])
    yield _distributed_optimizer(request)
    yield _layerzero(request)
    yield iter([_Change({"sequence_parallel": True})] if request.tp > 1 and not request.flags.sequence_parallel else [])
    yield _tensor_parallel(request)
    yield _context_parallel(request)
    yield _pipeline_parallel(request)


def _recompute(request: Request) -> Iterator[_Change]:
    """Keeping attention costs least time; of groups a single block keeps least, as it has one whole block at work."""
    plan, flags = recompute_of(request.flags, request.model), request.flags
    if plan is None:
        yield _Change({"recompute_granularity": "selective"})
        return
    if plan.group_size > 1:
        yield _Change({"recompute_num_layers": 1})
    if flags.recompute_method == "block" and flags.recompute_skip_core_attention:
        left = max(request.blocks_of_stages) - (flags.recompute_num_layers or 0)
        yield _Change({"recompute_num_layers_skip_core_attention": left})
    single = {} if flags.recompute_num_layers is None else {"recompute_num_layers": 1}
    yield _Change({"recompute_granularity": "full", "recompute_method": "uniform", **single})


def _offload(request: Request) -> Iterator[_Change]:
    yield _Change({}, {"attention_async_offload": True})  # the rules refuse it where no block keeps its attention


def _bf16(request: Request) -> _Change:
    predictor = {} if request.model.predictor.dtype is None else {"dtype": "bf16"}
    zero = {} if request.zero is None or request.zero.param_dtype is None else {"param_dtype": "bf16"}
    return _Change({"bf16": True}, predictor, zero)


def _base_has_more_bits(request: Request) -> bool:
    return request.flags.lora and request.flags.lora_base_dtype is None


def _distributed_optimizer(request: Request) -> Iterator[_Change]:
    if not request.flags.use_distributed_optimizer:
        yield _Change({"use_distributed_optimizer": True})
        yield _Change({"use_distributed_optimizer": True}, world_size=2 * request.world_size)


def _layerzero(request: Request) -> Iterator[_Change]:
    """Parameters over all ranks that hold the same ones, or over more of them."""
    for world_size in (request.world_size, 2 * request.world_size):
        ranks = world_size // (request.tp * request.pp)
        flags = {} if request.zero else {"layerzero": True, "layerzero_config": _ZERO_FILE}
        if ranks > (request.zero.zero3_size if request.zero else 1):
            yield _Change(flags, zero={"zero3_size": ranks}, world_size=world_size)


def _tensor_parallel(request: Request) -> Iterator[_Change]:
    for factor, world_size in _more_of_an_axis(request):
        change = {"tensor_model_parallel_size": factor * request.tp, "sequence_parallel": True}
        yield _Change(change, world_size=world_size)


def _context_parallel(request: Request) -> Iterator[_Change]:
    """The same algorithm, or where heads do not suffice a ring around the groups that there are."""
    for factor, world_size in _more_of_an_axis(request):
        size = {"context_parallel_size": factor * request.cp}
        ring: dict[str, Any] = {"context_parallel_algo": "megatron_cp_algo"}
        if request.cp > 1:
            ring = {"context_parallel_algo": "hybrid_cp_algo", "ulysses_degree_in_cp": request.cp}
        yield _Change(size, world_size=world_size)
        if request.flags.context_parallel_algo == "ulysses_cp_algo":
            yield _Change({**size, **ring}, world_size=world_size)


def _pipeline_parallel(request: Request) -> Iterator[_Change]:
    predictor = request.model.predictor
    for factor, world_size in _more_of_an_axis(request):
        pp_size = factor * request.pp
        change = {"pipeline_model_parallel_size": pp_size}
        if pp_size * request.vp > predictor.num_layers:
            return
        if predictor.pipeline_num_layers is None and predictor.num_layers % (pp_size * request.vp) == 0:
            yield _Change(change, world_size=world_size)
            continue
        rows = [list(row) for row in balanced_stages(predictor.num_layers, pp_size, request.vp)]
        yield _Change(change, {"pipeline_num_layers": rows if request.vp > 1 else rows[0]}, world_size=world_size)


def _more_of_an_axis(request: Request) -> Iterator[tuple[int, int]]:
    """(factor, processes): replicas give up their processes where they can, else more are needed."""
    for factor in range(2, _LARGEST_FACTOR + 1):
        if request.world_size // request.replica % factor == 0:
            yield factor, request.world_size
        yield factor, factor * request.world_size


def _changed(request: Request, change: _Change) -> Request:
    """The request with a change, and the same global batch, or the next that more replicas can share."""
    old = request.model
    predictor = PredictorConfig.model_validate({**old.predictor.model_dump(), **change.predictor})
    model = PretrainModel(task=old.task, predictor=predictor, diffusion=old.diffusion)
    zero = request.zero
    if change.zero:
        zero = ZeroConfig.model_validate({**(zero.model_dump() if zero else {}), **change.zero})
    values = {**request.flags.model_dump(), **change.flags}
    candidate = Request(TrainFlags.model_validate(values), model, zero, change.world_size or request.world_size)
    unit = candidate.flags.micro_batch_size * _replicas(candidate)
    batch = math.ceil(_samples_of_step(request) / unit) * unit
    if _samples_of_step(candidate) == batch:
        return candidate
    return replace(candidate, flags=TrainFlags.model_validate({**values, "global_batch_size": batch}))


def _text(before: Request, after: Request) -> str:
    """What a user types and writes: "`--bf16` and `"dtype": "bf16"` in pretrain_model.json"."""
    parts = [" ".join(as_words(_differences(before.flags.model_dump(), after.flags.model_dump())))]
    predictor = _differences(before.model.predictor.model_dump(), after.model.predictor.model_dump())
    for name, value in predictor.items():
        parts.append(f'"{name}": {json.dumps(value)} in {after.flags.mm_model}')
    old_zero = before.zero.model_dump() if before.zero else ZeroConfig.model_construct().model_dump()
    zero = after.zero.model_dump() if after.zero else {}
    shown = _differences(old_zero, zero)
    if after.zero is not None and before.zero is None:
        shown["zero3_size"] = after.zero.zero3_size  # even where it is the default: no file was there
    parts += [f"{name}: {value} in {after.flags.layerzero_config}" for name, value in shown.items()]
    return " and ".join(part for part in parts if part)


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in after.items() if before[name] != value}


def _model_bytes(request: Request) -> tuple[float, float, float]:
    """Of parameters, gradients and optimizer state an element of the whole model, on one rank."""
    cut, sharing = request.tp * request.pp, _replicas(request) * request.cp
    distributed = sharing if request.flags.use_distributed_optimizer else 1
    state = ALGORITHMS[request.flags.optimizer].bytes_per_element
    state += 4 if request.flags.ema_decay is not None else 0
    if request.flags.lora:
        base = (1 if request.flags.lora_base_dtype else 2 if request.flags.bf16 else 4) / cut
        if request.zero is not None:  # a block that runs and the next are gathered beside the shards
            base *= min(1.0, 1 / request.zero.zero3_size + 2 / max(request.blocks_of_stages))
        replicas = 1 if request.zero is not None else distributed
        return base, 4 * _ADAPTERS / cut, state * _ADAPTERS / (cut * replicas)
    if request.zero is not None:
        shard = cut * request.zero.zero3_size
        return 4 / shard, 4 / shard, state / max(shard, cut * distributed)
    if request.flags.bf16:
        return 2 / cut, 4 / cut, (4 + state) / (cut * distributed)
    return 4 / cut, 4 / cut, state / (cut * distributed)


def _activation_bytes(request: Request) -> float:
    """Of one rank, for each token of a sample and unit of width.

    The unit inside is a block's input. A block keeps 17.5 of them and both sides of the feed-forward's activation:
    the bytes of tests/wan/test_kept_bytes.py for both published shapes. A recomputed one keeps its input, and what it
    keeps of attention, until it is computed again; of offloaded ones two are on the device. 1F1B has as many
    micro-batches in flight on the first stage as there are stages.
    """
    flags, shape = request.flags, request.model.predictor
    whole = 17.5 + 2 * shape.ffn_dim / shape.hidden_size
    plan = recompute_of(flags, request.model) or Recompute(full_layers=0)
    modes = Counter(mode for _, mode in plan.groups(max(request.blocks_of_stages)))
    of_attention = plan.group_size * (4 if plan.kept == "q,k,v,O" else 1)
    keeping = min(modes["keep attention"], 2) if plan.offload else modes["keep attention"]
    kept = modes["full"] + keeping * (1 + of_attention) + whole * modes["none"]
    at_work = whole * plan.group_size if modes["full"] or modes["keep attention"] else 0.0
    in_flight = min(request.pp, flags.micro_batches_of_step(_replicas(request)))
    cut = request.tp if flags.sequence_parallel else 34 / (10 + 24 / request.tp)
    itemsize = 2 if flags.bf16 else 4
    return flags.micro_batch_size * (kept * request.vp * in_flight + at_work) / cut / request.cp * itemsize


def _samples_of_step(request: Request) -> int:
    return request.flags.samples_of_step(_replicas(request))


def _replicas(request: Request) -> int:
    return request.world_size // request.replica
