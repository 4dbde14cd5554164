"""Closed formulas: the bytes a rank must send, and the pipeline's idle share. What is counted is compared with them.

`s` are the tokens of a sample, `d` is the model width, `P` the ranks of an axis, `e` the bytes of an element in
forward and backward (2 in bf16). A block sends, in forward (forward and backward):

| axis | bytes | calls |
| --- | --- | --- |
| Ulysses | 4 s/P d e (P-1)/P (twice that) | 2 (4): q, k, v together, then the output |
| ring | 2 s/P d e (P-1) (plus the same with e + 4: keys and values again, and the sums of their fp32 gradients) | P-1 (3 (P-1)) |
| tensor + sequence | 6 s d e (P-1)/P (15) | 6 (15): three gathers and scatters, three gathers again |
| tensor | 6 s d e (P-1)/P (12) | 3 (6) all-reduces |
| q/k norms on tensor ranks | 4 bytes a token and norm, all-reduced (twice) | 4 (8), 5 (10) with images |
| loss of motion | 4 s D_o (P-1)/P of an axis that shares tokens, D_o = 64 with Wan2.1's latents; once, not a block | 1 |
| layer-zero | N_l e (P-1)/P (twice that, and the gradients once) | 1 (3) |

A side block sends what a block sends; with its projections it has more parameters. Tokens in front of the video's count in s.
Cross attention under context parallelism sends nothing: every rank has the text and the images. Sources: Jacobs et al. 2023
(arXiv 2309.14509) section 3.2; Liu et al. 2023 (arXiv 2310.01889); Fang and Zhao 2024 (arXiv 2405.07719) table 2;
Korthikanti et al. 2022 (arXiv 2205.05198) section 4.2; Rajbhandari et al. 2020 (arXiv 1910.02054) section 7.
"""  # noqa: E501  the rows of a table

from __future__ import annotations

import math
from collections.abc import Mapping

from mm.config.layerzero import ZeroConfig
from mm.config.layout import Layout
from mm.config.model import WanConfig
from mm.config.tasks.task import Shape
from mm.doctor.traffic import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, REDUCE_SCATTER, SEND, CallTotals, Traffic
from mm.parallel.apply import DataParallelOptions
from mm.parallel.boundary import TIME_ROWS
from mm.parallel.placement import place, whole_shapes
from mm.parallel.tensor import gradient_is_partial
from mm.wan.precision import keep_fp32

Shapes = Mapping[str, Shape]
"""Whole shapes of parameters by native name."""

FP32 = 4
"""Bytes of an element of reduced gradients, norms' statistics and the ring's gradient sums."""


def ulysses(tokens: float, width: float, ulysses_size: int, ring_size: int, itemsize: int) -> Traffic:
    """All-to-alls of one block in forward and backward; the backward repeats the forward.

    Args:
        tokens: of the sample, padding included or not. width: D of this tensor-parallel rank's heads.
        ulysses_size, ring_size: degrees; the chunk of a rank has tokens / (ulysses_size * ring_size).
        itemsize: bytes of an element.
    """
    chunk = tokens / (ulysses_size * ring_size) * width * itemsize
    return {("ulysses", ALL_TO_ALL): CallTotals(4, 8 * chunk * (ulysses_size - 1) / ulysses_size)}


def ring(tokens: float, width: float, ulysses_size: int, ring_size: int, itemsize: int) -> Traffic:
    """Messages of one block in forward and backward; arguments as for `ulysses`. Windows change the order only."""
    chunk, hops = tokens / (ulysses_size * ring_size) * width, ring_size - 1
    forward = 2 * chunk * itemsize * hops
    backward = forward + 2 * chunk * FP32 * hops
    return {("ring", SEND): CallTotals(3 * hops, forward + backward)}


def tensor(
    tokens: float,
    text_tokens: int,
    width: int,
    tp_size: int,
    sequence_parallel: bool,
    *,
    itemsize: int,
    image_tokens: int = 0,
) -> Traffic:
    """Collectives of one block in forward and backward.

    Args:
        tokens: of a context-parallel chunk. text_tokens: L, whose keys cross attention normalises.
        width: D. tp_size: degree. sequence_parallel: whether tokens are cut over the same ranks.
        itemsize: bytes of an element. image_tokens: I, whose keys cross attention normalises apart.
    """
    share = (tp_size - 1) / tp_size
    hidden = tokens * width * itemsize * share
    norms = 10 if image_tokens else 8
    statistics = 2 * share * FP32 * (3 * tokens + text_tokens + image_tokens) * 2
    if not sequence_parallel:
        return {("tp", ALL_REDUCE): CallTotals(6 + norms, 6 * 2 * hidden + statistics)}
    return {
        ("tp", ALL_GATHER): CallTotals(9, 9 * hidden),
        ("tp", REDUCE_SCATTER): CallTotals(6, 6 * hidden),
        ("tp", ALL_REDUCE): CallTotals(norms, statistics),
    }


