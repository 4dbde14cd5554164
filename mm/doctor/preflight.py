"""Checks of a training run before it starts: each is a function that says what it found.

Nothing here changes anything on disk. A check that raises an error of the program has found what the run would raise.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch

from mm.checkpoint.comm import Comm
from mm.checkpoint.directory import find_latest, require_experts_folder
from mm.checkpoint.expert_band import require_band
from mm.checkpoint.formats import training
from mm.checkpoint.identify import identify
from mm.checkpoint.lock import holder_of
from mm.checkpoint.weights import open_weights
from mm.config.expert_runs import expert_runs
from mm.config.model import WanConfig
from mm.config.run.experts import expert_folders
from mm.config.run.extraction import ExtractionRun
from mm.config.run.origins import Origins
from mm.config.run.training import TrainingRun
from mm.config.units import GIB, format_bytes
from mm.data.dataset import FeatureDataset
from mm.data.packing import check_budget
from mm.data.plan import SamplingPlan
from mm.data.recipe import extraction_recipe
from mm.data.store.catalog import is_sharded
from mm.device.backend import Backend
from mm.diffusion.flow import FlowMatching
from mm.errors import MMError
from mm.ops.elementwise.dispatch import TRITON_NEEDS, choice_of
from mm.optim.algorithms.make import ALGORITHMS
from mm.parallel.placement import whole_shapes
from mm.train.run import expected_model

Verdict = Literal["ok", "look", "no"]
_FP32 = 4


@dataclass(frozen=True)
class Finding:
    """Finding of a check.

    Attributes:
        check: its name. verdict: `no` where the run will fail, `look` where it may surprise.
        found: in one sentence. remedy: empty where all is well.
    """

    check: str
    verdict: Verdict
    found: str
    remedy: str = ""


def attempt(check: str, look: Callable[[], Sequence[Finding]]) -> list[Finding]:
    """Run a check; an error that the run itself would raise is what it found."""
    try:
        return list(look())
    except MMError as error:
        return [Finding(check, "no", f"{found.id}: {found.message}", found.remedy) for found in error.problems]


def versions(backend: Backend) -> list[Finding]:
    """Interpreter, libraries, device; between processes joining the job compares them."""
    names = ("torch", "megatron-core")
    libraries = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    found = f"Python {platform.python_version()}, {libraries}, {backend.name()} ({backend.collective})"
    return [Finding("versions", "ok", found)]


def operators(backend: Backend) -> list[Finding]:
    """Try the device's own elementwise operators; on CUDA a kernel is compiled and started."""
    choice = choice_of(backend.device)
    if choice.instead is None:
        return [Finding("operators", "ok", f"elementwise operators are {choice.name}")]
    return [Finding("operators", "look", f"elementwise operators are {choice.name}: {choice.instead}", TRITON_NEEDS)]


def memory(peak_bytes: Sequence[int], backend: Backend, words: Origins) -> list[Finding]:
    """The dry run's prediction for each rank that it looked at against the device.

    Args:
        peak_bytes: of each.
        backend: the device; on the CPU the host's memory counts, which the node's processes share.
        words: the user's, of the run.
    """
    device = backend.total_and_free_bytes()
    total, free = device if device is not None else (psutil.virtual_memory().total, psutil.virtual_memory().available)
    most = max(peak_bytes)
    found = f"{format_bytes(most)} predicted on the fullest rank looked at, "
    found += f"{format_bytes(free)} of {format_bytes(total)} free"
    remedy = (
        "DRY_RUN=1 before the script, or mm doctor --dry-run, shows the split. Recompute more, shard more "
        f"({words['parallel.distributed_optimizer'].with_value(True)}, layer-zero, TP, PP), cut the tokens (CP), or "
        f"lower {words['data.micro_batch_size'].name}."
    )
    if most > free:
        return [Finding("memory", "no", found, remedy)]
    return [Finding("memory", "look" if most > 0.9 * free else "ok", found, remedy if most > 0.9 * free else "")]


def features(
    dataset: FeatureDataset, global_batch_size: int, words: Origins, *, one_size: bool, budget: int | None
) -> list[Finding]:
    """The stores of feature_data.json: sizes, and the first and the last sample read as training reads them.

    Args:
        dataset: the features. global_batch_size: samples of a step. words: the user's, of the run.
        one_size: the pipeline takes samples of one size only. budget: tokens of a packed sequence, or None.

    Raises:
        DataError: DATA-077 for samples that are longer than a sequence, and what reading a sample raises.
    """
    if budget is not None:
        check_budget(dataset, budget, words["data.pack_tokens"].with_value(budget))
    sizes = dataset.shapes()
    for index in {0, len(dataset) - 1}:
        dataset[index]
    shown = ", ".join(f"{count} of {'x'.join(map(str, shape[1:]))}" for shape, count in sizes.most_common(3))
    found = f"{len(dataset)} samples ({shown}{', ...' if len(sizes) > 3 else ''}); the first and the last can be read"
    if one_size and len(sizes) > 1:
        varying = words["parallel.variable_sizes"].with_value(True)
        return [Finding("features", "no", found, f"Add {varying}, or train on features of one size.")]
    if len(dataset) < global_batch_size:
        remedy = f"A step takes {global_batch_size}, so that samples repeat within it: add samples, or lower it."
        return [Finding("features", "look", found, remedy)]
    return [Finding("features", "ok", found)]


