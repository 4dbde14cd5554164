"""Rules about tensor and context parallelism and layer-zero, which training and generation share.

Each is one function with its id and says which numbers would work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from mm.config.run.mesh import MeshRun
from mm.errors import Problem

_CONTEXT = ("context_size", "context_algorithm", "ulysses_size")


def _world_factors(run: MeshRun) -> Iterator[Problem]:
    """CFG-032: every process has a place in the grid."""
    if run.dp is None:
        yield Problem(
            "CFG-032",
            f"{run.world_size} processes do not divide by TP {run.tp} x PP {run.pp} x CP {run.cp}.",
            f"Start a multiple of {run.replica} processes, or choose TP, PP and CP whose product is "
            f"{_one_of(_divisors(run.world_size))}.",
        )


def _tensor_parallel_divides(run: MeshRun) -> Iterator[Problem]:
    """CFG-033: every tensor-parallel rank has the same number of heads and of feed-forward columns."""
    heads, width = run.wan.num_heads, run.wan.ffn_dim
    sizes = {"num_heads": heads, "ffn_dim": width}
    wrong = [run.origins[f"model.shape.{name}"].with_value(size) for name, size in sizes.items() if size % run.tp]
    if wrong:
        ulysses, others = run.ulysses or 1, run.pp * run.cp
        legal = _divisors(math.gcd(heads, width))
        legal = _prefer(legal, lambda size: heads // size % ulysses == 0)
        legal = _prefer(legal, lambda size: run.world_size % (size * others) == 0)
        tensor, file = run.origins["parallel.tensor_size"], run.origins["model.shape.num_heads"].file
        yield Problem(
            "CFG-033",
            f"{' and '.join(wrong)} in {file} {'do' if wrong[1:] else 'does'} not divide by "
            f"{tensor.with_value(run.tp)}.",
            f"Use {tensor.name} {_one_of(legal)}.",
        )


def _ulysses_divides_heads(run: MeshRun) -> Iterator[Problem]:
    """CFG-034: Ulysses gives every rank of its group the same number of heads."""
    if run.ulysses is None or run.heads % run.ulysses == 0:
        return
    legal, inside = _divisors(run.heads), _divisors(math.gcd(run.cp, run.heads))
    words = run.origins
    size, algorithm, degree = (words[f"parallel.{name}"] for name in _CONTEXT)
    if run.mesh.context_algorithm == "hybrid":
        remedy = f"Use {degree.name} {_one_of(inside)}."
    else:
        fitting = _prefer(legal, lambda number: run.world_size % (run.tp * run.pp * number) == 0)
        largest = inside[-1]  # that many heads can be exchanged inside the same CP; the rest becomes a ring
        hybrid = f"{algorithm.with_value('hybrid')} {degree.with_value(largest)}"
        added = hybrid if largest > 1 else algorithm.with_value("ring")
        remedy = f"Use {size.name} {_one_of(fitting)}, or add {added}."
    heads = words["model.shape.num_heads"].with_value(run.wan.num_heads)
    yield Problem(
        "CFG-034",
        f"{heads} leaves {run.heads} heads on a tensor-parallel rank, which take a Ulysses degree of "
        f"{_one_of(legal)}, not {run.ulysses}.",
        remedy,
    )


def _hybrid_has_a_degree(run: MeshRun) -> Iterator[Problem]:
    """CFG-035: the hybrid algorithm, and it alone, is told its Ulysses degree."""
    size, algorithm, ulysses = (run.origins[f"parallel.{name}"] for name in _CONTEXT)
    chosen, degree, hybrid = run.mesh.context_algorithm, run.mesh.ulysses_size, algorithm.with_value("hybrid")
    legal = _one_of(_divisors(math.gcd(run.cp, run.heads)))
    if chosen != "hybrid":
        if degree is not None:
            found = f"{ulysses.with_value(degree)} has no effect with {algorithm.with_value(chosen)}."
            yield Problem("CFG-035", found, f"Remove it, or give {hybrid}.")
    elif degree is None:
        yield Problem("CFG-035", f"{hybrid} needs {ulysses.name}.", f"Give {ulysses.name} {legal}.")
    elif run.cp % degree:
        found = f"{ulysses.with_value(degree)} does not divide {size.with_value(run.cp)}."
        yield Problem("CFG-035", found, f"Use {ulysses.name} {legal}.")


def _ring_values_have_a_ring(run: MeshRun) -> Iterator[Problem]:
    """CFG-036: the ring's options need a ring, and windows cut it evenly."""
    size, algorithm, ulysses = (run.origins[f"parallel.{name}"] for name in _CONTEXT)
    overlap, window = run.origins["parallel.ring_overlap"], run.origins["parallel.ring_window"]
    chosen = algorithm.with_value(run.mesh.context_algorithm)
    if run.cp == 1 and run.mesh.context_algorithm != "ulysses":
        found = f"{chosen} has no effect with {size.with_value(1)}."
        yield Problem("CFG-036", found, f"Remove it, or raise {size.name}.")
    if run.ulysses is None:
        return  # how long the ring is remains unknown until CFG-035 is settled
    ring = run.cp // run.ulysses
    found = f"{chosen} over CP {run.cp} makes a ring of {ring}"
    if run.mesh.ring_overlap and ring == 1:
        yield Problem(
            "CFG-036",
            f"{overlap.with_value(True)} needs a ring, and {found}.",
            f"Remove it, or choose {algorithm.spelled('ring')}, or {algorithm.spelled('hybrid')} with a {ulysses.name} "
            "below CP.",
        )
    if ring % run.mesh.ring_window:
        yield Problem(
            "CFG-036",
            f"{window.with_value(run.mesh.ring_window)} does not divide the ring: {found}.",
            f"Use {window.name} {_one_of(_divisors(ring))}.",
        )