def motion(layout: Layout, places: int, width: int, micro_batches: int) -> Traffic:
    """Gathering of the last stage's errors for the loss of motion, in a step.

    Args:
        layout: the run's. places: of a rank for the tokens of a micro-batch. width: elements of a token of the latents.
        micro_batches: of one replica in a step.
    """
    sp_size = layout.tp_size if layout.sequence_parallel else 1
    own = places * width * FP32 * micro_batches
    found = {}
    if sp_size > 1:
        found["tp", ALL_GATHER] = CallTotals(micro_batches, float(own * (sp_size - 1)))
    if layout.cp_size > 1:
        whole = {layout.ulysses_size: "ulysses", layout.ring_size: "ring"}  # the one kind, of which all ranks are
        axis = whole.get(layout.cp_size, "cp")
        found[axis, ALL_GATHER] = CallTotals(micro_batches, float(own * sp_size * (layout.cp_size - 1)))
    return found


def boundary(
    tokens: float, context_tokens: int, width: int, itemsize: int, *, side_blocks: bool = False, runs: int = 1
) -> float:
    """Bytes over one pipeline boundary in one direction for one sample.

    The hidden state, as much again of the side blocks' stream, the embedded images and text, the time conditions in
    fp32.

    Args:
        tokens: of a rank. context_tokens: I + L. width: D. itemsize: bytes of an element.
        side_blocks: whether the model has some, wherever they are. runs: of tokens with one timestep.
    """
    streams = 2 if side_blocks else 1
    return (streams * tokens + context_tokens) * width * itemsize + runs * TIME_ROWS * width * FP32


def pipeline(layout: Layout, pp_rank: int, bytes_each: float, micro_batches: int) -> Traffic:
    """Traffic of a stage in a step: forward to the next virtual stage, backward to the one before."""
    last = layout.pp_size * layout.vp_size - 1
    places = [vp_rank * layout.pp_size + pp_rank for vp_rank in range(layout.vp_size)]
    messages = micro_batches * (sum(place < last for place in places) + sum(place > 0 for place in places))
    return {("pp", SEND): CallTotals(messages, messages * bytes_each)}


def bubble(layout: Layout, micro_batches: int) -> float:
    """Share of a step in which a stage waits: (p-1) / (v m + p - 1). Every stage is taken to be equally long.

    Source: Narayanan et al. 2021 (arXiv 2104.04473), section 2.2.
    """
    idle = layout.pp_size - 1
    return idle / (layout.vp_size * micro_batches + idle)


def layer(
    wan: WanConfig,
    layout: Layout,
    options: DataParallelOptions,
    zero: ZeroConfig | None,
    *,
    tokens: float,
    itemsize: int,
    micro_batches: int,
    side_block: int | None = None,
) -> Traffic:
    """Traffic of a rank in a step for one of its layers, one sample a micro-batch, by axis and operation.

    A layer is a block, and the side block whose hint it takes. Calls are those that a layer adds; DDP and the optimizer
    put all layers into the same calls.

    Args:
        wan, layout, options, zero: the run.
        tokens: of a sample; with padding the result is exact, without it the counted bytes are a little more.
        itemsize: bytes of an element in forward and backward.
        micro_batches: of one replica in a step.
        side_block: number of the layer's side block; None where it has none.
    """
    blocks = [_shapes_below(wan, "blocks.0.")]
    if side_block is not None:
        blocks.append(_shapes_below(wan, f"vace_blocks.{side_block}."))
    each = [_passes(wan, layout, zero, block, tokens=tokens, itemsize=itemsize) for block in blocks]
    every_pass = {
        key: CallTotals(sent.calls * micro_batches, sent.bytes * micro_batches) for key, sent in _sum(each).items()
    }
    return _sum([every_pass, *(_gradients(layout, options, zero, block, itemsize) for block in blocks)])


