"""`mm migrate shards`: a store of one file a sample, as a store of shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field
from tqdm import tqdm

from mm.config.flags import Flags, parse_flags
from mm.config.output import require_writable_folder


class MigrateShardsFlags(Flags):
    """Write a feature store of one file a sample as a store of shards, which opens at once however large it is.

    Samples, ids, recipe and losses stay the same; the old store stays as it is. A run that was killed goes on where it
    was, and makes only those shards that are not there.
    """

    source: Path = Field(description="feature store, a finished one")
    target: Path = Field(description="store of shards to write")
    shard_megabytes: float = Field(256, ge=0.001, description="features of a shard, in 10^6 bytes")


def main(argv: Sequence[str]) -> None:
    """Repack a store; raises what `mm.data.store.repack.repack` raises."""
    flags = parse_flags(MigrateShardsFlags, argv, program="mm migrate shards")
    require_writable_folder(flags.target, "--target")
    from mm.data.store.repack import repack  # after the flags are known to be good: torch takes a second to import

    with tqdm(desc="migrate", unit="sample", disable=None) as bar:

        def done(count: int, total: int) -> None:
            bar.total = total
            bar.update(count - bar.n)

        manifest = repack(flags.source, flags.target, round(flags.shard_megabytes * 10**6), done)
    print(f"{manifest.samples} samples are in {manifest.shards} shards of {flags.target}")
