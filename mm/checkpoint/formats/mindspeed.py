"""MindSpeed-MM's format: what Megatron reads and writes with tensor size 1, for any pipeline.

<root>/latest_checkpointed_iteration.txt     "release" or the step, without a line end
<root>/mm_config.json                        ours: the model's shape, of a release
<root>/release/  or  <root>/iter_0005000/
    mp_rank_00/model_optim_rng.pt            without a pipeline
    mp_rank_00_000/model_optim_rng.pt        pipeline rank 0, and so on

In a release and in an iter_* folder there are folders of ranks and nothing else, because the tools of MindSpeed-MM take
whatever is there for one. What is ours is beside the tracker, or of a training run in its record
(`mm.checkpoint.record`). Earlier versions wrote mm_config.json beside the ranks' folders, where it is read as well.

A file holds {"model": flat state dict in MM names, "checkpoint_version": 3.0}; with virtual stages it has model0,
model1, ... in the place of model. `mindspeed_split` says what is in which.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from mm.checkpoint.directory import TRACKER_NAME, folder_name, step_of
from mm.checkpoint.formats.found import Content, Found
from mm.checkpoint.formats.mindspeed_split import joined_names, split_names
from mm.checkpoint.formats.pt_file import read_pt, unreadable, write_pt
from mm.checkpoint.formats.source import TensorKind, WeightSource
from mm.checkpoint.record import kind_of, read_record
from mm.config.base import load
from mm.config.layout import Stages
from mm.config.model import WanConfig
from mm.errors import CheckpointError, ConfigError
from mm.wan.names import native_to_mindspeed, translate
from mm.wan.prefixes import common_prefix, unwrapped

FORMAT = "MM weights"
RELEASE = "release"
FILE_NAME = "model_optim_rng.pt"
CONFIG_NAME = "mm_config.json"
CHECKPOINT_VERSION = 3.0

_RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?")


class RankFile(NamedTuple):
    """Place of a tensor: the file, the chunk and the name in it, and what it is."""

    file: Path
    chunk: str
    name: str
    kind: TensorKind


class OpenFile:
    """The file that was read last. Models are read in their order, stage after stage, so that one file is mapped."""

    def __init__(self) -> None:
        self._file: Path | None = None
        self._content: dict[str, Any] = {}

    def tensor(self, place: RankFile) -> Tensor:
        """A view of the mapped file."""
        if place.file != self._file:
            self._content, self._file = read_pt(place.file), place.file
        value: Tensor = self._content[place.chunk][place.name]
        return value


@dataclass(frozen=True)
class MindSpeedWeights:
    """`WeightSource` over the files of one checkpoint.

    Attributes:
        path: the `release` or `iter_*` folder. places: by native name. num_ranks, num_chunks: of its pipeline.
    """

    path: Path
    places: Mapping[str, RankFile]
    num_ranks: int
    num_chunks: int
    label: str = FORMAT
    _open: OpenFile = field(default_factory=OpenFile, repr=False, compare=False)

    @classmethod
    def open(cls, found: Found) -> MindSpeedWeights:
        """Open what `recognise` found.

        Raises:
            CheckpointError: CKPT-021 for a file that is damaged or needs code to be read, CKPT-041 to CKPT-043 for
                pipeline stages that are missing or do not belong together, CKPT-084 for adapters.
        """
        folder, files = found.path, [found.path / name for name in found.files]
        stages = virtual_stages(files, folder)
        chunks = [list(places) for places in stages]
        if _of_adapters(stages):
            raise CheckpointError(
                "CKPT-084",
                f"{folder} holds adapters of a LoRA run, not a model.",
                "Merge them into their base model first: mm convert --mode merge_lora.",
            )
        places: dict[str, RankFile] = {}
        for stage, names in zip(stages, joined_names(chunks, str(folder)), strict=True):
            places |= {translate(name, "mm", "native") or name: stage[local] for local, name in names.items()}
        return cls(folder, places, len(files), len(stages) // len(files))

    def kinds(self) -> dict[str, TensorKind]:
        """Kinds of the mapped tensors."""
        return {name: place.kind for name, place in self.places.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the mapped tensors."""
        return {name: place.kind.shape for name, place in self.places.items()}

    def read(self, name: str) -> Tensor:
        """A view of the mapped file."""
        return self._open.tensor(self.places[name])

    def config(self) -> WanConfig | None:
        """Result of `config_of`."""
        return config_of(self.path)


