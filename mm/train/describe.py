"""The start table: what is about to run, so that a wrong number is seen before hours are spent."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from mm.activation.offload import Offloader
from mm.config.layerzero import ZeroConfig
from mm.config.layout import Layout
from mm.config.recompute import Recompute
from mm.config.run.checkpoint import AdapterSection
from mm.config.run.data import Mixture
from mm.config.run.experts import HIGH, LOW, ExpertsSection
from mm.config.run.parallel import ParallelSection
from mm.config.run.training import TrainingRun
from mm.config.units import format_bytes
from mm.data.dataset import FeatureDataset
from mm.lora.plan import LoRAPlan
from mm.parallel.placement import whole_shapes
from mm.parallel.tokens import TokenShare
from mm.train.trained_parts import TrainedModel, TrainedParts


def start_table(
    sections: TrainingRun,
    layout: Layout,
    dataset: FeatureDataset,
    *,
    global_batch_size: int,
    device: str,
    attention: str,
    recompute: Recompute | None,
    offloader: Offloader | None,
    not_compiled: str | None,
    trained: TrainedModel,
) -> dict[str, str]:
    """Rows of the table by their heading; those of LoRA, of trained parts, of experts and of the average only where
    there are such.

    Args:
        sections, layout, dataset: the run. global_batch_size: samples of a step.
        device: name of the devices and their collective backend.
        attention: the kernel of self attention. recompute: the plan. offloader: of rank 0.
        not_compiled: why blocks are not compiled, empty where it was not asked for; None where they are.
        trained: what is trained of the model.
    """
    wan, zero, adapters = sections.wan, sections.parallel.layerzero, sections.adapters
    precision = sections.model.precision
    average, save = sections.optimizer.ema_decay, sections.origins["checkpoint.save"].name
    budget = sections.data.pack_tokens
    parameters = sum(map(math.prod, whole_shapes(wan).values()))
    samples = sections.micro_batches_of_step(layout.dp_size)
    accumulated = samples if budget is None else _sequences(samples, budget, layout, dataset)
    latents = ", ".join(
        f"{count} of {frames}x{height}x{width}" for (_, frames, height, width), count in dataset.shapes().most_common(4)
    )
    return {
        "model": f"{wan.task.name}, {parameters:,} parameters, {wan.num_layers} layers, width {wan.hidden_size}, "
        f"{wan.num_heads} heads",
        **({} if trained.parts is None else {"trained": _parts(trained.parts)}),
        **({"lora": _lora(trained.lora, adapters, precision, parameters)} if trained.lora and adapters else {}),
        **({} if sections.experts is None else {"experts": _experts(sections.experts)}),
        "precision": _precision(sections),
        "device": f"{layout.world_size} x {device}",
        "layout": f"{layout.name()}: {_degrees(layout)}",
        "rank 0": _groups_of_rank_0(layout),
        "stages": _stages(layout, wan.num_layers),
        "pipeline": _pipeline(layout, accumulated),
        "batch": f"{global_batch_size} = {sections.data.micro_batch_size} a forward x {accumulated} accumulated "
        f"x {layout.dp_size} replicas"
        if budget is None
        else f"{global_batch_size} = {samples} samples x {layout.dp_size} replicas, in about {accumulated} sequences "
        f"of at most {budget:,} tokens on each (predicted)",
        "features": f"{len(dataset)} samples{_draws(dataset)}, latents {latents}",
        **({"mixture": _mixture(sections.data.mixture)} if sections.data.mixture.shares else {}),
        "tokens": _tokens(layout, sorted(dataset.token_counts()), budget),
        "heads": _heads(layout, wan.num_heads),
        "a layer": "; ".join(layer_collectives(layout, zero)) or "no communication",
        "gradients": _gradients(sections.parallel, layout),
        "attention": attention,
        "recompute": _recompute(recompute),
        "offload": _offload(offloader),
        "compile": "every block" if not_compiled is None else f"off: {not_compiled}" if not_compiled else "off",
        **({} if average is None else {"average": f"of the weights, decay {average:g}"}),
        "checkpoints": sections.checkpoint.save or f"none: the trained weights are not kept ({save})",
    }


def _draws(dataset: FeatureDataset) -> str:
    return f" in {dataset.draws} draws" if dataset.draws > 1 else ""


def _mixture(mixture: Mixture) -> str:
    """Shares as they are asked for; stores that none names come as often as their size says."""
    shares = []
    for share in mixture.shares:
        values = share.model_dump(exclude={"folder"}, exclude_defaults=True)
        said = ", ".join(f"{name} {value}" for name, value in values.items())
        shares.append(f"{share.folder} {said or 'by its size'}")
    return "; ".join(shares)


def _sequences(samples: int, budget: int, layout: Layout, dataset: FeatureDataset) -> int:
    """Packed sequences of one replica's samples of a step, if these are as long as the features in the mean."""
    mean = sum(dataset.tokens_of(shape) * count for shape, count in dataset.shapes().items()) / len(dataset)
    multiple = layout.micro_batches_come_in
    return min(samples, math.ceil(samples * mean / budget / multiple) * multiple)


