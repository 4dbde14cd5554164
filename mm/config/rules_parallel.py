"""Rules about the axes of a training run: those of every command (`mm.config.rules_mesh`), the pipeline, the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

from mm.config.layout import balanced_stages, stage_rows
from mm.config.request import Request
from mm.config.rules_mesh import MESH_RULES
from mm.errors import Problem


def _stages_fit(request: Request) -> Iterator[Problem]:
    """CFG-038: every virtual stage of the pipeline has blocks. Without a pipeline a list is unused."""
    shape, pp, vp, file = request.model.predictor, request.pp, request.vp, request.flags.mm_model
    if pp == 1:
        return
    grid = f"PP {pp} x VP {vp}" if vp > 1 else f"PP {pp}"
    if shape.num_layers < pp * vp:
        found = f"{grid} makes {pp * vp} stages, and num_layers in {file} is {shape.num_layers}."
        yield Problem("CFG-038", found, f"Lower {'PP x VP' if vp > 1 else 'PP'} to at most {shape.num_layers}.")
        return
    remedy = f'Use "pipeline_num_layers": {_stages_that_work(request)}.'
    listed = shape.pipeline_num_layers
    if listed is None:
        if shape.num_layers % (pp * vp):
            found = f"num_layers {shape.num_layers} in {file} does not divide by {grid}, and no stages are listed."
            yield Problem("CFG-038", found, remedy)
        return
    rows, found = stage_rows(listed), f"pipeline_num_layers in {file} is {listed}"
    if len(rows) != vp or any(len(row) != pp for row in rows):
        wanted = f"{vp} lists of {pp} numbers" if vp > 1 else f"{pp} numbers"
        yield Problem("CFG-038", f"{found}, and {grid} needs {wanted}.", remedy)
    elif min(chain(*rows)) < 1:
        yield Problem("CFG-038", f"{found}, which leaves a stage without a block.", remedy)


def _stages_add_up(request: Request) -> Iterator[Problem]:
    """CFG-027: a list of stages is one of this model, used or not."""
    shape, listed = request.model.predictor, request.model.predictor.pipeline_num_layers
    if listed is None:
        return
    total = sum(chain(*stage_rows(listed)))
    if total != shape.num_layers:
        found = f"pipeline_num_layers in {request.flags.mm_model} adds up to {total}"
        works = request.pp > 1 and request.pp * request.vp <= shape.num_layers
        remedy = f'Use "pipeline_num_layers": {_stages_that_work(request)}.' if works else "Make them agree."
        yield Problem("CFG-027", f"{found}, and num_layers is {shape.num_layers}.", remedy)


def _batch_divides(request: Request) -> Iterator[Problem]:
    """CFG-021: a step is a whole number of micro-batches on every replica."""
    batch, dp = request.flags.global_batch_size, request.dp
    if dp is None or batch is None or batch % (request.flags.micro_batch_size * dp) == 0:
        return
    yield Problem(
        "CFG-021",
        f"--global-batch-size {batch} is not a multiple of --micro-batch-size {request.flags.micro_batch_size} x {dp} "
        "replicas.",
        f"Use --global-batch-size {_batches_that_work(request, batch, dp)}.",
    )


def _interleaved_schedule_fits(request: Request) -> Iterator[Problem]:
    """CFG-039: the interleaved schedule takes micro-batches in rounds of one for each pipeline rank."""
    flags, dp = request.flags, request.dp
    if request.vp > 1 and request.pp == 1:
        yield Problem(
            "CFG-039",
            f"--virtual-pipeline-model-parallel-size {request.vp} has no effect with --pipeline-model-parallel-size 1.",
            "Set it to 1, or raise --pipeline-model-parallel-size.",
        )
    elif request.vp > 1 and dp is not None:
        batch = flags.global_batch_size or flags.micro_batch_size * dp
        micro_batches, rest = divmod(batch, flags.micro_batch_size * dp)
        if rest == 0 and micro_batches % request.pp:  # a rest is told by CFG-021, with batches that this rule takes
            yield Problem(
                "CFG-039",
                f"A global batch of {batch} makes {micro_batches} micro-batches on each replica, and the interleaved "
                f"schedule needs a multiple of PP {request.pp}.",
                f"Use --global-batch-size {_batches_that_work(request, batch, dp)}.",
            )


def _pipeline_flags_have_a_pipeline(request: Request) -> Iterator[Problem]:
    """CFG-044: flags about what crosses a stage boundary."""
    for name in ("variable_seq_lengths", "use_multiparameter_pipeline_model_parallel"):
        if getattr(request.flags, name) and request.pp == 1:
            yield Problem(
                "CFG-044",
                f"--{name.replace('_', '-')} has no effect with --pipeline-model-parallel-size 1.",
                "Remove it, or raise --pipeline-model-parallel-size.",
            )


def _stages_that_work(request: Request) -> str:
    stages = [list(row) for row in balanced_stages(request.model.predictor.num_layers, request.pp, request.vp)]
    return str(stages if request.vp > 1 else stages[0])


def _batches_that_work(request: Request, batch: int, dp: int) -> str:
    """The global batches next to `batch` that every rule about the batch takes."""
    unit = request.flags.micro_batch_size * dp * (request.pp if request.vp > 1 else 1)
    below = batch // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


PARALLEL_RULES: tuple[Callable[[Request], Iterator[Problem]], ...] = (
    *MESH_RULES,
    _stages_fit,
    _stages_add_up,
    _batch_divides,
    _interleaved_schedule_fits,
    _pipeline_flags_have_a_pipeline,
)
