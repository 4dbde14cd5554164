"""Rules about the axes of a training run: those of every command (`mm.config.rules.mesh`), the pipeline, the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

from mm.config.layout import balanced_stages
from mm.config.rules.mesh import MESH_RULES
from mm.config.run.training import TrainingRun
from mm.errors import Problem


def _stages_fit(run: TrainingRun) -> Iterator[Problem]:
    """CFG-038: every virtual stage of the pipeline has blocks. Without a pipeline a list is unused."""
    wan, pp, vp, rows = run.wan, run.pp, run.vp, run.parallel.stages
    layers, stages = run.origins["model.shape.num_layers"], run.origins["parallel.stages"]
    if pp == 1:
        return
    grid = f"PP {pp} x VP {vp}" if vp > 1 else f"PP {pp}"
    if wan.num_layers < pp * vp:
        found = f"{grid} makes {pp * vp} stages, and {layers.place()} is {wan.num_layers}."
        yield Problem("CFG-038", found, f"Lower {'PP x VP' if vp > 1 else 'PP'} to at most {wan.num_layers}.")
        return
    remedy = f"Use {_stages_that_work(run)}."
    if rows is None:
        if wan.num_layers % (pp * vp):
            found = (
                f"{layers.with_value(wan.num_layers)} in {layers.file} does not divide by {grid}, and no stages are "
            )
            yield Problem("CFG-038", f"{found}listed.", remedy)
        return
    found = stages.states(rows)
    if len(rows) != vp or any(len(row) != pp for row in rows):
        wanted = f"{vp} lists of {pp} numbers" if vp > 1 else f"{pp} numbers"
        yield Problem("CFG-038", f"{found}, and {grid} needs {wanted}.", remedy)
    elif min(chain(*rows)) < 1:
        yield Problem("CFG-038", f"{found}, which leaves a stage without a block.", remedy)


def _stages_add_up(run: TrainingRun) -> Iterator[Problem]:
    """CFG-027: a list of stages is one of this model, used or not."""
    layers, stages = run.origins["model.shape.num_layers"], run.origins["parallel.stages"]
    if run.parallel.stages is None:
        return
    total = sum(chain(*run.parallel.stages))
    if total != run.wan.num_layers:
        found = f"{stages.place()} adds up to {total}"
        works = run.pp > 1 and run.pp * run.vp <= run.wan.num_layers
        remedy = f"Use {_stages_that_work(run)}." if works else "Make them agree."
        yield Problem("CFG-027", f"{found}, and {layers.name} is {run.wan.num_layers}.", remedy)


def _batch_divides(run: TrainingRun) -> Iterator[Problem]:
    """CFG-021: a step is a whole number of micro-batches on every replica."""
    batch, micro, dp = run.data.global_batch_size, run.data.micro_batch_size, run.dp
    if dp is None or batch is None or batch % (micro * dp) == 0:
        return
    whole, part = run.origins["data.global_batch_size"], run.origins["data.micro_batch_size"]
    yield Problem(
        "CFG-021",
        f"{whole.with_value(batch)} is not a multiple of {part.with_value(micro)} x {dp} replicas.",
        f"Use {whole.name} {_batches_that_work(run, batch, dp)}.",
    )


def _interleaved_schedule_fits(run: TrainingRun) -> Iterator[Problem]:
    """CFG-039: the interleaved schedule takes micro-batches in rounds of one for each pipeline rank."""
    dp, virtual, pipeline = run.dp, run.origins["parallel.virtual_size"], run.origins["parallel.pipeline_size"]
    if run.vp > 1 and run.pp == 1:
        found = f"{virtual.with_value(run.vp)} has no effect with {pipeline.with_value(1)}."
        yield Problem("CFG-039", found, f"Set it to 1, or raise {pipeline.name}.")
    elif run.vp > 1 and dp is not None:
        batch = run.samples_of_step(dp)
        micro_batches, rest = divmod(batch, run.data.micro_batch_size * dp)
        if rest == 0 and micro_batches % run.pp:  # a rest is told by CFG-021, with batches that this rule takes
            packed = run.data.pack_tokens is not None  # as many sequences as samples, where each is as long as can be
            yield Problem(
                "CFG-039",
                f"A global batch of {batch} makes {micro_batches} {'samples' if packed else 'micro-batches'} on each "
                f"replica, and the interleaved schedule needs a multiple of PP {run.pp}.",
                f"Use {run.origins['data.global_batch_size'].name} {_batches_that_work(run, batch, dp)}.",
            )


def _sizes_vary_in_a_pipeline(run: TrainingRun) -> Iterator[Problem]:
    """CFG-044: a value about what crosses a stage boundary."""
    if run.parallel.variable_sizes and run.pp == 1:
        sizes, pipeline = run.origins["parallel.variable_sizes"], run.origins["parallel.pipeline_size"]
        found = f"{sizes.with_value(True)} has no effect with {pipeline.with_value(1)}."
        yield Problem("CFG-044", found, f"Remove it, or raise {pipeline.name}.")


def _stages_that_work(run: TrainingRun) -> str:
    stages = [list(row) for row in balanced_stages(run.wan.num_layers, run.pp, run.vp)]
    return run.origins["parallel.stages"].assigned(stages)


def _batches_that_work(run: TrainingRun, batch: int, dp: int) -> str:
    """The global batches next to `batch` that every rule about the batch takes."""
    unit = run.data.micro_batch_size * dp * (run.pp if run.vp > 1 else 1)
    below = batch // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


PARALLEL_RULES: tuple[Callable[[TrainingRun], Iterator[Problem]], ...] = (
    *MESH_RULES,
    _stages_fit,
    _stages_add_up,
    _batch_divides,
    _interleaved_schedule_fits,
    _sizes_vary_in_a_pipeline,
)
