"""`mm doctor`: what can be said of a training run before it starts; `mm doctor --dry-run`: what its layout costs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field
from tabulate import tabulate

from mm.cli import doctor_compare, doctor_costs, doctor_data, doctor_parity, doctor_ready
from mm.cli.entry import run
from mm.cli.imports import large_imports
from mm.cli.run_file import run_file
from mm.config.flags import Flags, parse_flags
from mm.config.layout import Layout, layout_of
from mm.config.model import WanConfig
from mm.config.place import process_place
from mm.config.recompute import recompute_of
from mm.config.rules.live import live_extractions
from mm.config.rules.training import check_training
from mm.config.run.file import load_run, of_kind
from mm.config.run.training import TrainingRun
from mm.config.units import format_bytes, in_gib
from mm.config.unread import if_read, read_or
from mm.dialects.mindspeed.reading import Reading
from mm.dialects.mindspeed.train_flags import TrainFlags
from mm.dialects.mindspeed.training import read_files, read_flags, translate
from mm.errors import ConfigError, Problem
from mm.stopping import StopRequest

if TYPE_CHECKING:
    from mm.doctor.dry_run import Report

_UNCOMPILED = "all is shown for uncompiled blocks: fake tensors run no compiled code"


class DoctorOptions(Flags):
    """Questions about a training run."""

    groups: ClassVar[Mapping[str, str]] = {"dry_run": "dry run"}

    dry_run: bool = Field(
        False, description="build one rank and take its step without devices: memory, traffic, bubble"
    )
    world_size: int | None = Field(
        None, ge=1, description="processes of the job; default: those that the launcher has started"
    )
    rank: int = Field(0, ge=0, description="the process to look at")
    latent_size: list[int] = Field(
        [], description="F H W of a sample's latents; default: the largest clip of feature_data.json"
    )
    json_output: bool = Field(False, description="print one JSON object, in bytes")


class DoctorFlags(DoctorOptions, TrainFlags):
    """Say whether a training run will work, or with --dry-run what it costs. Takes every flag of mm train.

    `mm doctor run.yaml` looks at the run of a file, with the flags of the dry run alone. `mm doctor data` reads a whole
    data set, `mm doctor parity` compares the layout with one device, `mm doctor compare A B` finds where two runs part,
    `mm doctor costs RUN` fits costs of tokens to its step times.
    """


def main(argv: Sequence[str]) -> None:
    """Check the configuration as `mm train` does, then all that can be known of the run, or what one rank costs.

    Raises:
        ConfigError: what `mm train` raises before it starts; CFG-047 for a rank or a size that does not exist; what
            `mm.cli.doctor_ready.check` raises.
    """
    others = {
        "compare": doctor_compare.main,
        "costs": doctor_costs.main,
        "data": doctor_data.main,
        "parity": doctor_parity.main,
    }
    with StopRequest(saves=False, kept="Nothing was decided."):
        if argv and argv[0] in others:
            others[argv[0]](argv[1:])
        else:
            _check(argv)


def _check(argv: Sequence[str]) -> None:
    where = process_place()
    run, flags = _asked(argv)
    sections = run.on(read_or(flags.world_size, None) or where.world_size)
    own = read_or(if_read(lambda: _problems(flags, sections.wan, sections.world_size)), [])
    check_training(sections.model_copy(update={"problems": (*own, *sections.problems)}))
    layout = layout_of(sections)
    if not flags.dry_run:
        doctor_ready.check(sections, layout, where, argv, as_json=flags.json_output)
        return
    frames, height, width = flags.latent_size or _largest_clip(sections)

    with large_imports():
        from mm.doctor.dry_run import DryRunJob, dry_run
        from mm.lora.plan import plan_of
        from mm.train.run import data_parallel_options, training_dtype

    lora = plan_of(sections.adapters, sections.wan, sections.origins["adapters.targets"].name)
    packed, micro_batches = _packs(sections, layout, (frames, height, width))
    job = DryRunJob(
        wan=sections.wan,
        layout=layout,
        options=data_parallel_options(sections),
        zero=sections.parallel.layerzero,
        dtype=training_dtype(sections),
        latent=(frames, height, width),
        micro_batch_size=sections.data.micro_batch_size,
        micro_batches=micro_batches,
        recompute=recompute_of(sections.memory),
        extension=None if lora is None else lora.extension(),
        ema_decay=sections.optimizer.ema_decay,
        async_save=sections.checkpoint.in_background,
        save_optimizer=sections.checkpoint.save_optimizer,
        optimizer=sections.optimizer.name,
        packed=packed,
        encoder_bytes=_encoder_bytes(sections),
        idle_expert=None if sections.experts is None else "host" if sections.experts.offload else "device",
    )
    report = dry_run(job, flags.rank)
    notes = {"compile": _UNCOMPILED} if sections.memory.compile_blocks else {}
    print(_as_json(layout, report, notes) if flags.json_output else _as_text(layout, report, notes))


def _asked(argv: Sequence[str]) -> tuple[TrainingRun, DoctorOptions]:
    """The run that a command line, or a file on it, describes, and what is asked about it."""
    given = run_file(argv, DoctorOptions)
    if given is not None:
        file, words = given
        return of_kind(load_run(file), TrainingRun), parse_flags(DoctorOptions, words, program=f"mm doctor {file}")
    reading = Reading()
    flags = read_flags(DoctorFlags, argv, "mm doctor", reading)
    return translate(flags, read_files(flags, reading)), flags


def _encoder_bytes(sections: TrainingRun) -> int:
    """Bytes of the encoders of a run that makes features; stores of the same encoders share them."""
    if sections.live is None:
        return 0
    from mm.extract.live.encoder_bytes import encoder_bytes

    named = {(run.task.name, run.encoders.model_dump_json()): run for run in live_extractions(sections)}
    return sum(map(encoder_bytes, named.values()))


def _largest_clip(sections: TrainingRun) -> tuple[int, int, int]:
    """Latents of the clip that the features have; CFG-047 where the run does not say one size for all."""
    clip = sections.data.features.clip
    size = None if clip is None else clip.latent_size(sections.wan.task.latent_pixels)
    if size is None:
        found = f"{sections.word('data.features.clip')} says no size that all samples have."
        raise ConfigError("CFG-047", found, "Give the latents of one as --latent-size F H W, such as 21 60 104.")
    return size


def _packs(sections: TrainingRun, layout: Layout, latent: tuple[int, int, int]) -> tuple[int | None, int]:
    """Samples of these latents in a packed sequence, or None, and micro-batches of one replica in a step.

    Raises:
        ConfigError: CFG-207 for a sample that is longer than a sequence.
    """
    budget, samples = sections.data.pack_tokens, sections.micro_batches_of_step(layout.dp_size)
    if budget is None:
        return None, samples
    tokens, word = sections.wan.num_tokens(latent), sections.origins["data.pack_tokens"]
    if tokens > budget:
        found = f"A sample of these latents has {tokens:,} tokens, more than {word.with_value(budget)}."
        raise ConfigError("CFG-207", found, f"Raise it to at least {tokens}, or give a smaller --latent-size.")
    packed, multiple = min(samples, budget // tokens), layout.micro_batches_come_in
    return packed, math.ceil(samples / packed / multiple) * multiple


def _problems(flags: DoctorOptions, wan: WanConfig, world_size: int) -> list[Problem]:
    """CFG-047: what the doctor alone is asked for."""
    problems = []
    if flags.rank >= world_size:
        found = f"--rank {flags.rank} is not one of --world-size {world_size}."
        problems.append(Problem("CFG-047", found, f"Use 0 to {world_size - 1}, or give the job's size."))
    size, patch = flags.latent_size, wan.patch_size
    if size and (len(size) != 3 or any(number < 1 or number % step for number, step in zip(size, patch, strict=True))):
        found = f"--latent-size is {' '.join(map(str, size))}, not F H W in whole patches of {patch}."
        problems.append(Problem("CFG-047", found, "An 81x480x832 clip has --latent-size 21 60 104."))
    return problems


def _as_json(layout: Layout, report: Report, notes: dict[str, str]) -> str:
    values: dict[str, Any] = {"layout": layout.name(), "world_size": layout.world_size, **notes, **asdict(report)}
    values["peak_bytes"] = report.peak_bytes
    values["traffic"] = [
        {"axis": axis, "operation": operation, "calls": sent.calls, "bytes": sent.bytes}
        for (axis, operation), sent in report.traffic.items()
    ]
    return json.dumps(values, indent=2)


def _as_text(layout: Layout, report: Report, notes: dict[str, str]) -> str:
    padding = report.rank_tokens - report.real_tokens
    tokens = f"{report.tokens:,} a sample" + (f", {report.samples} in a sequence" if report.samples > 1 else "")
    trained = f", {report.trained:,} of them trained" if report.trained < report.parameters else ""
    facts = [
        ("layout", f"{layout.name()} on {layout.world_size:,} processes"),
        (f"rank {report.rank}", f"TP {report.tp_rank}, CP {report.cp_rank}, DP {report.dp_rank}, PP {report.pp_rank}"),
        ("tokens", f"{tokens}, {report.rank_tokens:,} on this rank, {padding:,} of them padding"),
        ("parameters", f"{report.parameters:,} kept by this rank{trained}"),
        ("bubble", f"{report.bubble:.1%} of the step, if stages are even"),
        ("host memory", _host_memory(report)),
        ("groups", _groups(report)),
        *notes.items(),
    ]
    kinds = sorted(report.peak.items(), key=lambda item: -item[1])
    memory = [(kind, in_gib(size)) for kind, size in [*kinds, ("together", report.peak_bytes)]]
    traffic = [
        (axis, operation, f"{sent.calls:,}", in_gib(sent.bytes, 3))
        for (axis, operation), sent in sorted(report.traffic.items(), key=lambda item: -item[1].bytes)
    ]
    align = ("left", "right")
    return "\n\n".join(
        [
            tabulate(facts, tablefmt="plain"),
            tabulate(memory, headers=["memory at the peak (predicted)", "GiB"], colalign=align, disable_numparse=True),
            tabulate(
                traffic,
                headers=["sent in a step over", "by", "calls", "GiB"],
                colalign=("left", "left", "right", "right"),
                disable_numparse=True,
            )
            if traffic
            else "nothing is sent",
        ]
    )


def _host_memory(report: Report) -> str:
    parts = {
        "offload": report.host_bytes,
        "background saves": report.save_bytes,
        "experts that wait": report.expert_bytes,
    }
    used = [f"{format_bytes(size)} for {what}" for what, size in parts.items() if size]
    return f"page-locked: {', '.join(used)}" if used else "none"


def _groups(report: Report) -> str:
    listed = ", ".join(f"{name} {size}" for name, size in report.groups)
    return f"{len(report.groups)} beside the job's own: {listed}" if listed else "the job's own"


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
