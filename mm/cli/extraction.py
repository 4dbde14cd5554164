"""An extraction from its sections to its end: checked, planned, encoded. Its processes share the store alone."""

from __future__ import annotations

import logging

from mm.cli.imports import large_imports
from mm.config.inputs import missing_encoders
from mm.config.output import require_writable_folder
from mm.config.place import ProcessPlace
from mm.config.rules.extraction import check_extraction
from mm.config.run.extraction import ExtractionRun
from mm.errors import DataError, raise_all
from mm.stopping import StopRequest


def extract_features(run: ExtractionRun, where: ProcessPlace) -> None:
    """Do this process's part of an extraction.

    Args:
        run: its sections, not yet checked. where: this process's place in the job.

    Raises:
        ConfigError: what could not be read and every violated rule, all at once; CFG-131 for the folder.
        DataError: DATA-040 and DATA-043 for encoders that are not there, and what `mm.extract.run.extract` raises.
    """
    check_extraction(run)
    raise_all(DataError, missing_encoders(run.encoders))
    require_writable_folder(run.output.path, _comma(run.origins["output.path"].place()))
    if where.rank == 0:
        for note in run.notes:
            logging.getLogger(__name__).info("%s", note)

    with StopRequest(saves=False, kept="The features written so far stay, and are not made again."):
        with large_imports():  # after the files are known to be good: torch takes seconds
            from mm.device.backend import select
            from mm.extract.run import extract

        backend = select(run.extraction.device, where.local_rank, where.world_size)
        extract(run, device=backend.device, rank=where.rank, world_size=where.world_size)


def _comma(place: str) -> str:
    """`save_path in tools.json,`, behind which a path follows."""
    return f"{place}," if " in " in place else place
