"""Balance of samples of mixed sizes over replicas: dealt in turn, dealt by cost, and packed into sequences.

    python benchmarks/data_balance.py [--replicas 64] [--micro-batches 16] [--steps 200] [--stages 4] [--pack 151200]

Samples are drawn as of a public video set: 20 % images, else clips of 17 to 129 frames (4k + 1, uniform), at 240p,
368p, 480p or 720p (uniform). The cost is the cost model of Wan2.1 1.3B or 14B (`mm.data.balance.cost_of_model`). A step
takes as long as its dearest replica. With a pipeline of equally long stages "model" counts the dearest micro-batch once
for each stage (`mm.data.balance.replica_time`), and "simulated" follows every pass of every stage under 1F1B, waiting
included. "bound" is the simulated step over what no dealing of its samples can go below (`least_time`: the mean of the
costs, or the dearest clip's way through all stages and back). Packs have a token budget (default: twice the longest
sample of the mixture); filled is the share of the budgets that the samples' tokens are. Throughput is predicted from
costs, not measured; what fewer, longer calls of kernels gain is not in it.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from mm.config.model import WanConfig
from mm.data.balance import SequenceCost, cost_of_model, deal, least_time, replica_time
from mm.data.packing import pack_step

MODELS = {
    "1.3B": WanConfig(hidden_size=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "14B": WanConfig(hidden_size=5120, ffn_dim=13824, num_heads=40, num_layers=40),
}
SIZES = [(240, 416), (368, 640), (480, 832), (720, 1280)]


def num_tokens(rng: random.Random) -> int:
    """Tokens of a drawn sample."""
    height, width = rng.choice(SIZES)
    frames = 1 if rng.random() < 0.2 else rng.randrange(17, 130, 4)
    return (height // 16) * (width // 16) * ((frames - 1) // 4 + 1)


def pipeline_time(costs: Sequence[float], stages: int) -> float:
    """Time of one replica's step under 1F1B, its stages equally long; backward takes twice as long as forward.

    Every stage runs its forwards and backwards in 1F1B's order, each as soon as what it needs is there.
    """
    count = len(costs)
    done: dict[tuple[str, int, int], float] = {}  # (pass, stage, micro-batch): when it ends
    orders = []
    for stage in range(stages):
        warm_up = min(stages - 1 - stage, count)
        order = [("f", m) for m in range(warm_up)]
        for m in range(count - warm_up):
            order += [("f", warm_up + m), ("b", m)]
        orders.append(order + [("b", m) for m in range(count - warm_up, count)])
    clock, places = [0.0] * stages, [0] * stages
    while any(place < len(order) for place, order in zip(places, orders, strict=True)):
        for stage in range(stages):
            while places[stage] < len(orders[stage]):
                which, m = orders[stage][places[stage]]
                needs = ("f", stage - 1, m) if which == "f" else ("b", stage + 1, m)
                first = stage == 0 if which == "f" else stage == stages - 1
                if not first and needs not in done:
                    break
                begin = max(clock[stage], 0.0 if first else done[needs])
                clock[stage] = begin + costs[m] / stages * (1 if which == "f" else 2)
                done[which, stage, m] = clock[stage]
                places[stage] += 1
    return max(clock) / 3


def dealt(
    tokens: Sequence[int], cost: SequenceCost, replicas: int, stages: int, budget: int
) -> dict[str, list[list[float]]]:
    """Costs of the micro-batches of each replica, by the way of dealing."""
    costs = [cost(number) for number in tokens]
    packs = pack_step(tokens, budget, cost, num_replicas=replicas, num_stages=stages)
    return {
        "in turn": [costs[replica::replicas] for replica in range(replicas)],
        "by cost": [[costs[number] for number in numbers] for numbers in deal(costs, replicas, stages)],
        "packed": [[sum(costs[number] for number in pack) for pack in of_replica] for of_replica in packs],
    }


def main() -> None:
    """Print the dearest replica over the mean and over the bound, three ways of dealing, mean and worst of steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=64)
    parser.add_argument("--micro-batches", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--pack", type=int, default=2 * 33 * 45 * 80)
    args = parser.parse_args()
    replicas, count = args.replicas, args.replicas * args.micro_batches
    print(f"{replicas} replicas x {args.micro_batches} samples, {args.steps} steps; time of the dearest replica / mean")
    print(f"packed: sequences of at most {args.pack:,} tokens")
    columns = f"{'cost':6} {'stages':>6} {'dealt':8} {'model':>7} {'simul.':>7} {'worst':>7} {'bound':>7} {'worst':>7} "
    columns += f"{'passes':>6} {'filled':>7}"
    print(f"{columns}  throughput, predicted")
    for name, model in MODELS.items():
        cost = cost_of_model(model)
        for stages in (1, args.stages):
            rng = random.Random(1)  # noqa: S311
            dearest: defaultdict[str, list[float]] = defaultdict(list)
            ratios, by_model, by_bound = (defaultdict[str, list[float]](list) for _ in range(3))
            passes: defaultdict[str, list[int]] = defaultdict(list)
            filled = []
            for _ in range(args.steps):
                tokens = [num_tokens(rng) for _ in range(count)]
                for way, costs in dealt(tokens, cost, replicas, stages, args.pack).items():
                    times = [pipeline_time(of_replica, stages) for of_replica in costs]
                    dearest[way].append(max(times))
                    counted = [replica_time(of_replica, stages) for of_replica in costs]
                    by_model[way].append(max(counted) * replicas / sum(counted))
                    least = least_time([cost(number) for number in tokens], replicas, stages)
                    by_bound[way].append(max(times) * stages / least)
                    ratios[way].append(max(times) * replicas / sum(times))
                    passes[way].append(len(costs[0]))
                filled.append(sum(tokens) / (passes["packed"][-1] * replicas * args.pack))
            for way, values in ratios.items():
                gain = sum(dearest["in turn"]) / sum(dearest[way])
                share = f"{fmean(filled):7.1%}" if way == "packed" else " " * 7
                numbers = f"{fmean(by_model[way]):7.4f} {fmean(values):7.4f} {max(values):7.4f} "
                numbers += f"{fmean(by_bound[way]):7.4f} {max(by_bound[way]):7.4f} {fmean(passes[way]):6.1f} {share}"
                print(f"{name:6} {stages:6} {way:8} {numbers}  x {gain:.2f}")


if __name__ == "__main__":
    main()
