"""How often a step computes what: `python benchmarks/recompute_work.py`, on the CPU.

Forward and backward of a few blocks, counted at torch's dispatcher: forwards of self and cross attention and of the
linears, and backwards of attention, for each block. A mode computes as much again as it must, and nothing more.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402  (the path above)
from modes import MODES, Mode  # noqa: E402
from results import Result, Target, arguments, publish  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from mm.activation.offload import Offloader  # noqa: E402
from mm.activation.recompute import block_runner  # noqa: E402
from mm.config.model import WanConfig  # noqa: E402
from mm.device.queues import HostQueues  # noqa: E402
from mm.wan.inputs import ModelInputs  # noqa: E402
from mm.wan.layers import ModuleFactories  # noqa: E402
from mm.wan.model import Conditions, WanModel  # noqa: E402
from mm.wan.rope import grid_positions  # noqa: E402

WAN = WanConfig(text_dim=16, hidden_size=48, ffn_dim=96, num_heads=2, num_layers=4)
GRID, TOKENS, TEXT = (2, 4, 4), 32, 8
LINEARS = 10  # of a block: q, k, v, o twice, and two of the feed-forward
SELF, CROSS, LINEAR, BACKWARD = "self attention", "cross attention", "linears", "attention backward"
ATEN = torch.ops.aten
FORWARD = ATEN._scaled_dot_product_flash_attention_for_cpu
BACKWARD_OF_FORWARD = ATEN._scaled_dot_product_flash_attention_for_cpu_backward


class CountWork(TorchDispatchMode):
    """Counts calls; a linear's forward is the only product that adds a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet is FORWARD:
            self.counts[SELF if args[1].shape[2] == TOKENS else CROSS] += 1
        elif packet is BACKWARD_OF_FORWARD:
            self.counts[BACKWARD] += 1
        elif packet is ATEN.addmm:
            self.counts[LINEAR] += 1
        return func(*args, **(kwargs or {}))


def count(mode: Mode) -> dict[str, float]:
    """Runs for each block of one forward and backward; of linears, for each of them."""
    offloader = None
    if mode.recompute is not None and mode.recompute.offload:
        offloader = Offloader(HostQueues(), WAN.num_layers, 64 * TOKENS * WAN.hidden_size)
    model = WanModel(WAN, ModuleFactories(run_blocks=block_runner(mode.recompute, offloader)))
    model.init_weights(seed=0)
    width = WAN.hidden_size
    conditions = Conditions(
        torch.randn(1, width), torch.randn(1, 6, width), torch.randn(1, TEXT, width, requires_grad=True)
    )
    hidden = torch.randn(1, TOKENS, width, requires_grad=True)
    inputs = ModelInputs(torch.zeros(1, WAN.in_dim, *GRID), torch.zeros(1), torch.zeros(1, TEXT, WAN.text_dim))
    with CountWork() as counted:
        (found,) = model.run_blocks((hidden,), conditions, grid_positions(GRID, WAN.head_dim), inputs)
        found.sum().backward()
    counts = {name: counted.counts[name] / WAN.num_layers for name in (SELF, CROSS, LINEAR, BACKWARD)}
    return {**counts, LINEAR: counts[LINEAR] / LINEARS, BACKWARD: counts[BACKWARD] / 2}


def main() -> None:
    """Count, print."""
    options = arguments(__doc__)
    shapes = {"D": WAN.hidden_size, "layers": WAN.num_layers, "s": TOKENS, "text": TEXT}
    result = Result("recompute_work", "CPU", shapes)
    for name, mode in MODES.items():
        found = count(mode)
        result.rows.append({"mode": name, **found, "expected": f"{mode.attention_runs}, then {mode.other_runs}"})
        result.targets += [
            Target(f"{name}: {SELF}", found[SELF], mode.attention_runs),
            Target(f"{name}: {CROSS}", found[CROSS], mode.other_runs),
            Target(f"{name}: {LINEAR}", found[LINEAR], mode.other_runs),
        ]
    publish([result], options.json)


if __name__ == "__main__":
    main()
