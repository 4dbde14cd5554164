"""Split of a model into pipeline stages by MindSpeed-MM: the blocks of each, and their names there.

A split is [VP][PP] numbers of blocks, as in `pipeline_num_layers`: chunk v of pipeline rank p is the virtual stage
v * PP + p of the model. Inside a chunk blocks are counted from 0. The first chunk has everything in front of the blocks
besides, the image embedding too; the last one has the head.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from mm.config.layout import Stages, stage_rows
from mm.errors import CheckpointError, ConfigError

_BLOCK = re.compile(r"blocks\.(0|[1-9][0-9]*)\.(.+)")
_HEAD = "head."


def parse_split(text: str) -> Stages:
    """The value of --pp_vpp_layers, "[7,8,8,7]" or "[[7,8],[7,8]]".

    Raises:
        ConfigError: CFG-108 for anything that is no list of positive numbers, or lists of these of one length.
    """
    try:
        listed = json.loads(text)
    except (ValueError, RecursionError):
        listed = None
    problem = _problem(listed)
    if problem:
        raise ConfigError(
            "CFG-108",
            f"--pp_vpp_layers {text} {problem}.",
            'Give the blocks of each stage, "[7,8,8,7]", or with virtual stages one list for each chunk, '
            '"[[7,8],[7,8]]".',
        )
    return stage_rows(listed)


def require_blocks(stages: Stages, num_layers: int) -> None:
    """Check that the stages hold all blocks of a model.

    Raises:
        CheckpointError: CKPT-040.
    """
    total = sum(chain(*stages))
    if total != num_layers:
        shown = [list(row) for row in stages] if len(stages) > 1 else list(stages[0])
        raise CheckpointError(
            "CKPT-040",
            f"--pp_vpp_layers {shown} adds up to {total} blocks, the model has {num_layers}.",
            f"Give stages that add up to {num_layers}.",
        )


def split_names(names: Iterable[str], stages: Stages) -> list[dict[str, str]]:
    """The parameters of every virtual stage, in order: their name there, and their name in the model.

    Args:
        names: MM names of the whole model. stages: checked by `require_blocks`.
    """
    starts = [0]
    for size in chain(*stages):
        starts.append(starts[-1] + size)
    chunks: list[dict[str, str]] = [{} for _ in starts[1:]]
    for name in names:
        if match := _BLOCK.fullmatch(name):
            block = int(match[1])
            place = next(index for index, end in enumerate(starts[1:]) if block < end)
            chunks[place][f"blocks.{block - starts[place]}.{match[2]}"] = name
        else:
            chunks[-1 if name.startswith(_HEAD) else 0][name] = name
    return chunks


def joined_names(chunks: Sequence[Sequence[str]], where: str, *, adapters: bool = False) -> list[dict[str, str]]:
    """The inverse of `split_names`: for every virtual stage, its names there to their names in the model.

    Args:
        chunks: the names in every virtual stage, in order.
        where: what to call the checkpoint.
        adapters: the names are of adapters of the blocks' linears. There is no head to tell the last stage by, and
            every block has some: of a stage without any nobody knows how many blocks it counts.

    Raises:
        CheckpointError: CKPT-041 when the last stage has no head, CKPT-043 when blocks of a stage are not counted from
            0 without holes, or parameters that belong to the first or the last stage are on another one.
    """
    if len(chunks) == 1:  # nothing was cut; what is missing or left over shows in the comparison with the model
        return [{name: name for name in chunks[0]}]
    if not adapters and not any(name.startswith(_HEAD) for name in chunks[-1]):
        raise CheckpointError(
            "CKPT-041",
            f"{where} has {len(chunks)} pipeline stages, and the last of them has no head: later stages are missing.",
            "Copy the folders mp_rank_* of all pipeline ranks.",
        )
    joined, start = [], 0
    for index, names in enumerate(chunks):
        found = {name: _BLOCK.fullmatch(name) for name in names}
        numbers = sorted({int(match[1]) for match in found.values() if match})
        wrong = [name for name, match in found.items() if not match and index != _home(name, len(chunks))]
        if numbers != list(range(len(numbers))) or wrong or (adapters and not numbers):
            what = f"parameters of other stages, such as {wrong[0]}" if wrong else f"the blocks {numbers}"
            raise CheckpointError(
                "CKPT-043",
                f"{where}: the pipeline stage {index} of {len(chunks)} holds {what}; expected blocks counted from 0, "
                "the embedders on the first stage and the head on the last.",
                "Use a checkpoint that MindSpeed-MM or this program wrote.",
            )
        joined.append(
            {name: f"blocks.{start + int(match[1])}.{match[2]}" if match else name for name, match in found.items()}
        )
        start += len(numbers)
    return joined


def _home(name: str, count: int) -> int:
    """The virtual stage of a parameter outside the blocks."""
    return count - 1 if name.startswith(_HEAD) else 0


def _problem(listed: Any) -> str | None:
    if not isinstance(listed, list) or not listed:
        return "is not a list"
    rows = listed if all(isinstance(row, list) for row in listed) else [listed]
    if not all(type(size) is int and size > 0 for row in rows for size in row) or not all(rows):
        return "does not hold positive whole numbers"
    if len({len(row) for row in rows}) > 1:
        return "has chunks of different numbers of stages"
    if len(rows) > 1 and len(rows[0]) == 1:
        return "has virtual stages on one pipeline rank"
    return None
