"""What guards a run, beside the same step without it: `python benchmarks/guards.py`, on the CPU, one thread.

The guarded step is that of `mm train`: the watch's thread with its messages to a store, marked phases, losses and
wishes to stop in one message with the gradients' norms, the window of losses that finds spikes, and signals.
A second one has what `--straggler-interval 1` adds: looks at the stack all the time, and a comparison of the ranks at
every step. The bare step computes the same gradients, reads their norm, clips and updates. First both train a model of
their own, and the weights are compared. Then they take turns on one model, each round in an order of its own, and a
round gives the ratio of its turns; the bare step takes a second turn, whose ratio to the first shows what is chance.
Time is the processor's, of all threads of this process, which other programs do not enter. What is too little to be
seen so is timed alone as well, many times in a row, and given as a share of the bare step.

How often the host reads a value of the device in a step is counted, too (tests/train/host_reads.py).
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]  # torch lists neither among its names

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), *(str(ROOT / "tests" / place) for place in (".", "wan", "train"))]

from host_reads import CountHostReads  # noqa: E402  (the path above)
from results import Result, Target, arguments, publish  # noqa: E402
from step_ratio import SHAPES, WAN  # noqa: E402

from mm.config.diffusion import DiffusionConfig  # noqa: E402
from mm.config.layout import Layout  # noqa: E402
from mm.config.place import process_place  # noqa: E402
from mm.data.loader import FeatureBatch  # noqa: E402
from mm.device.backend import select  # noqa: E402
from mm.diffusion.flow import FlowMatching  # noqa: E402
from mm.optim.make import make_optimizer  # noqa: E402
from mm.optim.optimizer import Optimizer  # noqa: E402
from mm.optim.settings import UpdateSettings  # noqa: E402
from mm.optim.step_statistics import StepStatistics  # noqa: E402
from mm.parallel.apply import DataParallelOptions, ParallelModel, apply  # noqa: E402
from mm.parallel.mesh import Mesh, build_mesh  # noqa: E402
from mm.stopping import StopRequest  # noqa: E402
from mm.supervise.job import Job  # noqa: E402
from mm.supervise.limits import Limits  # noqa: E402
from mm.supervise.mailbox import Mailbox  # noqa: E402
from mm.supervise.messages import Messages  # noqa: E402
from mm.supervise.stacks import where_is  # noqa: E402
from mm.supervise.watchdog import ANSWER_S, SAMPLE_S, Watchdog  # noqa: E402
from mm.train.callbacks.stragglers import STEP_PHASES, Stragglers  # noqa: E402
from mm.train.memory_breakdown import Phase  # noqa: E402
from mm.train.numerics import WINDOW, NumericsGuard  # noqa: E402
from mm.train.step import StepResult, compute_gradients, train_step  # noqa: E402
from mm.wan.initial import initial_value  # noqa: E402

SETTINGS = UpdateSettings(
    lr=1e-5, min_lr=0.0, lr_decay_style="constant", lr_warmup_init=0.0, warmup_samples=0, decay_samples=1_000_000,
    weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, clip_grad=1.0, fused=True,
)  # fmt: skip
SEED = 0
MOST_TIME, MOST_READS = 1.01, 1
GUARDED, LOOKED_AT, BARE, AGAIN = "guarded", "guarded, --straggler-interval 1", "bare", "bare, again"


@dataclass
class Trained:
    """A model with its optimizer, and the step that it is at; inputs follow from the step."""

    parallel: ParallelModel
    optimizer: Optimizer
    latent: tuple[int, int, int]
    text_tokens: int
    flow: FlowMatching = field(default_factory=lambda: FlowMatching(DiffusionConfig()))
    step: int = 0

    def batches(self) -> list[FeatureBatch]:
        """The next step's one micro-batch."""
        self.step += 1
        numbers = torch.Generator().manual_seed(0)
        latents = torch.randn(1, WAN.in_dim, *self.latent, generator=numbers)
        text = torch.randn(1, self.text_tokens, WAN.text_dim, generator=numbers)
        return [FeatureBatch(latents=latents, text=text, sample=["random"], draw=[self.step], features={})]


def bare_step(trained: Trained) -> None:
    """Gradients, their norm, clipping, the update; nothing that could notice a failure."""
    compute_gradients(trained.parallel, trained.flow, trained.batches(), SEED)
    trained.optimizer.reduce_gradients()
    norms = torch._foreach_norm([shard.gradient for shard in trained.optimizer.shards])
    trained.optimizer.update(float(torch.linalg.vector_norm(torch.stack(norms))), samples=1)


