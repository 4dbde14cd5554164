"""`mm generate`: makes a clip for each prompt of a file."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mm.cli.entry import run
from mm.config.flags import parse_flags, words_of_process
from mm.config.inference import GenerateFlags, load_inference
from mm.config.inference_retired import RETIRED_GENERATE_FLAGS
from mm.config.place import place
from mm.errors import ConfigError


def main(argv: Sequence[str]) -> None:
    """Run the command with the words after its name.

    Raises:
        ConfigError: CFG-067 when torchrun started more than one process, and what reading the configuration raises.
        MMError: what `mm.generate.run.generate_clips` raises.
    """
    flags = parse_flags(GenerateFlags, argv, program="mm generate", retired=RETIRED_GENERATE_FLAGS)
    config = load_inference(flags)
    where = place()
    if where.world_size > 1:
        raise ConfigError(
            "CFG-067",
            f"Generation runs in one process in this version, and {where.world_size} were started.",
            "Set NPUS_PER_NODE=1 and NNODES=1; split the prompts over several runs to use more devices.",
        )

    from mm.device.backend import select  # after the configuration is known to be good: torch takes seconds to import
    from mm.generate.run import generate_clips

    backend = select(flags.device, where.local_rank)
    generate_clips(
        config,
        backend.device,
        micro_batch_size=flags.micro_batch_size,
        overwrite=flags.overwrite,
        show_progress=not flags.no_progress_bar,
    )


if __name__ == "__main__":
    sys.exit(run(main, words_of_process()))
