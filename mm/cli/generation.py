"""A generation from its sections to its end: checked, its processes joined, its clips written."""

from __future__ import annotations

import logging

from mm.cli.imports import large_imports
from mm.config.output import require_writable_folder
from mm.config.place import ProcessPlace
from mm.config.rules.generation import check_generation
from mm.config.run.generation import GenerationRun
from mm.generate.rows import require_inputs
from mm.stopping import StopRequest


def generate(run: GenerationRun, where: ProcessPlace) -> None:
    """Do this process's part of a generation.

    Args:
        run: its sections, not yet checked. where: this process's place in the job.

    Raises:
        ConfigError: what could not be read and every violated rule, all at once; CFG-131 for the folder.
        MMError: what `mm.generate.rows.require_inputs` and `mm.generate.run.generate_clips` raise.
    """
    with StopRequest(saves=False, kept="The clips written so far stay."):
        _generate(run, where)


def _generate(run: GenerationRun, where: ProcessPlace) -> None:
    check_generation(run)
    if where.rank == 0:
        for note in run.notes:
            logging.getLogger(__name__).info("%s", note)
    require_inputs(run)
    require_writable_folder(run.output.path, run.origins["output.path"].name)

    with large_imports():  # after the configuration is known to be good: torch takes seconds
        from mm.checkpoint.comm import ProcessGroupComm
        from mm.device.backend import select
        from mm.generate.render import Processes
        from mm.generate.run import generate_clips
        from mm.ops.elementwise.dispatch import choice_of
        from mm.parallel.mesh import build_mesh
        from mm.supervise.job import Job

    backend = select(run.generation.device, where.local_rank, where.world_size)
    minutes = run.supervision.timeout_minutes
    configuration = {
        "elementwise operators": choice_of(backend.device).name,
        **run.origins.grouped(run.values()),
    }
    with (
        Job(where, backend.collective, backend.device, minutes, configuration),
        build_mesh(run.layout, minutes, backend.device.type) as mesh,
    ):
        comm = ProcessGroupComm(device=backend.device)
        generate_clips(run, Processes(mesh, backend, comm, where.local_world_size))