def _lora(plan: LoRAPlan, adapters: AdapterSection, precision: str, parameters: int) -> str:
    base = plan.base_dtype or precision
    return (
        f"r {adapters.rank}, alpha {adapters.alpha:g}, {len(plan.adapted)} of {len(plan.linears)} linears: "
        f"{plan.parameters:,} trainable parameters, {plan.parameters / parameters:.3%} of the model's; linears of the "
        f"base in {base}"
    )


def _parts(parts: TrainedParts) -> str:
    rates = Counter(parts.lr_scales.values())
    slower = "".join(f"; {count} of them at {scale:g} x the learning rate" for scale, count in rates.items())
    return (
        f"{len(parts.shapes)} tensors, {parts.parameters:,} parameters, {parts.parameters / parts.total:.3%} of the "
        f"model's{slower}; the rest is frozen"
    )


def _experts(experts: ExpertsSection) -> str:
    in_a_row = "each step" if experts.steps_in_a_row == 1 else f"each {experts.steps_in_a_row} steps"
    place = "waits on the host" if experts.offload else "stays on the device"
    return f"{HIGH} at noise levels from {experts.boundary:g} on, {LOW} below; one {in_a_row}, the other {place}"


def _precision(sections: TrainingRun) -> str:
    if sections.model.precision == "fp32":
        return "fp32"
    if sections.adapters is not None:
        return "bf16, adapters fp32"
    return "bf16 with fp32 masters" + (" of what is trained" if sections.training.trainable else "")


def layer_collectives(layout: Layout, zero: ZeroConfig | None) -> Iterator[str]:
    """Collectives of one block's forward; its backward has the same the other way round, or more."""
    if layout.tp_size > 1:
        pair = "3 all-gathers, 3 reduce-scatters" if layout.sequence_parallel else "3 all-reduces"
        yield f"TP {layout.tp_size}: {pair} of the hidden state, 4 all-reduces of 4 bytes a token (q, k norms)"
    if layout.ulysses_size > 1:
        yield f"Ulysses {layout.ulysses_size}: 2 all-to-alls (q, k, v packed; output)"
    if layout.ring_size > 1:
        windows = f" in windows of {layout.window_size}" if layout.double_ring else ""
        yield f"ring {layout.ring_size}{windows}: {layout.ring_size - 1} exchanges of k and v"
    if layout.cp_size > 1:
        yield "cross attention: none"
    if zero is not None and zero.zero3_size > 1:
        yield f"layer-zero {zero.zero3_size}: 1 all-gather of the block"


def _degrees(layout: Layout) -> str:
    sequence = " with sequence parallelism" if layout.sequence_parallel else ""
    return f"TP {layout.tp_size}{sequence} x CP {layout.cp_size} x DP {layout.dp_size} x PP {layout.pp_size}"


def _groups_of_rank_0(layout: Layout) -> str:
    """Groups of the first rank's neighbours, which tell what crosses nodes."""
    strides = {
        "TP": (layout.tp_size, 1),
        "Ulysses": (layout.ulysses_size, layout.tp_size),
        "ring": (layout.ring_size, layout.tp_size * layout.ulysses_size),
        "DP": (layout.dp_size, layout.tp_size * layout.cp_size),
        "PP": (layout.pp_size, layout.tp_size * layout.cp_size * layout.dp_size),
    }
    return (
        "; ".join(
            f"{axis} group {_list([stride * index for index in range(size)])}"
            for axis, (size, stride) in strides.items()
            if size > 1
        )
        or "alone"
    )


