"""What a device holds when the 14B models of the family are trained whole, and what it sends.

`python benchmarks/family_memory.py` prints the markdown table of docs/memory.md: dry runs of rank 0 (`mm doctor
--dry-run` tells the same of a run), predicted.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tabulate import tabulate

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from mm.config.layerzero import ZeroConfig  # noqa: E402  (the path above)
from mm.config.layout import Layout, even_stages  # noqa: E402
from mm.config.model import WAN_14B, WAN_VACE_14B, WanConfig, of_task  # noqa: E402
from mm.config.recompute import Recompute  # noqa: E402
from mm.config.tasks.registry import TASKS  # noqa: E402
from mm.doctor.dry_run import DryRunJob, Report, dry_run  # noqa: E402
from mm.parallel.apply import DataParallelOptions  # noqa: E402

HEADERS = [
    "model",
    "parameters",
    "clip",
    "devices",
    "layout",
    "tokens of a rank",
    "a rank's peak, GiB",
    "on the host, GiB",
    "sent in a step, GiB",
]
GIB = 2**30
CLIPS = {(21, 60, 104): "81x480x832", (21, 90, 160): "81x720x1280"}


@dataclass(frozen=True)
class Run:
    """A model, a clip and a layout; of two experts with where the one is that a step does not train."""

    task: str
    latent: tuple[int, int, int]
    layout: Layout
    distributed_optimizer: bool = False
    idle_expert: Literal["device", "host"] | None = None

    @property
    def title(self) -> str:
        """Name of the model, with where the other one of two experts is."""
        if self.idle_expert is None:
            return f"{self.wan.task.title} 14B"
        task = {"t2v": "T2V", "wan22_i2v": "I2V"}[self.task]
        return f"Wan2.2 {task}-A14B, both experts, the idle one on the {self.idle_expert}"

    @property
    def wan(self) -> WanConfig:
        """The model of 14B."""
        return WAN_VACE_14B if self.task == WAN_VACE_14B.model_type else of_task(WAN_14B, TASKS[self.task])


def zero(devices: int, group: int, cp: int = 1) -> Layout:
    """Layer-zero over groups, with clips shared by Ulysses ranks."""
    return Layout(devices, zero3_size=group, cp_size=cp, ulysses_size=cp)


def pipeline(devices: int, tp: int, pp: int, cp: int = 1) -> Layout:
    """Tensor and sequence parallelism inside a pipeline."""
    stages = even_stages(40, pp)
    return Layout(devices, tp_size=tp, sequence_parallel=tp > 1, pp_size=pp, cp_size=cp, ulysses_size=cp, stages=stages)


RUNS = [
    Run("fun_control_ref", (21, 60, 104), zero(8, 8)),
    Run("fun_control_ref", (21, 90, 160), zero(8, 8, cp=2)),
    Run("fun_camera", (21, 60, 104), zero(8, 8)),
    Run("vace", (21, 60, 104), zero(8, 8)),
    Run("vace", (21, 60, 104), zero(16, 16)),
    Run("vace", (21, 90, 160), zero(16, 16, cp=2)),
    Run("vace", (21, 60, 104), pipeline(16, tp=4, pp=4), distributed_optimizer=True),
    Run("t2v", (21, 60, 104), zero(16, 16), idle_expert="device"),
    Run("t2v", (21, 60, 104), zero(16, 16), idle_expert="host"),
    Run("t2v", (21, 90, 160), zero(16, 16, cp=2), idle_expert="device"),
    Run("t2v", (21, 60, 104), pipeline(16, tp=4, pp=4), distributed_optimizer=True, idle_expert="device"),
    Run("t2v", (21, 60, 104), zero(8, 8), idle_expert="host"),
    Run("wan22_i2v", (21, 60, 104), zero(16, 16), idle_expert="device"),
]


def predict(run: Run) -> Report:
    """Rank 0 of the run, with full recomputation in bf16."""
    size = run.layout.zero3_size
    options = DataParallelOptions(use_distributed_optimizer=run.distributed_optimizer)
    zero_config = None if size is None else ZeroConfig(zero3_size=size)
    micro_batches = run.layout.pp_size
    job = DryRunJob(
        run.wan, run.layout, options, zero_config, torch.bfloat16, run.latent, 1, micro_batches, Recompute(),
        idle_expert=run.idle_expert,
    )  # fmt: skip
    return dry_run(job, 0)


def main() -> None:
    """Predict, print."""
    from math import prod

    from mm.wan.model import whole_shapes

    table = []
    for run in RUNS:
        report = predict(run)
        parameters = sum(map(prod, whole_shapes(run.wan).values()))
        sent = sum(each.bytes for each in report.traffic.values())
        table.append(
            [
                run.title,
                f"{(1 if run.idle_expert is None else 2) * parameters / 1e9:.2f} billion",
                CLIPS[run.latent],
                run.layout.world_size,
                f"`{run.layout.name()}`",
                f"{report.rank_tokens:,}",
                f"{report.peak_bytes / GIB:.1f}",
                f"{report.expert_bytes / GIB:.1f}" if report.expert_bytes else "",
                f"{sent / GIB:.0f}",
            ]
        )
        print(table[-1], file=sys.stderr, flush=True)
    print(tabulate(table, headers=HEADERS, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