def live(runs: Sequence[ExtractionRun]) -> list[Finding]:
    """The stores whose features the run makes: their encoders, whether they may be gone on with, and what they hold.

    Raises:
        DataError: DATA-040 and DATA-042 for encoders, DATA-014 and DATA-068 for a store that was made otherwise.
    """
    from mm.extract.live.parts import kept_bytes
    from mm.extract.store import check_store

    findings = []
    for run in runs:
        store = Path(run.output.path)
        check_store(store, extraction_recipe(run), run.output.overwrite, run.origins)
        state = "finished" if is_sharded(store) else f"{format_bytes(kept_bytes(store))} of features are kept"
        found = f"those of {store} are made by the run ({state}); their rows and clips are looked at when it begins"
        findings.append(Finding("features", "ok", found))
    return findings


def weights(sections: TrainingRun) -> list[Finding]:
    """Look at the weights that the run starts from: names and shapes of all tensors, without reading them."""
    if sections.experts is not None:
        return [found for one in expert_runs(sections) for found in _weights(one)]
    return _weights(sections)


def _weights(sections: TrainingRun) -> list[Finding]:
    """`weights` of one model."""
    adapters, start, words = sections.adapters, sections.checkpoint, sections.origins
    path = adapters.base if adapters is not None else start.load
    if start.save is not None and find_latest(Path(start.save), start.resume_policy) is not None:
        return []  # `save_folder` tells; the weights are not read
    if path is None:
        seed, scratch = words["training.seed"].name, words["checkpoint.from_scratch"].with_value(True)
        return [Finding("weights", "ok", f"drawn from {seed} ({scratch})")]
    found = identify(path, policy=start.resume_policy)
    require_band(found.path, sections.objective, words)
    if found.format == training.FORMAT:
        return [Finding("weights", "ok", f"training checkpoint {found.path}")]
    source = open_weights(found)
    expected_model(sections).require(source)
    return [Finding("weights", "ok", f"{path} ({source.label}): every tensor is there, none too many")]


def save_folder(sections: TrainingRun) -> list[Finding]:
    """Look for the folder in which the run goes on, and whether it may write there."""
    kept, words = sections.checkpoint, sections.origins
    save, interval = words["checkpoint.save"].name, words["checkpoint.save_interval"].name
    if kept.save is None:
        return [Finding("checkpoints", "look", "none will be written", f"Give {save}, or lose the run with its end.")]
    root = Path(kept.save)
    require_experts_folder(root, experts=sections.experts is not None)
    first, *beside = [root] if sections.experts is None else expert_folders(kept.save)
    latest = find_latest(first, kept.resume_policy, beside=beside)
    start = "starts at step 0" if latest is None else f"goes on from {latest.name}"
    if latest is not None and kept.load is not None:
        start += f"; {words['checkpoint.load'].name} is not used"
    holder = holder_of(root)
    if holder is not None:
        found = f"{holder} holds the lock of {root}, or died on another node"
        remedy = f"Give another {save}, or see that no such job runs; a dead one's lock is taken over by the start."
        return [Finding("checkpoints", "look", found, remedy)]
    existing = _existing(root)
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        return [Finding("checkpoints", "no", f"{existing} cannot be written: {error}", f"Give another {save}.")]
    every = f"every {kept.save_interval} steps" if kept.save_interval else "at the end only"
    verdict: Verdict = "ok" if kept.save_interval else "look"
    return [Finding("checkpoints", verdict, f"{start}; saved {every}", "" if verdict == "ok" else f"Give {interval}.")]


def disk(sections: TrainingRun, trained: int, frozen: int = 0) -> list[Finding]:
    """Free space for the checkpoints that will be kept.

    Args:
        sections: of the run. trained: elements of all parameters that are trained.
        frozen: of all that are not, and saved with them.
    """
    asked = sections.checkpoint
    if asked.save is None:
        return []
    one, words = _state_bytes(sections, trained, frozen), sections.origins
    saves = sections.training.steps // asked.save_interval if asked.save_interval else 1
    kept = min(max(saves, 1), asked.keep_latest or max(saves, 1)) + (1 if saves > 1 else 0)  # the newest beside the old
    free = shutil.disk_usage(_existing(Path(asked.save))).free
    found = f"{format_bytes(one)} a checkpoint, up to {kept} at a time, {format_bytes(free)} free"
    if free < 1.2 * one:
        return [Finding("disk", "no", found, f"Free space, or give another {words['checkpoint.save'].name}.")]
    if free < kept * one:
        return [Finding("disk", "look", found, f"Give {words['checkpoint.keep_latest'].with_value(2)}, or free space.")]
    return [Finding("disk", "ok", found)]


