"""What a block keeps for its backward: `python benchmarks/activations.py`, on the CPU.

Bytes for each token and unit of width in bf16, text aside. diffusers: the distinct storages that autograd saves. Ours:
how much more is alive after a forward when there is one more block, and the tokens are twice as many, on fake tensors
with the accounting of the tests; that sees what the modes keep outside autograd, too. "As for diffusers" counts ours as
diffusers' is counted, with the rotary tables, which all blocks share.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "wan")]

from modes import MODES, Mode  # noqa: E402  (the path above)
from results import Result, Target, arguments, publish  # noqa: E402
from test_kept_bytes import SIZES, alive, of_diffusers, ours  # noqa: E402

from mm.config.model import WAN_1_3B, WAN_14B, WanConfig  # noqa: E402

LAYERS = {"1.3B": WAN_1_3B.num_layers, "14B": WAN_14B.num_layers}
TOKENS_480P = 21 * 30 * 52  # 480x832x81
FEW, MANY = 128, 256
NO_MORE_THAN = {"1.3B": 58.0, "14B": 46.0}  # without recomputation


def a_block(mode: Mode, config: WanConfig) -> float:
    """Bytes a token and unit of width that one more block keeps."""

    def kept(layers: int, tokens: int) -> int:
        return int(alive(config, mode.recompute, layers, tokens)[0])

    by_layer = [kept(4, tokens) - kept(3, tokens) for tokens in (FEW, MANY)]
    return (by_layer[1] - by_layer[0]) / ((MANY - FEW) * config.hidden_size)


def row(name: str, figures: dict[str, float]) -> dict[str, Any]:
    """A line of the table; gigabytes are the figures times tokens, width and blocks."""
    line: dict[str, Any] = {"mode": name}
    for size, figure in figures.items():
        line[f"{size}: bytes a token and unit"] = figure
        line[f"{size}: GB, {LAYERS[size]} blocks"] = figure * TOKENS_480P * SIZES[size].hidden_size * LAYERS[size] / 1e9
    return line


def main() -> None:
    """Count, print."""
    options = arguments(__doc__)
    result = Result("activations", "CPU (fake tensors)", {"s of the GB columns": TOKENS_480P, "dtype": "bf16"})
    result.rows.append(row("diffusers", {size: of_diffusers(config) for size, config in SIZES.items()}))
    result.rows.append(row("none, as for diffusers", {size: ours(config) for size, config in SIZES.items()}))
    for name, mode in MODES.items():
        found = {size: a_block(mode, config) for size, config in SIZES.items()}
        result.rows.append(row(name, found))
        for size, config in SIZES.items():
            expected = mode.expected(config.hidden_size, config.num_heads)
            bound = NO_MORE_THAN[size] if expected is None else expected
            result.targets.append(Target(f"{name}, {size}", found[size], bound))
    publish([result], options.json)


if __name__ == "__main__":
    main()
