"""`mm doctor FLAGS`: whether a training run will work, told before it is started, from the same script and flags."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from mm.cli.imports import large_imports
from mm.config.layout import Layout
from mm.config.place import ProcessPlace
from mm.config.rules.live import live_extractions
from mm.config.run.training import TrainingRun
from mm.config.units import format_bytes
from mm.errors import ConfigError, DataError, MMError, Problem, raise_all
from mm.isolated import command_of

if TYPE_CHECKING:
    from mm.config.storage import Location
    from mm.data.open_store import MakingStore
    from mm.doctor.preflight import Finding
    from mm.lora.plan import LoRAPlan

_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def check(
    sections: TrainingRun,
    layout: Layout,
    where: ProcessPlace,
    words: Sequence[str],
    *,
    as_json: bool,
) -> None:
    """Look at everything that can be known, print a table and a verdict; rank 0 prints, every process looks.

    Args:
        sections: checked configuration. layout: of the job.
        where: this process's place in the job; alone where the doctor was not started by the job's launcher.
        words: the command line, for the dry run, which is a process of its own.
        as_json: print one JSON object.

    Raises:
        ConfigError: CFG-127 where the run would fail, with every reason.
    """
    with large_imports():
        from mm.checkpoint.comm import Comm, ProcessGroupComm, SingleProcess
        from mm.data.dataset import open_features
        from mm.device.backend import select
        from mm.doctor import preflight
        from mm.lora.plan import plan_of
        from mm.supervise.job import Job

    logging.getLogger().setLevel(logging.WARNING)
    config, backend = sections.wan, select(sections.training.device, where.local_rank, where.world_size)
    lora = plan_of(sections.adapters, config, sections.origins["adapters.targets"].name)
    trained = (preflight.elements(config) if lora is None else lora.parameters) * (1 + (sections.experts is not None))
    findings = [] if where.rank else preflight.versions(backend)
    findings += preflight.operators(backend) if where.local_rank == 0 else []  # once a node: its compiler
    reports: list[dict[str, Any]] = []
    if where.rank == 0:
        findings += preflight.attempt("memory", lambda: _memory(sections, words, layout, backend, reports))
        findings += preflight.attempt("weights", lambda: preflight.weights(sections))
        findings += preflight.attempt("checkpoints", lambda: preflight.save_folder(sections))
        findings += preflight.attempt("disk", lambda: preflight.disk(sections, trained))
    budget = sections.data.pack_tokens
    one_size = layout.pp_size > 1 and not sections.parallel.variable_sizes and budget is None
    batch = sections.samples_of_step(layout.dp_size)
    if where.local_rank == 0 and sections.live is not None:
        findings += preflight.attempt("features", lambda: preflight.live(live_extractions(sections)))
    elif where.local_rank == 0:  # once a node: its disks, its memory
        findings += preflight.attempt(
            "features",
            lambda: preflight.features(
                open_features(sections.data.features, config), batch, sections.origins, one_size=one_size, budget=budget
            ),
        )
    if where.rank == 0:
        findings += preflight.attempt("resume", lambda: _resumed(sections, layout, lora, findings))
    with ExitStack() as stack:
        comm: Comm = SingleProcess()
        if where.world_size > 1:
            began, minutes = time.monotonic(), sections.supervision.timeout_minutes
            configuration = sections.origins.grouped(sections.values())
            stack.enter_context(Job(where, backend.collective, backend.device, minutes, configuration))
            comm = ProcessGroupComm(device=backend.device)
            reached = preflight.network(comm, time.monotonic() - began)
            findings += reached if where.rank == 0 else []
            drawn = preflight.same_draws(comm.all_gather_object(_draws(sections, batch)))
            findings += drawn if where.rank == 0 else []
        told = [report for part in comm.all_gather_object(reports) for report in part]  # rank 0's, on every node
        kinds = ("host_bytes", "save_bytes", "expert_bytes")
        pinned, saved, experts = (max((report[of] for report in told), default=0) for of in kinds)
        if where.local_rank == 0:
            findings += preflight.host(sections, trained, pinned + experts, saved, where.local_world_size)
        everyone = comm.all_gather_object([asdict(finding) for finding in findings])
    if where.rank == 0:
        _tell(_merged([preflight.Finding(**found) for part in everyone for found in part]), reports, as_json=as_json)


def _resumed(
    sections: TrainingRun, layout: Layout, lora: LoRAPlan | None, findings: Sequence[Finding]
) -> Sequence[Finding]:
    """Compare the run with its checkpoint, unless its features cannot be read, which their own check tells."""
    from mm.data.dataset import open_features
    from mm.doctor.resume import resume

    if any(found.check in ("features", "checkpoints") and found.verdict == "no" for found in findings):
        return []
    made: Mapping[Location, MakingStore] = {}
    if sections.live is not None:
        from mm.extract.live.opening import LiveStores

        try:
            made = LiveStores(live_extractions(sections)).by_folder
        except DataError:  # no run has looked at the rows as they are yet
            return []
    return resume(sections, open_features(sections.data.features, sections.wan, made), layout.dp_size, lora)


def _draws(sections: TrainingRun, samples: int) -> str | None:
    """Draws of this process for the first step; None without features, of which the check of features tells."""
    from mm.data.dataset import open_features
    from mm.data.planning import sampling_plan
    from mm.data.sampler import BatchPlan
    from mm.diffusion.flow import FlowMatching
    from mm.doctor import preflight

    data, seed = sections.data, sections.training.seed
    batches = BatchPlan(samples, data.micro_batch_size)
    if sections.live is not None:  # the run itself looks at the clips, and writes what it finds into their stores
        return None
    try:
        dataset = open_features(data.features, sections.wan)
        plan = sampling_plan(
            dataset,
            batches,
            data.mixture,
            seed,
            shuffle=data.shuffle,
            min_bucket=data.min_bucket,
            num_steps=sections.training.steps,
        )
    except MMError:
        return None
    return preflight.draws(dataset, plan, FlowMatching(sections.objective), seed, batches.groups_of_step)


def _memory(
    sections: TrainingRun, words: Sequence[str], layout: Layout, backend: Any, reports: list[dict[str, Any]]
) -> list[Finding]:
    """The dry run of the first rank, and of the last where a pipeline makes it another one."""
    from mm.doctor import preflight

    reports += [
        _dry_run(words, layout, rank) for rank in sorted({0, layout.world_size - 1 if layout.pp_size > 1 else 0})
    ]
    return preflight.memory([report["peak_bytes"] for report in reports], backend, sections.origins)


def _dry_run(words: Sequence[str], layout: Layout, rank: int) -> dict[str, Any]:
    """`mm doctor --dry-run` in a process of its own: its process groups are not real ones.

    Raises:
        DataError: DATA-088 when it fails for a reason that it did not name.
    """
    asked = ["--dry-run", "--json-output", "--rank", str(rank), "--world-size", str(layout.world_size)]
    variables = {name: value for name, value in os.environ.items() if name not in _LAUNCHER_VARIABLES}
    done = subprocess.run(
        [*command_of("mm.cli.doctor"), *words, *asked],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise DataError("DATA-088", f"The dry run of rank {rank} failed: {last}", "Run it alone: DRY_RUN=1.")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def _merged(findings: Sequence[Finding]) -> list[Finding]:
    """Leave out what several nodes found alike."""
    return list(dict.fromkeys(findings))


def _tell(findings: Sequence[Finding], reports: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    reasons = [found for found in findings if found.verdict == "no"]
    look = sum(found.verdict == "look" for found in findings)
    sent = sum(row["bytes"] for row in reports[0]["traffic"]) if reports else 0
    if as_json:
        values = {"ready": not reasons, "findings": [asdict(found) for found in findings], "dry_runs": list(reports)}
        print(json.dumps(values, indent=2))
    else:
        rows = [
            (found.check, found.verdict, found.found + (f" -> {found.remedy}" if found.remedy else ""))
            for found in findings
        ]
        rows.append(("traffic", "ok", f"{format_bytes(sent)} sent by rank 0 in a step (predicted)"))
        print(tabulate(rows, headers=["check", "", "found"], maxcolwidths=[None, None, 100], tablefmt="simple"))
        verdict = "not ready" if reasons else "ready"
        print(f"\nverdict: {verdict}; {len(reasons)} of {len(rows)} say no, {look} ask for a look")
    raise_all(ConfigError, [Problem("CFG-127", f"{found.check}: {found.found}", found.remedy) for found in reasons])