def config_of(folder: Path) -> WanConfig | None:
    """The model's shape in a `release` or `iter_*` folder, where we wrote it; MindSpeed-MM does not say it.

    Raises:
        CheckpointError: CKPT-012 for a damaged record, CKPT-021 when mm_config.json cannot be used.
    """
    if kind_of(folder) == "torch" and (config := read_record(folder).wan_config) is not None:
        return config
    beside_the_tracker = (folder.parent / CONFIG_NAME,) if folder.name == RELEASE else ()
    file = next((file for file in (folder / CONFIG_NAME, *beside_the_tracker) if file.exists()), None)
    if file is None:
        return None
    try:
        return load(WanConfig, file)
    except ConfigError as error:
        raise unreadable(file, error.problems[0].message) from None


def recognise(path: Path) -> Found | None:
    """A folder with Megatron's tracker, or a `release`/`iter_*` folder below one.

    Raises:
        CheckpointError: CKPT-010 when the tracker names nothing, CKPT-018 for tensor parallelism, CKPT-021 for a first
            file that is damaged or needs code to be read, CKPT-041 and CKPT-042 for pipeline stages that are missing or
            of several checkpoints.
    """
    named = (path / TRACKER_NAME).is_file()
    if not named and not any(path.glob("mp_rank_*")):
        return None
    folder = named_by_tracker(path) if named else path
    files = stage_files(folder)
    content: Content = "adapters" if _of_adapters(_chunks(files[0])) else "model"
    names = tuple(str(file.relative_to(folder)) for file in files)
    return Found(path, FORMAT, folder, content, step=step_of(folder), files=names)


def _of_adapters(stages: Iterable[Iterable[str]]) -> bool:
    return any(".lora_" in name for names in stages for name in names)


def write_release(folder: Path, source: WeightSource, names: Iterable[str], stages: Stages) -> None:
    """Write the contents of a `release` folder and force them to disk; one pipeline rank at a time is in memory.

    Args:
        folder: exists and is empty.
        source: the weights, which keep their dtypes. names: of the model's parameters, native.
        stages: [VP][PP] blocks of each stage, all blocks of the model.
    """
    native = {native_to_mindspeed(name): name for name in names}
    chunks = split_names(native, stages)
    num_ranks = len(stages[0])
    for rank in range(num_ranks):
        state: dict[str, Any] = {}
        for index in range(len(stages)):
            local = chunks[index * num_ranks + rank]
            key = "model" if len(stages) == 1 else f"model{index}"
            state[key] = {name: source.read(native[whole]) for name, whole in local.items()}
        write_stage(folder, rank, num_ranks, state)


def write_stage(folder: Path, rank: int, num_ranks: int, state: Mapping[str, Any]) -> Path:
    """Write the file of one pipeline rank and return it; `state` holds model, or model0, model1, ..."""
    file = folder / stage_folder(rank, num_ranks) / FILE_NAME
    file.parent.mkdir()
    write_pt(file, {**state, "checkpoint_version": CHECKPOINT_VERSION})
    return file


def stage_folder(rank: int, num_ranks: int) -> str:
    """Name of the folder of a pipeline rank."""
    return "mp_rank_00" if num_ranks == 1 else f"mp_rank_00_{rank:03d}"


def named_by_tracker(root: Path) -> Path:
    """The `release` or `iter_*` folder that the tracker in `root` names.

    Raises:
        CheckpointError: CKPT-010 when it names nothing that is there.
    """
    text = (root / TRACKER_NAME).read_text(encoding="utf-8", errors="replace").strip()
    name = RELEASE if text == RELEASE else folder_name(int(text)) if re.fullmatch(r"\d{1,7}", text) else None
    if name is None or not (root / name).is_dir():
        raise CheckpointError(
            "CKPT-010",
            f'{root / TRACKER_NAME} holds "{text[:40]}", and there is no folder {name or "of that name"}.',
            'Write "release" or the step of an existing iter_* folder into it.',
        )
    return root / name


