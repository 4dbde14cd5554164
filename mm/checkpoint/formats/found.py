"""Answer of `mm.checkpoint.identify` about a path; readers are given this and look at nothing again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mm.wan.shards import Header, NothingThere, TensorInfo

Content = Literal["model", "adapters", "encoder", "unknown"]
Wanted = Literal["model", "adapters"]


@dataclass(frozen=True)
class Found:
    """The answer.

    Attributes:
        asked: the path that was asked about.
        format: name of a row of `mm.checkpoint.formats.table`; of what none of them reads, why (`NothingThere`).
        path: what is read: `asked` itself, or the checkpoint, release, save or file in it that is meant.
        content: whose tensors these are, as far as their names tell.
        names: how they are spelled: a convention, those of an adapter file, or which encoder it is; empty where a
            format has names of its own.
        step: of a checkpoint that a training run saved, ours or another system's.
        of_run: `asked` is the folder of a run's checkpoints, and `path` the one to go on from.
        files: of ranks or stages, in their order, below `path`.
        headers: of safetensors, by file.
    """

    asked: Path
    format: str
    path: Path
    content: Content = "unknown"
    names: str = ""
    step: int | None = None
    of_run: bool = False
    files: tuple[str, ...] = ()
    headers: Mapping[Path, Header] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Values for the other ranks."""
        return {
            "asked": str(self.asked),
            "format": self.format,
            "path": str(self.path),
            "content": self.content,
            "names": self.names,
            "step": self.step,
            "of_run": self.of_run,
            "files": list(self.files),
            "headers": {str(file): header for file, header in self.headers.items()},
        }

    @classmethod
    def parse(cls, values: dict[str, Any]) -> Found:
        """The inverse of `as_json`."""
        headers = {
            Path(file): {name: TensorInfo(dtype, tuple(shape)) for name, (dtype, shape) in header.items()}
            for file, header in values["headers"].items()
        }
        paths = {name: Path(values[name]) for name in ("asked", "path")}
        return cls(**{**values, **paths, "files": tuple(values["files"]), "headers": headers})


def nothing(path: Path, why: NothingThere) -> Found:
    """The answer where there is nothing that any format reads."""
    return Found(path, why, path)