def host(
    sections: TrainingRun, elements: tuple[int, int], pinned_bytes: int, save_bytes: int, processes: int
) -> list[Finding]:
    """Host memory and limits of this node.

    Args:
        sections: of the run. elements: trained and frozen, as for `disk`.
        pinned_bytes: of one process, for offload. save_bytes: of the process with the most, for background saves.
        processes: of this node.
    """
    findings = []
    # of what replicas have copies of, one saves: no more than the whole state is saved from one node
    copies = min(save_bytes * processes, max(_state_bytes(sections, *elements), save_bytes))
    need, free = pinned_bytes * processes + copies, psutil.virtual_memory().available
    found = (
        f"{format_bytes(need)} for offload and background saves on {socket.gethostname()}, {format_bytes(free)} free"
    )
    background = sections.origins["checkpoint.in_background"].with_value(True)
    remedy = f"Leave out {background} or offload, or start fewer processes a node."
    findings.append(Finding("host memory", "no" if need > free else "ok", found, remedy if need > free else ""))
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < 4096:
        findings.append(Finding("limits", "look", f"ulimit -n is {files}", "Raise it to 4096 or more."))
    shared = Path("/dev/shm")  # noqa: S108  where libraries of collectives let processes of one node meet
    if processes > 1 and shared.exists() and shutil.disk_usage(shared).free < GIB:
        size = format_bytes(shutil.disk_usage(shared).free)
        remedy = "Give the container more (--shm-size)."
        findings.append(Finding("limits", "look", f"{shared} has {size} free", remedy))
    return findings


def _state_bytes(sections: TrainingRun, trained: int, frozen: int) -> int:
    """Bytes of a checkpoint: masters, the optimizer's state, the average, and what is frozen in the run's precision."""
    kept = ALGORITHMS[sections.optimizer.name].bytes_per_element if sections.checkpoint.save_optimizer else 0
    held = 2 if sections.model.precision == "bf16" else _FP32
    return trained * (_FP32 * (1 + (sections.optimizer.ema_decay is not None)) + kept) + frozen * held


def network(comm: Comm, seconds: float) -> list[Finding]:
    """Wait until all processes have joined and spoken; count the nodes."""
    hosts = comm.all_gather_object(socket.gethostname())
    found = f"{comm.world_size} processes on {len(set(hosts))} nodes joined and compared themselves in {seconds:.1f} s"
    return [Finding("network", "ok", found)]


def draws(dataset: FeatureDataset, plan: SamplingPlan, flow: FlowMatching, seed: int, groups: int) -> str:
    """A digest of what chance gives to the first step: its samples in order, their timesteps, the first one's noise.

    Args:
        dataset: the features. plan: their order. flow: draws. seed: the run's.
        groups: micro-batches of the step, in all replicas.
    """
    samples = [sample for slot in range(groups) for sample in plan.group(slot)]
    places = [(number, len(samples)) for number in range(len(samples))]
    names, epochs = [dataset.name(sample.index) for sample in samples], [sample.draw for sample in samples]
    _, timesteps, _ = flow.draw_timesteps(seed, names, epochs, places)
    noise = flow.draw_noise(seed, names[:1], epochs[:1], dataset.latent_shape(samples[0].index))
    return hashlib.sha256(repr(names).encode() + timesteps.numpy().tobytes() + noise.numpy().tobytes()).hexdigest()[:16]


def same_draws(digests: Sequence[str | None]) -> list[Finding]:
    """Compare the draws of all ranks, which must be alike; replicas then take other samples of the one order.

    Args:
        digests: of `draws`, by rank; None where a rank could not open the features.
    """
    if not any(digests):
        return []
    usual, _ = Counter(digests).most_common(1)[0]
    others = [rank for rank, digest in enumerate(digests) if digest != usual]
    if others:
        found = f"ranks {', '.join(map(str, others[:8]))}{', ...' if len(others) > 8 else ''} draw other samples, "
        found += f"timesteps or noise than the rest ({digests[others[0]]}, not {usual})"
        remedy = "Compare data, torch and CPU of these ranks' nodes with the others'."
        return [Finding("draws", "no", found, remedy)]
    return [Finding("draws", "ok", f"order, timesteps and noise of the first step are {usual} on every rank")]


def elements(config: WanConfig) -> int:
    """Number of elements of all parameters of a model."""
    return sum(torch.Size(shape).numel() for shape in whole_shapes(config).values())


def _existing(path: Path) -> Path:
    """The nearest folder that exists."""
    path = Path(os.path.abspath(path))
    while not path.exists():
        path = path.parent
    return path
