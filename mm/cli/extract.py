"""`mm extract`, or `torchrun -m mm.cli.extract` for several processes: encode videos and captions to features."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from mm.cli.entry import run
from mm.config.bad_samples import parse_on_bad_sample
from mm.config.extract import (
    RETIRED_EXTRACT_FLAGS,
    ExtractFlags,
    check_extraction,
)
from mm.config.flags import parse_flags, words_of_process
from mm.config.inputs import missing_encoders
from mm.config.output import require_writable_folder
from mm.config.place import process_place
from mm.dialects.mindspeed.accepted import Note, said
from mm.dialects.mindspeed.data_files import load_extract_data
from mm.dialects.mindspeed.model_files import load_extract_model, load_extract_tools
from mm.errors import ConfigError, DataError, Problem, raise_all
from mm.stopping import StopRequest

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    """Run this process's part of the extraction.

    Raises:
        ConfigError: for flags and files, all problems at once.
        DataError: from `mm.extract.run`.
    """
    flags = parse_flags(ExtractFlags, argv, program="mm extract", retired=RETIRED_EXTRACT_FLAGS)
    problems: list[Problem] = []
    notes: dict[str, list[Note]] = {flags.mm_data: [], flags.mm_model: [], flags.mm_tool: []}
    data = _attempt(lambda path: load_extract_data(path, notes[flags.mm_data]), Path(flags.mm_data), problems)
    model = _attempt(lambda path: load_extract_model(path, notes[flags.mm_model]), Path(flags.mm_model), problems)
    tools = _attempt(lambda path: load_extract_tools(path, notes[flags.mm_tool]), Path(flags.mm_tool), problems)
    on_bad_sample = _attempt(parse_on_bad_sample, flags.on_bad_sample, problems)
    raise_all(ConfigError, problems)
    assert data and model and tools and on_bad_sample  # noqa: S101  else there were problems

    check_extraction(data, model, tools)
    raise_all(DataError, missing_encoders(model, data.dataset_param.tokenizer_config.from_pretrained))
    require_writable_folder(tools.sorafeature.save_path, f"save_path in {flags.mm_tool},")
    where = process_place()
    if where.rank == 0:
        for file, found in notes.items():
            if found:
                logger.info("%s", said(file, found))

    with StopRequest(saves=False, kept="The features written so far stay, and are not made again."):
        from mm.device.backend import select  # after the files are known to be good: torch takes seconds to import
        from mm.extract.run import extract
        from mm.supervise.job import Job

        backend = select(flags.device, where.local_rank, where.world_size)
        with Job(where, backend.collective, backend.device, flags.distributed_timeout_minutes) as job:
            extract(
                data,
                model,
                tools,
                seed=flags.seed,
                device=backend.device,
                overwrite=flags.overwrite,
                num_workers=flags.num_workers,
                decode_timeout=flags.decode_timeout,
                on_bad_sample=on_bad_sample,
                rank=job.rank,
                world_size=job.world_size,
                barrier=job.barrier,
            )


LoadedT = TypeVar("LoadedT")
GivenT = TypeVar("GivenT")


def _attempt(load: Callable[[GivenT], LoadedT], given: GivenT, problems: list[Problem]) -> LoadedT | None:
    """Load a file or a value, or keep its problems for later, so that those of the others are shown beside them."""
    try:
        return load(given)
    except ConfigError as error:
        problems.extend(error.problems)
        return None


if __name__ == "__main__":
    sys.exit(run(main, words_of_process()))
