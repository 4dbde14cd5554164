"""`mm migrate`: features that MindSpeed-MM extracted, as a feature store; with a word first, something else."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from mm.cli import migrate_config, migrate_entries, migrate_shards
from mm.cli.entry import run
from mm.config.data import DataSource
from mm.config.flags import Flags, parse_flags
from mm.config.output import require_writable_folder
from mm.config.run.data import Clip

_OTHERS = {"config": migrate_config.main, "entries": migrate_entries.main, "shards": migrate_shards.main}


class MigrateFlags(Flags):
    """Turn a folder of MindSpeed-MM's .pt features into a feature store. The .pt files stay as they are.

    `mm migrate config OLD NEW` rewrites one of its JSON files and lists what was dropped and why; `mm migrate shards`
    writes a store of one file a sample as a store of shards; `mm migrate entries` writes an extraction for each entry
    of SimpleTuner's multidatabackend.json.
    """

    source: Path = Field(description="folder that holds data.jsonl and features/*.pt")
    target: Path = Field(description="feature store to write")
    num_frames: int = Field(ge=1, description="frames that the features were extracted with")
    max_height: int = Field(ge=1, description="height in pixels that they were extracted with")
    max_width: int = Field(ge=1, description="width in pixels that they were extracted with")
    frame_interval: int = Field(1, ge=1, description="frame interval that they were extracted with")


def main(argv: Sequence[str]) -> None:
    """Migrate features; with `config` first a file, and so on; raises what `migrate` raises."""
    if argv and argv[0] in _OTHERS:
        _OTHERS[argv[0]](argv[1:])
        return
    flags = parse_flags(MigrateFlags, argv, program="mm migrate")
    require_writable_folder(flags.target, "--target")
    from mm.data.migrate import migrate  # after the flags are known to be good: torch takes a second to import

    made_with = Clip(
        num_frames=flags.num_frames,
        height=flags.max_height,
        width=flags.max_width,
        frame_interval=flags.frame_interval,
    )
    count = migrate(DataSource(flags.source, flags.source / "data.jsonl"), flags.target, made_with)
    print(f"{count} samples are in {flags.target}; they have no empty prompt, so train with cfg 0")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
