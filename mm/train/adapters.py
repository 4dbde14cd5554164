"""The base model of a LoRA run, what its checkpoints say, and starting from an adapter file."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mm.checkpoint.comm import Comm, on_rank_zero
from mm.checkpoint.formats import training
from mm.checkpoint.identify import Found, identify
from mm.checkpoint.identity import identity
from mm.checkpoint.mismatch import Expected
from mm.checkpoint.weights import WeightSource, open_weights
from mm.config.run.origins import Origins
from mm.errors import DataError
from mm.lora.adapter import Adapter, require_fit, require_parts_fit
from mm.lora.files import read_adapter
from mm.lora.plan import LoRAPlan, starting_values
from mm.lora.record import AdapterRecord, adapter_of
from mm.lora.targets import every_linear
from mm.optim.optimizer import Optimizer
from mm.train.state import fill_masters

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterRun:
    """The adapters of a run and what they are added to.

    Attributes:
        plan: which linears. base: the weights of the base model. record: what checkpoints say of both.
    """

    plan: LoRAPlan
    base: WeightSource
    record: AdapterRecord


def open_base(plan: LoRAPlan, path: Path, expected: Expected, comm: Comm, *, parts: Iterable[str] = ()) -> AdapterRun:
    """Open the base model; every rank calls it. No tensor is loaded.

    Args:
        plan: the adapters. path: of the base. expected: the model that it must be of. comm: the ranks.
        parts: names of its parameters that are trained beside the adapters.

    Raises:
        CheckpointError: CKPT-011 for missing or unexpected tensors or other shapes, and what `identify` and
            `open_weights` raise.
        ConfigError: CFG-028 when the weights say that they belong to another model.
    """
    base = open_weights(identify(path, comm))

    def checked() -> str:
        expected.require(base)
        return identity(base)

    digits = on_rank_zero(comm, checked)
    record = AdapterRecord(plan.adapted, str(path), digits, plan.base_dtype, tuple(parts))
    logger.info("base model %s (%s), identity %s", base.path, base.label, digits)
    return AdapterRun(plan, base, record)


def start_masters(run: AdapterRun, optimizer: Optimizer, seed: int) -> None:
    """Set the masters to the values of the base and of new adapters, in fp32: the model has rounded ones."""
    value_of = starting_values(run.plan, run.base, seed)
    fill_masters(optimizer, lambda name: value_of(name, optimizer.shapes[name]).float())


def load_adapters(found: Found, run: AdapterRun, optimizer: Optimizer, words: Origins) -> None:
    """Start at step 0 from adapters: those of a LoRA run's checkpoint, or of a file of any family.

    Args:
        found: a file or folder as for `mm.lora.files.read_adapter`, or a checkpoint.
        run: whose r, alpha and linears the adapters must have; they may be of another base.
        optimizer: its masters are filled. words: the user's, of this run.

    Raises:
        DataError: DATA-094 when r, alpha or the linears are not the run's, DATA-095 when there are no adapters at the
            path, and what `read_adapter` and `require_fit` raise.
        CheckpointError: CKPT-012 for a damaged checkpoint, CKPT-081 for one of a whole model.
    """
    parameters = fitting_adapter(found, run.plan, run.base.shapes(), words).parameters()
    not_there = [name for name in run.record.parts if name not in parameters]
    if not_there:
        logger.info("%s holds adapters alone; %d parameters start as the base has them", found.path, len(not_there))
    fill_masters(optimizer, lambda name: (parameters[name] if name in parameters else run.base.read(name)).float())
    logger.info("loaded the adapters in %s", found.path)


def fitting_adapter(found: Found, plan: LoRAPlan, shapes: Mapping[str, Sequence[int]], words: Origins) -> Adapter:
    """Adapters at a path, which are those of a plan, for a model of these shapes; raises as `load_adapters`."""
    adapter = adapter_of(found.path) if found.format == training.FORMAT else _read_adapter(found, words)
    require_fit(adapter, every_linear(shapes))  # the next line says which of them can be trained
    _require_plan(found.path, adapter, plan, words)
    require_parts_fit(adapter, shapes)
    return adapter


def _read_adapter(found: Found, words: Origins) -> Adapter:
    try:
        return read_adapter(found)
    except DataError as error:
        if error.id not in ("DATA-020", "DATA-090"):
            raise
        raise DataError(
            "DATA-095",
            f"{words['checkpoint.load'].with_value(str(found.path))} holds neither checkpoints of a LoRA run nor an "
            f"adapter: {error.problems[0].message}",
            f"Name an adapter file, or a folder of either. The base model belongs to {words['adapters.base'].name}.",
        ) from None


def _require_plan(path: Path, adapter: Adapter, plan: LoRAPlan, words: Origins) -> None:
    theirs = adapter.adapted()
    missing = [name for name in plan.adapted if name not in theirs]
    left_over = [name for name in theirs if name not in plan.adapted]
    different = [
        f"{name} has r {theirs[name].rank} and alpha {theirs[name].alpha:g}"
        for name, how in plan.adapted.items()
        if name in theirs and theirs[name] != how
    ]
    groups = {"missing": missing, "not a target": left_over, "with other values": different}
    told = "; ".join(
        f"{len(names)} linears {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in groups.items()
        if names
    )
    if told:
        rank, alpha, targets = (words[f"adapters.{name}"].name for name in ("rank", "alpha", "targets"))
        raise DataError(
            "DATA-094",
            f"The adapters in {path} are not those of {rank}, {alpha} and {targets}: {told}.",
            "Give the values that the file has, or start without it.",
        )