def stage_files(folder: Path) -> list[Path]:
    """The files of the pipeline ranks in a `release` or `iter_*` folder, in their order.

    Raises:
        CheckpointError: CKPT-010 without any, CKPT-018 for tensor parallelism, CKPT-041 for a missing rank, CKPT-042
            for folders of several checkpoints.
    """
    folders = sorted(entry.name for entry in folder.glob("mp_rank_*"))
    found = {name: _RANK.fullmatch(name) for name in folders}
    ranks = [None if match is None else (int(match[1]), match[2]) for match in found.values()]
    if not folders:
        raise CheckpointError("CKPT-010", f"{folder} has no mp_rank_*/{FILE_NAME}.", "Check the path.")
    if any(rank is not None and rank[0] > 0 for rank in ranks):
        raise CheckpointError(
            "CKPT-018",
            f"{folder} was saved with tensor parallelism ({', '.join(folders[:10])}), which MindSpeed-MM does not have "
            "for Wan.",
            "Merge it with the tools of the program that wrote it.",
        )
    pipeline = [rank[1] for rank in ranks if rank is not None]
    if None in ranks or (None in pipeline and len(folders) > 1):
        raise CheckpointError(
            "CKPT-042",
            f"{folder} holds files of several checkpoints: {', '.join(folders[:10])}.",
            "Keep either mp_rank_00 alone, or mp_rank_00_000 and its successors.",
        )
    if pipeline == ["000"]:
        raise CheckpointError(
            "CKPT-041",
            f"{folder} has {folders[0]} alone, the first of a pipeline's folders; without a pipeline it is mp_rank_00.",
            "Copy the folders mp_rank_* of all pipeline ranks.",
        )
    expected = ["mp_rank_00"] if pipeline == [None] else [f"mp_rank_00_{rank:03d}" for rank in range(len(folders))]
    missing = [name for name in expected if not (folder / name / FILE_NAME).is_file()]
    if missing:
        raise CheckpointError(
            "CKPT-041",
            f"{folder} has {len(folders)} of the pipeline's folders, and no {missing[0]}/{FILE_NAME}.",
            "Copy the folders mp_rank_* of all pipeline ranks.",
        )
    return [folder / name / FILE_NAME for name in expected]


def virtual_stages(files: Sequence[Path], folder: Path) -> list[dict[str, RankFile]]:
    """Tensors of every virtual stage by their names there, in the model's order: chunk v of rank p is v * PP + p.

    Raises:
        CheckpointError: CKPT-021 for a file that cannot be used, CKPT-042 for ranks with different numbers of chunks.
    """
    ranks = [_chunks(file) for file in files]
    counts = {file.parent.name: len(chunks) for file, chunks in zip(files, ranks, strict=True)}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise CheckpointError(
            "CKPT-042",
            f"{folder} holds files of several checkpoints: they have different numbers of model chunks ({shown}).",
            "Copy the folders mp_rank_* of one checkpoint again.",
        )
    return [rank[index] for index in range(len(ranks[0])) for rank in ranks]


def _chunks(file: Path) -> list[dict[str, RankFile]]:
    """The places of a file's tensors, one mapping for each of its model chunks."""
    content = read_pt(file)
    numbered = sorted((int(key[5:]), key) for key in content if re.fullmatch(r"model(0|[1-9][0-9]*)", key))
    keys = [key for _, key in numbered]
    if "model" in content:
        keys.append("model")
    if len(keys) > 1 and keys != [f"model{index}" for index in range(len(keys))]:
        raise CheckpointError(
            "CKPT-042",
            f"{file} holds {', '.join(keys)}; expected model alone, or model0, model1 and so on without holes.",
            "Copy the checkpoint again.",
        )
    if not keys or not all(isinstance(content[key], dict) for key in keys):
        raise unreadable(file, 'it has no state dict under "model"')
    return [_places(file, key, content[key]) for key in keys]


def _places(file: Path, chunk: str, state: Mapping[Any, Any]) -> dict[str, RankFile]:
    places: dict[str, RankFile] = {}
    # Transformer layers of Megatron leave _extra_state; they hold no weights
    kept = {name: value for name, value in state.items() if not str(name).endswith("_extra_state")}
    prefix = common_prefix(map(str, kept))
    for name, value in kept.items():
        if not isinstance(value, Tensor):
            raise unreadable(file, f'"{chunk}" holds {type(value).__name__} under {name}, no tensor')
        bare = unwrapped(str(name).removeprefix(prefix))
        if bare in places:
            raise unreadable(file, f'"{chunk}" holds {bare} as {places[bare].name} and as {name}')
        places[bare] = RankFile(file, chunk, name, TensorKind(tuple(value.shape), value.dtype))
    return places