def _passes(
    wan: WanConfig, layout: Layout, zero: ZeroConfig | None, block: Shapes, *, tokens: float, itemsize: int
) -> Traffic:
    """Traffic of a block's forward and backward for one sample; arguments as for `layer`."""
    parts: list[Traffic] = []
    if layout.ulysses_size > 1:
        parts.append(ulysses(tokens, wan.hidden_size / layout.tp_size, layout.ulysses_size, layout.ring_size, itemsize))
    if layout.ring_size > 1:
        parts.append(ring(tokens, wan.hidden_size / layout.tp_size, layout.ulysses_size, layout.ring_size, itemsize))
    if layout.tp_size > 1:
        chunk = tokens / layout.cp_size
        axis = wan.hidden_size, layout.tp_size, layout.sequence_parallel
        parts.append(tensor(chunk, wan.text_len, *axis, itemsize=itemsize, image_tokens=wan.image_tokens))
    if zero is not None:
        parts.append(_layerzero_passes(layout, zero, block, itemsize))
    return _sum(parts)


def _layerzero_passes(layout: Layout, zero: ZeroConfig, block: Shapes, itemsize: int) -> Traffic:
    """Parameters gathered in forward and again in backward, gradients scattered, and added up across the groups."""
    sharded, _ = _elements(block, layout)
    reduced = sharded * (FP32 if zero.reduce_dtype == "fp32" else 2)
    share = (zero.zero3_size - 1) / zero.zero3_size
    groups = layout.dp_cp_size // zero.zero3_size
    found: Traffic = {}
    if zero.zero3_size > 1:
        found["zero3", ALL_GATHER] = CallTotals(2, 2 * sharded * itemsize * share)
        found["zero3", REDUCE_SCATTER] = CallTotals(1, reduced * share)
    if groups > 1:
        found["zero-replicate", ALL_REDUCE] = CallTotals(1, 2 * (groups - 1) / groups * reduced / zero.zero3_size)
    return found


def _gradients(
    layout: Layout, options: DataParallelOptions, zero: ZeroConfig | None, block: Shapes, itemsize: int
) -> Traffic:
    """Messages that come once a step: gradients of replicas, of copies on tensor-parallel ranks, and the norm."""
    low, exact = _elements(block, layout)
    share = (layout.dp_cp_size - 1) / layout.dp_cp_size
    found: list[Traffic] = []
    if zero is not None:
        found.append({("dp_cp", ALL_REDUCE): CallTotals(0, 2 * share * exact * FP32)})
        if options.use_distributed_optimizer and layout.dp_cp_size > zero.zero3_size:
            groups = layout.dp_cp_size // zero.zero3_size
            found.append(
                {("zero-replicate", ALL_GATHER): CallTotals(0, low / zero.zero3_size * FP32 * (groups - 1) / groups)}
            )
    elif options.use_distributed_optimizer:
        found.append(
            {
                ("dp_cp", REDUCE_SCATTER): CallTotals(0, share * (low + exact) * FP32),
                ("dp_cp", ALL_GATHER): CallTotals(0, share * (low * itemsize + exact * FP32)),
            }
        )
    else:
        found.append({("dp_cp", ALL_REDUCE): CallTotals(0, 2 * share * (low + exact) * FP32)})
    if layout.tp_size > 1:
        copies = _copies(block, layout, zero)
        found.append({("tp", ALL_REDUCE): CallTotals(0, 2 * (layout.tp_size - 1) / layout.tp_size * copies)})
    world = layout.world_size
    names = len(block) * layout.pp_size  # every rank adds up the squares of every parameter of the model
    found.append({("world", ALL_REDUCE): CallTotals(0, 2 * (world - 1) / world * names * FP32)})
    return {key: sent for key, sent in _sum(found).items() if sent.bytes}


def _copies(block: Shapes, layout: Layout, zero: ZeroConfig | None) -> float:
    """Bytes of a block's gradients that tensor-parallel ranks add up; not modelled with the distributed optimizer."""
    sizes = {
        name: math.prod(shape) for name, shape in block.items() if gradient_is_partial(name, layout.sequence_parallel)
    }
    kept = {name: size if zero is None or keep_fp32(name) else size / zero.zero3_size for name, size in sizes.items()}
    return sum(kept.values()) * FP32


def _elements(block: Shapes, layout: Layout) -> tuple[int, int]:
    """A tensor-parallel rank's parameters of one block: those in the training dtype, and those that stay fp32."""
    sizes = {name: math.prod(place(name, shape, 0, layout.tp_size).shape) for name, shape in block.items()}
    exact = sum(size for name, size in sizes.items() if keep_fp32(name))
    return sum(sizes.values()) - exact, exact


def _shapes_below(wan: WanConfig, prefix: str) -> Shapes:
    return {name: shape for name, shape in whole_shapes(wan).items() if name.startswith(prefix)}


def _sum(parts: list[Traffic]) -> Traffic:
    found: Traffic = {}
    for part in parts:
        for key, sent in part.items():
            before = found.get(key, CallTotals(0, 0.0))
            found[key] = CallTotals(before.calls + sent.calls, before.bytes + sent.bytes)
    return found
