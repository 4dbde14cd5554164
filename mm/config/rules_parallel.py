"""Rules about the parallel axes. Each is one function with its id and says which numbers would work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain

from mm.config.layout import balanced_stages, stage_rows
from mm.config.request import Request
from mm.errors import Problem


def _world_factors(request: Request) -> Iterator[Problem]:
    """CFG-032: every process has a place in the grid."""
    if request.dp is None:
        yield Problem(
            "CFG-032",
            f"{request.world_size} processes do not divide by TP {request.tp} x PP {request.pp} x CP {request.cp}.",
            f"Start a multiple of {request.replica} processes, or choose TP, PP and CP whose product is "
            f"{_one_of(_divisors(request.world_size))}.",
        )


def _tensor_parallel_divides(request: Request) -> Iterator[Problem]:
    """CFG-033: every tensor-parallel rank has the same number of heads and of feed-forward columns."""
    heads, width = request.model.predictor.num_heads, request.model.predictor.ffn_dim
    wrong = [f"{name} {size}" for name, size in (("num_heads", heads), ("ffn_dim", width)) if size % request.tp]
    if wrong:
        ulysses, others = request.ulysses or 1, request.pp * request.cp
        legal = _divisors(math.gcd(heads, width))
        legal = _prefer(legal, lambda size: heads // size % ulysses == 0)
        legal = _prefer(legal, lambda size: request.world_size % (size * others) == 0)
        yield Problem(
            "CFG-033",
            f"{' and '.join(wrong)} in {request.flags.mm_model} {'do' if wrong[1:] else 'does'} not divide by "
            f"--tensor-model-parallel-size {request.tp}.",
            f"Use --tensor-model-parallel-size {_one_of(legal)}.",
        )


def _ulysses_divides_heads(request: Request) -> Iterator[Problem]:
    """CFG-034: Ulysses gives every rank of its group the same number of heads."""
    if request.ulysses is None or request.heads % request.ulysses == 0:
        return
    legal, inside = _divisors(request.heads), _divisors(math.gcd(request.cp, request.heads))
    if request.flags.context_parallel_algo == "hybrid_cp_algo":
        remedy = f"Use --ulysses-degree-in-cp {_one_of(inside)}."
    else:
        fitting = _prefer(legal, lambda size: request.world_size % (request.tp * request.pp * size) == 0)
        largest = inside[-1]  # that many heads can be exchanged inside the same CP; the rest becomes a ring
        hybrid = f"hybrid_cp_algo --ulysses-degree-in-cp {largest}" if largest > 1 else "megatron_cp_algo"
        remedy = f"Use --context-parallel-size {_one_of(fitting)}, or add --context-parallel-algo {hybrid}."
    yield Problem(
        "CFG-034",
        f"num_heads {request.model.predictor.num_heads} leaves {request.heads} heads on a tensor-parallel rank, "
        f"which take a Ulysses degree of {_one_of(legal)}, not {request.ulysses}.",
        remedy,
    )


def _hybrid_has_a_degree(request: Request) -> Iterator[Problem]:
    """CFG-035: the hybrid algorithm, and it alone, is told its Ulysses degree."""
    algorithm, degree = request.flags.context_parallel_algo, request.flags.ulysses_degree_in_cp
    legal = _one_of(_divisors(math.gcd(request.cp, request.heads)))
    if algorithm != "hybrid_cp_algo":
        if degree is not None:
            found = f"--ulysses-degree-in-cp {degree} has no effect with --context-parallel-algo {algorithm}."
            yield Problem("CFG-035", found, "Remove it, or give --context-parallel-algo hybrid_cp_algo.")
    elif degree is None:
        found = "--context-parallel-algo hybrid_cp_algo needs --ulysses-degree-in-cp."
        yield Problem("CFG-035", found, f"Give --ulysses-degree-in-cp {legal}.")
    elif request.cp % degree:
        found = f"--ulysses-degree-in-cp {degree} does not divide --context-parallel-size {request.cp}."
        yield Problem("CFG-035", found, f"Use --ulysses-degree-in-cp {legal}.")


def _ring_flags_have_a_ring(request: Request) -> Iterator[Problem]:
    """CFG-036: the ring's options need a ring, and windows cut it evenly."""
    flags = request.flags
    if request.cp == 1 and flags.context_parallel_algo != "ulysses_cp_algo":
        yield Problem(
            "CFG-036",
            f"--context-parallel-algo {flags.context_parallel_algo} has no effect with --context-parallel-size 1.",
            "Remove it, or raise --context-parallel-size.",
        )
    if request.ulysses is None:
        return  # how long the ring is remains unknown until CFG-035 is settled
    ring = request.cp // request.ulysses
    found = f"--context-parallel-algo {flags.context_parallel_algo} over CP {request.cp} makes a ring of {ring}"
    if flags.use_cp_send_recv_overlap and ring == 1:
        yield Problem(
            "CFG-036",
            f"--use-cp-send-recv-overlap needs a ring, and {found}.",
            "Remove it, or choose megatron_cp_algo, or hybrid_cp_algo with a --ulysses-degree-in-cp below CP.",
        )
    if ring % flags.cp_window_size:
        yield Problem(
            "CFG-036",
            f"--cp-window-size {flags.cp_window_size} does not divide the ring: {found}.",
            f"Use --cp-window-size {_one_of(_divisors(ring))}.",
        )