def step_alone(
    trained: Trained,
    batches: list[FeatureBatch] | None = None,
    during: Callable[[Phase], AbstractContextManager[object]] = nullcontext,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> StepResult:
    """The loop's step without the loop."""
    return train_step(
        trained.parallel, trained.optimizer, trained.flow, batches or trained.batches(), samples=1, seed=SEED,
        during=during, asked_to_stop=asked_to_stop,
    )  # fmt: skip


class Guards:
    """What `mm.train.closed_step` has around its steps."""

    def __init__(self, trained: Trained, store: Store, mesh: Mesh) -> None:
        self._trained, self._mesh, self._store = trained, mesh, store
        run: Any = SimpleNamespace(sections=SimpleNamespace(optimizer=SimpleNamespace(skipped_steps_in_a_row=0)))
        self.numerics = NumericsGuard(run, trained.parallel, trained.optimizer, trained.flow)
        self.stop = StopRequest(saves=True, kept="")
        self._last: tuple[int, StepStatistics, list[FeatureBatch]]
        self.watch = self._new_watch(sampling=False)
        self.stragglers = Stragglers(self.watch, mesh, trained.parallel.backend)

    @contextmanager
    def watching(self, sampling: bool) -> Iterator[None]:
        """The watch's thread is there while this is entered."""
        self.watch = self._new_watch(sampling)
        self.stragglers = Stragglers(self.watch, self._mesh, self._trained.parallel.backend)
        self.stop = StopRequest(saves=True, kept="")
        with self.stop, self.watch:
            self.stop.begin_steps()
            yield

    def step(self, compare_ranks: bool) -> None:
        """A step as the loop takes it."""
        trained, stop = self._trained, self.stop
        step = trained.step + 1
        self.watch.begin_step(step)
        with self.watch.during("waiting for data"):
            batches = trained.batches()
        result = step_alone(trained, batches, self.watch.during, lambda: stop.received is not None)
        self.numerics.accepted(step, result.statistics, batches)
        if compare_ranks:
            self.stragglers.compare(step)
        self._last = step, result.statistics, batches

    def marks(self) -> None:
        """What the loop does around a step so that the watch knows where it is."""
        self.watch.begin_step(self._trained.step)
        for phase in STEP_PHASES:
            with self.watch.during(phase):
                pass

    def parts(self) -> dict[str, Callable[[], object]]:
        """What can be run alone, by name."""
        return {
            "phases are marked": self.marks,
            "the loss is compared with those before": lambda: self.numerics.accepted(*self._last),
            "the ranks are compared": lambda: self.stragglers.compare(0),
        }

    def _new_watch(self, sampling: bool) -> Watchdog:
        # Of two processes, so that the watch tells and reads what it would in a job.
        return Watchdog(
            Mailbox(Messages(self._store, b"secret"), 0, 2), Limits(None, ceiling=1800.0), None, sampling=sampling
        )


def check(models: dict[str, Trained], guards: Guards) -> None:
    """Both take the same steps; ends the program where their weights part."""
    for _ in range(2):
        bare_step(models[BARE])
        with guards.watching(sampling=False):
            guards.step(compare_ranks=False)
    pairs = zip(models[BARE].optimizer.shards, models[GUARDED].optimizer.shards, strict=True)
    worst = max(float((one.master - other.master).abs().max()) for one, other in pairs)
    if not worst < 1e-7:  # the norm is added up in another order
        raise SystemExit(f"weights differ by {worst:.1e}; nothing is timed")


def rounds(turns: dict[str, tuple[Callable[[], None], Callable[[], AbstractContextManager[None]]]],
           count: int, steps: int) -> dict[str, list[float]]:  # fmt: skip
    """Seconds of a step in every round; the first step of a turn does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    order = random.Random(0)  # noqa: S311
    for _ in range(count):
        for name in order.sample(list(turns), len(turns)):
            step, around = turns[name]
            with around():
                step()
                started = time.process_time()
                for _ in range(steps):
                    step()
                seconds[name].append((time.process_time() - started) / steps)
    return seconds


def seconds_of(part: Callable[[], object], calls: int = 300) -> float:
    """Of one call."""
    part()
    started = time.process_time()
    for _ in range(calls):
        part()
    return (time.process_time() - started) / calls


def seconds_of_look(step: Callable[[], None], looks: int = 100) -> float:
    """Of one look at the stack of a thread that trains, in the thread that looks."""
    over, spent = threading.Event(), 0.0

    def train() -> None:
        while not over.is_set():
            step()

    thread = threading.Thread(target=train)
    thread.start()
    for _ in range(looks):
        time.sleep(SAMPLE_S)
        started = time.thread_time()
        where_is(thread.ident or 0)
        spent += time.thread_time() - started
    over.set()
    thread.join()
    return spent / looks


def ratio_row(name: str, seconds: dict[str, list[float]], reads: int) -> dict[str, Any]:
    """A line: the ratio to the bare step of the same round."""
    ratios = [one / other for one, other in zip(seconds[name], seconds[BARE], strict=True)]
    first, middle, third = statistics.quantiles(ratios, n=4)
    return {"step": name, "/ bare": middle, "quartiles": f"{first:.4f} to {third:.4f}",
            "mean": statistics.fmean(ratios), "standard error": statistics.stdev(ratios) / len(ratios) ** 0.5,
            "of medians": statistics.median(seconds[name]) / statistics.median(seconds[BARE]),
            "of least": min(seconds[name]) / min(seconds[BARE]), "host reads": reads}  # fmt: skip


def host_reads(trained: Trained, step: Callable[[], object]) -> list[str]:
    """The reads of one step."""
    with CountHostReads([trained.flow.sigmas, trained.flow.timesteps]) as counted:
        step()
    return list(counted.reads)


def measure(mesh: Mesh, store: Store, options: argparse.Namespace) -> Result:
    """Check, time, count."""
    backend, (latent, text_tokens) = select("cpu"), SHAPES[0]
    models = {}
    for name in (GUARDED, BARE):
        parallel = apply(
            WAN, mesh, backend, DataParallelOptions(), torch.float32, partial(initial_value, seed=SEED)
        )  # fmt: skip
        models[name] = Trained(parallel, make_optimizer(parallel, SETTINGS), latent, text_tokens)
    guards = Guards(models[GUARDED], store, mesh)
    check(models, guards)
    reads = {
        GUARDED: host_reads(models[GUARDED], partial(step_alone, models[GUARDED])),
        BARE: host_reads(models[BARE], partial(bare_step, models[BARE])),
    }
    with guards.watching(sampling=False):
        for _ in range(min(WINDOW, options.fill)):
            guards.step(compare_ranks=False)
    bare_on_the_same = partial(bare_step, models.pop(GUARDED))  # another model's place in memory makes a difference
    models.clear()
    seconds = rounds(
        {
            GUARDED: (partial(guards.step, False), partial(guards.watching, False)),
            LOOKED_AT: (partial(guards.step, True), partial(guards.watching, True)),
            BARE: (bare_on_the_same, nullcontext),
            AGAIN: (bare_on_the_same, nullcontext),
        },
        options.rounds,
        options.steps,
    )
    tokens = latent[0] * latent[1] * latent[2] // 4
    shapes = {"D": WAN.hidden_size, "f": WAN.ffn_dim, "layers": WAN.num_layers, "s": tokens, "text": text_tokens,
              "threads": 1, "rounds": options.rounds, "steps a turn": options.steps}  # fmt: skip
    bare = statistics.median(seconds[BARE])
    alone = {name: seconds_of(part) for name, part in guards.parts().items()}
    alone["looks at the stack"] = seconds_of_look(bare_on_the_same) * bare / SAMPLE_S
    rows = [{"part, timed alone": name, "share of the bare step": spent / bare} for name, spent in alone.items()]
    lines = [
        ratio_row(GUARDED, seconds, len(reads[GUARDED])),
        ratio_row(LOOKED_AT, seconds, len(reads[GUARDED])),
        ratio_row(AGAIN, seconds, len(reads[BARE])),
    ]
    return Result(
        "guards", "CPU", shapes, rows=[*lines, *rows],
        targets=[
            Target("guarded step / bare step", lines[0]["/ bare"], MOST_TIME),
            Target("with --straggler-interval 1 / bare step", lines[1]["/ bare"], MOST_TIME),
            Target("parts timed alone / bare step", sum(alone.values()) / bare, MOST_TIME - 1),
            Target("host reads of a step", float(len(reads[GUARDED])), MOST_READS),
        ],
    )  # fmt: skip


def main() -> None:
    """Measure, print."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--rounds", type=int, default=30)
        parser.add_argument("--steps", type=int, default=2, help="timed steps of a turn")
        parser.add_argument("--fill", type=int, default=32, help="losses in the window before anything is timed")

    options = arguments(__doc__, add)
    torch.set_num_threads(1)
    backend = select("cpu")
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store = TCPStore("127.0.0.1", server.port, timeout=timedelta(seconds=ANSWER_S), wait_for_workers=False)
    layout = Layout(1, stages=((WAN.num_layers,),))
    with Job(process_place(), backend.collective, backend.device, 5), build_mesh(layout, 5, "cpu") as mesh:
        publish([measure(mesh, store, options)], options.json)


if __name__ == "__main__":
    main()
