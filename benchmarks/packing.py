"""A training step with packed sequences beside the same step one by one: `python benchmarks/packing.py`, on the CPU.

The samples are images and clips of several sizes, few tokens each, as where a data set is mostly images and previews.
Both ways compute the same gradients, which is looked at first; then they take turns, and each round gives a ratio.
Time is the processor's of this process, one thread, which other programs do not enter. It shows what fewer passes over
the blocks save on a CPU, where each operator costs more the shorter its input is; a device's ratio is another one, and
is not predicted by it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import torch

from mm.config.diffusion import DiffusionConfig
from mm.config.layout import Layout
from mm.config.model import WanConfig
from mm.config.place import process_place
from mm.data.balance import cost_of_model
from mm.data.packed import MicroBatch, pack
from mm.data.packing import pack_step
from mm.device.backend import select
from mm.diffusion.flow import FlowMatching
from mm.doctor.parity import global_batch, value_of
from mm.parallel.apply import DataParallelOptions, ParallelModel, apply
from mm.parallel.mesh import build_mesh
from mm.supervise.job import Job
from mm.train.step import SampleCounts, compute_gradients

WAN = WanConfig(text_dim=64, text_len=16, hidden_size=256, ffn_dim=1024, num_heads=4, num_layers=4, freq_dim=64)
SIZES = [(1, 8, 8), (1, 8, 12), (3, 8, 8), (1, 12, 8), (5, 8, 12), (1, 8, 8), (2, 8, 8), (1, 12, 12)]
"""F, H, W of latents in turn: 16 to 120 tokens."""


def gradients(parallel: ParallelModel, batches: Sequence[MicroBatch], samples: int) -> float:
    """One forward and backward of all micro-batches; the sum of the samples' losses."""
    counts = SampleCounts(samples, max(len(batch["sample"]) for batch in batches))
    losses = compute_gradients(parallel, FlowMatching(DiffusionConfig()), batches, 0, counts)
    return float(losses.double().sum())


def main() -> None:
    """Print processor time and passes of both ways, and their ratio: the median of the rounds, the least, the most."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--pack", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    samples = global_batch(WAN, SIZES, args.samples, 0, range(1, WAN.text_len + 1, 3))
    tokens = [sample["latents"].shape[2:].numel() // 4 for sample in samples]
    (packs,) = pack_step(tokens, args.pack, cost_of_model(WAN), num_replicas=1)
    ways: dict[str, list[MicroBatch]] = {
        "one by one": [*samples],
        "packed": [pack([samples[number] for number in sequence]) for sequence in packs],
    }
    backend, seconds = select("cpu"), {way: list[float]() for way in ways}
    with Job(process_place(), "gloo", backend.device, 2), build_mesh(Layout(world_size=1), 2, "cpu") as mesh:
        parallel = apply(WAN, mesh, backend, DataParallelOptions(), torch.float32, value_of)
        alone, packed = (gradients(parallel, batches, args.samples) for batches in ways.values())
        if abs(packed / alone - 1) > 1e-6:
            raise SystemExit(f"the losses are {alone} and {packed}")
        for number in range(args.rounds):
            for way, batches in list(ways.items())[:: 1 if number % 2 else -1]:
                start = time.process_time()
                gradients(parallel, batches, args.samples)
                seconds[way].append(time.process_time() - start)
    ratios = [one / other for one, other in zip(*seconds.values(), strict=True)]
    print(f"{args.samples} samples, {sum(tokens)} tokens; packed: {len(packs)} sequences of at most {args.pack} tokens")
    print(
        f"a step one by one takes {statistics.median(ratios):.2f} x the processor time of the packed one "
        f"({min(ratios):.2f} to {max(ratios):.2f} in {args.rounds} rounds)"
    )


if __name__ == "__main__":
    main()
