"""`mm generate`, or `torchrun -m mm.cli.generate` for several processes: makes a clip for each prompt of a file."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from mm.cli.entry import run
from mm.config.flags import parse_flags, words_of_process
from mm.config.inference_retired import RETIRED_GENERATE_FLAGS
from mm.config.output import require_writable_folder
from mm.config.place import process_place
from mm.dialects.mindspeed.accepted import Note, said
from mm.dialects.mindspeed.accepted_flags import ACCEPTED_GENERATE_FLAGS, take_accepted
from mm.dialects.mindspeed.generate import GenerateFlags, load_generation
from mm.generate.rows import require_inputs
from mm.stopping import StopRequest


def main(argv: Sequence[str]) -> None:
    """Run this process's part of the command with the words after its name.

    Raises:
        ConfigError: what reading the configuration raises.
        MMError: what `mm.generate.run.generate_clips` raises.
    """
    words, accepted = take_accepted(argv, ACCEPTED_GENERATE_FLAGS)
    flags = parse_flags(GenerateFlags, words, program="mm generate", retired=RETIRED_GENERATE_FLAGS)
    with StopRequest(saves=False, kept="The clips written so far stay."):
        _generate(flags, accepted)


def _generate(flags: GenerateFlags, accepted: Sequence[Note]) -> None:
    where = process_place()
    generation = load_generation(flags, where.world_size)
    if where.rank == 0:
        for line in (*([said("flags", accepted)] if accepted else []), *generation.notes):
            logging.getLogger(__name__).info("%s", line)
    require_inputs(generation.config)
    require_writable_folder(generation.config.save_path, "--save-path")

    from mm.checkpoint.comm import ProcessGroupComm  # after the configuration is known to be good: torch takes seconds
    from mm.device.backend import select
    from mm.generate.render import Processes
    from mm.generate.run import generate_clips
    from mm.ops.elementwise.dispatch import choice_of
    from mm.parallel.mesh import build_mesh
    from mm.supervise.job import Job

    backend = select(flags.device, where.local_rank, where.world_size)
    minutes = flags.distributed_timeout_minutes
    configuration = {
        "elementwise operators": choice_of(backend.device).name,
        "flags": flags.model_dump(mode="json"),
        "model": generation.config.model_dump(mode="json"),
    }
    with (
        Job(where, backend.collective, backend.device, minutes, configuration),
        build_mesh(generation.layout, minutes, backend.device.type) as mesh,
    ):
        generate_clips(
            generation,
            Processes(mesh, backend, ProcessGroupComm(device=backend.device)),
            micro_batch_size=flags.micro_batch_size,
            overwrite=flags.overwrite,
            show_progress=not flags.no_progress_bar,
        )


if __name__ == "__main__":
    sys.exit(run(main, words_of_process()))