def _sequence_parallel_needs_tensor_parallel(run: MeshRun) -> Iterator[Problem]:
    """CFG-037: sequence parallelism cuts tokens over the tensor-parallel ranks."""
    if run.mesh.sequence_parallel and run.tp == 1:
        tensor, sequence = run.origins["parallel.tensor_size"], run.origins["parallel.sequence_parallel"]
        found = f"{sequence.with_value(True)} has no effect with {tensor.with_value(1)}."
        yield Problem("CFG-037", found, f"Remove it, or raise {tensor.name}.")


def _layerzero_fits(run: MeshRun) -> Iterator[Problem]:
    """CFG-045: groups of zero3_size fill the ranks that hold the same parameters, in the run's precision."""
    zero, dp = run.mesh.layerzero, run.dp
    if zero is None:
        return
    size, param_dtype = (run.origins[f"parallel.layerzero.{name}"] for name in ("zero3_size", "param_dtype"))
    if dp is not None and dp * run.cp % zero.zero3_size:
        yield Problem(
            "CFG-045",
            f"{size.with_value(zero.zero3_size)} in {size.file} does not divide the {dp * run.cp} ranks of DP {dp} x "
            f"CP {run.cp}.",
            f"Use {size.name} {_one_of(_divisors(dp * run.cp))}.",
        )
    if zero.param_dtype is not None and zero.param_dtype != run.dtype:
        yield Problem(
            "CFG-045",
            f"{run.origins['model.precision'].states(run.dtype)}, and {param_dtype.states(zero.param_dtype)}.",
            f"Make them agree, or remove {param_dtype.name}.",
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


MESH_RULES: tuple[Callable[[MeshRun], Iterator[Problem]], ...] = (
    _world_factors,
    _tensor_parallel_divides,
    _ulysses_divides_heads,
    _hybrid_has_a_degree,
    _ring_values_have_a_ring,
    _sequence_parallel_needs_tensor_parallel,
    _layerzero_fits,
)