def _stages(layout: Layout, num_layers: int) -> str:
    if layout.pp_size == 1:
        return f"one, blocks 0-{num_layers - 1}"
    rows = []
    for pp_rank in range(layout.pp_size):
        held = [layout.blocks(pp_rank, vp_rank) for vp_rank in range(layout.vp_size)]
        rows.append(f"{pp_rank}: " + " and ".join(_blocks(blocks) for blocks in held))
    return "blocks of stage " + ", ".join(rows) + "; embedders on the first, head on the last"


def _blocks(blocks: range) -> str:
    return f"{blocks.start}-{blocks.stop - 1}" if len(blocks) > 1 else f"{blocks.start}"


def _pipeline(layout: Layout, num_microbatches: int) -> str:
    if layout.pp_size == 1:
        return "none"
    idle = layout.pp_size - 1
    share = idle / (layout.vp_size * num_microbatches + idle)
    kind = "interleaved 1F1B" if layout.vp_size > 1 else "1F1B"
    return f"{kind}, {num_microbatches} micro-batches: {share:.1%} of the step is bubble if stages are even (predicted)"


def _tokens(layout: Layout, counts: Sequence[int], budget: int | None) -> str:
    share = TokenShare(0, layout.cp_size, 0, layout.tp_size if layout.sequence_parallel else 1)
    spread = f"{counts[0]:,} to {counts[-1]:,}" if len(counts) > 1 else f"{counts[0]:,}"
    if layout.token_parts == 1:
        return f"{spread} a sample"
    if budget is not None:
        return f"{spread} a sample, each of them padded by fewer than {layout.token_parts}"
    widest = share.width(counts[-1])
    padding = max(share.width(count) * layout.token_parts - count for count in counts)
    padded = f"at most {padding} of them padding" if padding else "no padding"
    return f"{spread} a sample, at most {widest:,} a rank, {padded}"


def _heads(layout: Layout, num_heads: int) -> str:
    local = num_heads // layout.tp_size
    inside = f", {local // layout.ulysses_size} in self attention" if layout.ulysses_size > 1 else ""
    return f"{local} a rank{inside}"


def _gradients(parallel: ParallelSection, layout: Layout) -> str:
    ranks = f"{layout.dp_cp_size} ranks (DP x CP)"
    if layout.zero3_size is not None:
        copies = layout.dp_cp_size // layout.zero3_size
        states = "optimizer sharded over all of them" if parallel.distributed_optimizer else "optimizer in each group"
        groups = "one group" if copies == 1 else f"{copies} groups"
        return f"layer-zero: parameters in {groups} of {layout.zero3_size}, over {ranks}; {states}"
    how = "reduce-scatter, optimizer sharded" if parallel.distributed_optimizer else "all-reduce"
    when = "during backward" if parallel.overlap_grad_reduce else "after backward"
    return f"{how} over {ranks}, {when}"


def _recompute(plan: Recompute | None) -> str:
    if plan is None:
        return "nothing"
    full, keep = plan.full_layers, plan.keep_layers
    parts = []
    if full != 0:
        parts.append("all blocks whole" if full is None else f"the first {full} blocks of each stage whole")
    if keep != 0:
        blocks = f"{keep} blocks" if keep else "all blocks"
        parts.append(f"{blocks}{' after them' if full else ''} except self attention ({plan.kept} kept)")
    groups = f", in groups of {plan.group_size}" if plan.group_size > 1 else ""
    return f"{'; '.join(parts)}{groups}"


def _offload(offloader: Offloader | None) -> str:
    if offloader is None:
        return "nothing"
    slots, size = offloader.num_slots, offloader.slot_bytes
    return f"what kept blocks keep, up to {slots} x {format_bytes(size)} of page-locked host memory on rank 0"


def _list(ranks: Sequence[int]) -> str:
    shown = [str(rank) for rank in ranks[:4]] + (["..."] if len(ranks) > 4 else [])
    return ", ".join(shown)
