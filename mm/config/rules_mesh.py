"""Rules about tensor and context parallelism and layer-zero, which training and generation share.

Each is one function with its id and says which numbers would work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from mm.config.request import MeshRequest
from mm.errors import Problem


def _world_factors(request: MeshRequest) -> Iterator[Problem]:
    """CFG-032: every process has a place in the grid."""
    if request.dp is None:
        yield Problem(
            "CFG-032",
            f"{request.world_size} processes do not divide by TP {request.tp} x PP {request.pp} x CP {request.cp}.",
            f"Start a multiple of {request.replica} processes, or choose TP, PP and CP whose product is "
            f"{_one_of(_divisors(request.world_size))}.",
        )


def _tensor_parallel_divides(request: MeshRequest) -> Iterator[Problem]:
    """CFG-033: every tensor-parallel rank has the same number of heads and of feed-forward columns."""
    heads, width = request.shape.num_heads, request.shape.ffn_dim
    wrong = [f"{name} {size}" for name, size in (("num_heads", heads), ("ffn_dim", width)) if size % request.tp]
    if wrong:
        ulysses, others = request.ulysses or 1, request.pp * request.cp
        legal = _divisors(math.gcd(heads, width))
        legal = _prefer(legal, lambda size: heads // size % ulysses == 0)
        legal = _prefer(legal, lambda size: request.world_size % (size * others) == 0)
        yield Problem(
            "CFG-033",
            f"{' and '.join(wrong)} in {request.mesh_flags.mm_model} {'do' if wrong[1:] else 'does'} not divide by "
            f"--tensor-model-parallel-size {request.tp}.",
            f"Use --tensor-model-parallel-size {_one_of(legal)}.",
        )


def _ulysses_divides_heads(request: MeshRequest) -> Iterator[Problem]:
    """CFG-034: Ulysses gives every rank of its group the same number of heads."""
    if request.ulysses is None or request.heads % request.ulysses == 0:
        return
    legal, inside = _divisors(request.heads), _divisors(math.gcd(request.cp, request.heads))
    if request.mesh_flags.context_parallel_algo == "hybrid_cp_algo":
        remedy = f"Use --ulysses-degree-in-cp {_one_of(inside)}."
    else:
        fitting = _prefer(legal, lambda size: request.world_size % (request.tp * request.pp * size) == 0)
        largest = inside[-1]  # that many heads can be exchanged inside the same CP; the rest becomes a ring
        hybrid = f"hybrid_cp_algo --ulysses-degree-in-cp {largest}" if largest > 1 else "megatron_cp_algo"
        remedy = f"Use --context-parallel-size {_one_of(fitting)}, or add --context-parallel-algo {hybrid}."
    yield Problem(
        "CFG-034",
        f"num_heads {request.shape.num_heads} leaves {request.heads} heads on a tensor-parallel rank, "
        f"which take a Ulysses degree of {_one_of(legal)}, not {request.ulysses}.",
        remedy,
    )


def _hybrid_has_a_degree(request: MeshRequest) -> Iterator[Problem]:
    """CFG-035: the hybrid algorithm, and it alone, is told its Ulysses degree."""
    algorithm, degree = request.mesh_flags.context_parallel_algo, request.mesh_flags.ulysses_degree_in_cp
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


def _ring_flags_have_a_ring(request: MeshRequest) -> Iterator[Problem]:
    """CFG-036: the ring's options need a ring, and windows cut it evenly."""
    flags = request.mesh_flags
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


def _sequence_parallel_needs_tensor_parallel(request: MeshRequest) -> Iterator[Problem]:
    """CFG-037: sequence parallelism cuts tokens over the tensor-parallel ranks."""
    if request.mesh_flags.sequence_parallel and request.tp == 1:
        yield Problem(
            "CFG-037",
            "--sequence-parallel has no effect with --tensor-model-parallel-size 1.",
            "Remove it, or raise --tensor-model-parallel-size.",
        )


def _layerzero_has_its_file(request: MeshRequest) -> Iterator[Problem]:
    """CFG-045: layer-zero is switched on and described, or neither."""
    if request.mesh_flags.layerzero and request.mesh_flags.layerzero_config is None:
        yield Problem("CFG-045", "--layerzero needs --layerzero-config.", "Give --layerzero-config zero_config.yaml.")
    if request.mesh_flags.layerzero_config is not None and not request.mesh_flags.layerzero:
        yield Problem("CFG-045", "--layerzero-config has no effect without --layerzero.", "Add it, or remove this.")


def _layerzero_fits(request: MeshRequest) -> Iterator[Problem]:
    """CFG-045: groups of zero3_size fill the ranks that hold the same parameters, in the run's precision."""
    flags, zero, dp = request.mesh_flags, request.zero, request.dp
    if zero is None:
        return
    if dp is not None and dp * request.cp % zero.zero3_size:
        yield Problem(
            "CFG-045",
            f"zero3_size {zero.zero3_size} in {flags.layerzero_config} does not divide the {dp * request.cp} ranks of "
            f"DP {dp} x CP {request.cp}.",
            f"Use zero3_size {_one_of(_divisors(dp * request.cp))}.",
        )
    dtype, said = request.dtype
    if zero.param_dtype is not None and zero.param_dtype != dtype:
        yield Problem(
            "CFG-045",
            f"{said}, and param_dtype in {flags.layerzero_config} is {zero.param_dtype}.",
            "Make them agree, or remove param_dtype.",
        )


def _divisors(size: int) -> list[int]:
    small = [number for number in range(1, math.isqrt(size) + 1) if size % number == 0]
    return sorted({*small, *(size // number for number in small)})


def _prefer(numbers: list[int], works: Callable[[int], bool]) -> list[int]:
    """Those that also work otherwise; all, where none does."""
    return [number for number in numbers if works(number)] or numbers


def _one_of(numbers: list[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last


MESH_RULES: tuple[Callable[[MeshRequest], Iterator[Problem]], ...] = (
    _world_factors,
    _tensor_parallel_divides,
    _ulysses_divides_heads,
    _hybrid_has_a_degree,
    _ring_flags_have_a_ring,
    _sequence_parallel_needs_tensor_parallel,
    _layerzero_has_its_file,
    _layerzero_fits,
)