def _sequence_parallel_needs_tensor_parallel(request: Request) -> Iterator[Problem]:
    """CFG-037: sequence parallelism cuts tokens over the tensor-parallel ranks."""
    if request.flags.sequence_parallel and request.tp == 1:
        yield Problem(
            "CFG-037",
            "--sequence-parallel has no effect with --tensor-model-parallel-size 1.",
            "Remove it, or raise --tensor-model-parallel-size.",
        )


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


def _layerzero_has_its_file(request: Request) -> Iterator[Problem]:
    """CFG-045: layer-zero is switched on and described, or neither."""
    if request.flags.layerzero and request.flags.layerzero_config is None:
        yield Problem("CFG-045", "--layerzero needs --layerzero-config.", "Give --layerzero-config zero_config.yaml.")
    if request.flags.layerzero_config is not None and not request.flags.layerzero:
        yield Problem("CFG-045", "--layerzero-config has no effect without --layerzero.", "Add it, or remove this.")


def _layerzero_fits(request: Request) -> Iterator[Problem]:
    """CFG-045: groups of zero3_size fill the ranks that hold the same parameters, in the run's precision."""
    flags, zero, dp = request.flags, request.zero, request.dp
    if zero is None:
        return
    if dp is not None and dp * request.cp % zero.zero3_size:
        yield Problem(
            "CFG-045",
            f"zero3_size {zero.zero3_size} in {flags.layerzero_config} does not divide the {dp * request.cp} ranks of "
            f"DP {dp} x CP {request.cp}.",
            f"Use zero3_size {_one_of(_divisors(dp * request.cp))}.",
        )
    if zero.param_dtype is not None and (zero.param_dtype == "bf16") != flags.bf16:
        given = "given" if flags.bf16 else "absent"
        yield Problem(
            "CFG-045",
            f"--bf16 is {given}, and param_dtype in {flags.layerzero_config} is {zero.param_dtype}.",
            "Make them agree, or remove param_dtype.",
        )


def _stages_that_work(request: Request) -> str:
    stages = [list(row) for row in balanced_stages(request.model.predictor.num_layers, request.pp, request.vp)]
    return str(stages if request.vp > 1 else stages[0])


def _batches_that_work(request: Request, batch: int, dp: int) -> str:
    """The global batches next to `batch` that every rule about the batch takes."""
    unit = request.flags.micro_batch_size * dp * (request.pp if request.vp > 1 else 1)
    below = batch // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


def _divisors(size: int) -> list[int]:
    small = [number for number in range(1, math.isqrt(size) + 1) if size % number == 0]
    return sorted({*small, *(size // number for number in small)})


def _prefer(numbers: list[int], works: Callable[[int], bool]) -> list[int]:
    """Those that also work otherwise; all, where none does."""
    return [number for number in numbers if works(number)] or numbers


def _one_of(numbers: list[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last


PARALLEL_RULES = (
    _world_factors,
    _tensor_parallel_divides,
    _ulysses_divides_heads,
    _hybrid_has_a_degree,
    _ring_flags_have_a_ring,
    _sequence_parallel_needs_tensor_parallel,
    _stages_fit,
    _stages_add_up,
    _batch_divides,
    _interleaved_schedule_fits,
    _pipeline_flags_have_a_pipeline,
    _layerzero_has_its_file,
    _layerzero_fits,
)
