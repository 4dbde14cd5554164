"""The weights of a Wan transformer on disk: names, shapes and configuration at once, tensors only when asked for.

Reads a folder or one safetensors file in diffusers, native or MindSpeed-MM names, told apart by content. Everything
outside this file sees native names only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from torch import Tensor

from mm.config.model import WanConfig
from mm.errors import DataError
from mm.wan.config_json import infer_config, read_config
from mm.wan.names import Convention, convention, translate
from mm.wan.prefixes import common_prefix, unwrapped
from mm.wan.shards import Header, find_shards

logger = logging.getLogger(__name__)

_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_UNUSED = (".attn2.norm_added_q.weight", ".scale_input", ".input_scale", "scaled_fp8")
"""Ends of names that belong to no model: of diffusers' folders of image-conditioned models, which diffusers ignores as
well; of files with scaled 8-bit weights the scales of activations and the mark of such a file."""
_SCALES = (".scale_weight", ".weight_scale")
"""Ends of names, in the place of `.weight`, of what an 8-bit weight is to be multiplied by (ComfyUI, lightx2v)."""


class StoredTensor(NamedTuple):
    """Tensor in a file: the path, its name there, its dtype in safetensors' spelling, its shape."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class WeightFolder:
    """Checked weights on disk. Make one with `WeightFolder.open`.

    Attributes:
        path: the folder or file that was opened.
        shards: its weight files, in order of their names.
        convention: the names inside the files.
        prefix: what stands before every name in the files, often nothing.
        stored: every tensor by native name. A name that the convention does not know is listed as it is, so that
            `require` reports it.
        unused: those of `stored` that are known to belong to no model; only `tensor` gives them.
        scales: what weights are multiplied by, by the weight's native name; the products are fp32.
    """

    path: Path
    shards: tuple[Path, ...]
    convention: Convention
    prefix: str
    stored: Mapping[str, StoredTensor]
    unused: frozenset[str]
    scales: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, path: str | Path) -> WeightFolder:
        """Read and check the index and headers at `path`; no tensor is loaded.

        Raises:
            DataError: DATA-020, 022 to 025 from `find_shards`; DATA-029 when no name is one of a Wan transformer;
                DATA-030 when a tensor occurs twice; DATA-031 when one is not floating point, or has a scale of a shape
                that is not understood.
        """
        return cls.of(Path(path), find_shards(Path(path)))

    @classmethod
    def of(cls, path: Path, headers: Mapping[Path, Header]) -> WeightFolder:
        """`open` with the headers of `find_shards` at hand: no file is opened."""
        names = [name for header in headers.values() for name in header]
        prefix = common_prefix(names)
        source = convention(unwrapped(name.removeprefix(prefix)) for name in names)
        stored: dict[str, StoredTensor] = {}
        for file, header in headers.items():
            for name, (dtype, shape) in header.items():
                bare = unwrapped(name.removeprefix(prefix))
                native = translate(bare, source, "native") or bare
                if native in stored:
                    raise _twice(name, file, stored[native])
                stored[native] = StoredTensor(file, name, dtype, shape)
        _require_floats(stored)
        scales = _taken_scales(stored, source)
        unused = frozenset(name for name in stored if name.endswith(_UNUSED))
        if unused:
            listed = _first_ten(sorted(unused))
            logger.info("%s: %d tensors are not part of the model and are not read%s", path, len(unused), listed)
        if scales:
            logger.info("%s: %d weights are multiplied by their scales, in fp32", path, len(scales))
        return cls(path, tuple(headers), source, prefix, stored, unused, scales)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of a model by native name."""
        return {name: entry.shape for name, entry in self.stored.items() if name not in self.unused}

    def config(self) -> WanConfig:
        """The model's shape from config.json beside the files; without one, inferred from the tensors and logged.

        Raises:
            DataError: DATA-026 to DATA-028 from `read_config` and `infer_config`.
        """
        file = (self.path if self.path.is_dir() else self.path.parent) / "config.json"
        if file.exists():
            return read_config(file, self.shapes())
        config = infer_config(self.shapes(), self.path)
        logger.warning("%s has no config.json; its tensors imply %s", self.path, config)
        return config

    def require(self, expected: Mapping[str, Sequence[int]]) -> None:
        """Check that exactly the tensors of `expected` (native name to shape) are there.

        Raises:
            DataError: DATA-021 with the number and the first ten of missing, unexpected and mis-shaped tensors.
        """
        found = self.shapes()
        missing = [name for name in expected if name not in found]
        unexpected = [name for name in found if name not in expected]
        misshaped = [
            f"{name} {list(found[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != tuple(shape)
        ]
        groups = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshaped))
        if any(group for _, group in groups):
            report = "; ".join(f"{len(group)} {title}{_first_ten(group)}" for title, group in groups)
            raise DataError(
                "DATA-021",
                f"{self.path} ({self.convention} names) does not match the model's {len(expected)} tensors: {report}.",
                "Use complete weights of the model that config.json describes.",
            )

    def tensor(self, name: str) -> Tensor:
        """One tensor by native name, as stored or times its scale, on the CPU. KeyError when it is not there."""
        value, scale = _read(self.stored[name]), self.scales.get(name)
        return value if scale is None else value.float() * _read(scale).float().reshape(-1, *[1] * (value.ndim - 1))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All (native name, tensor) of a model, shard by shard, one tensor in memory at a time."""
        for shard in self.shards:
            for native, entry in self.stored.items():
                if entry.file == shard and native not in self.unused:
                    yield native, self.tensor(native)


def _read(entry: StoredTensor) -> Tensor:
    with safe_open(entry.file, framework="pt") as file:
        value: Tensor = file.get_tensor(entry.name)
    return value


def _taken_scales(stored: dict[str, StoredTensor], source: Convention) -> dict[str, StoredTensor]:
    """Move the scales of weights out of `stored`: one number for a weight, or one for each of its rows."""
    scales = {}
    for name in [name for name in stored if name.endswith(_SCALES)]:
        weight = name[: name.rindex(".")] + ".weight"
        weight = translate(weight, source, "native") or weight
        if weight not in stored:
            continue  # nobody knows what it scales; it is reported as a name that no model has
        scale, rows = stored.pop(name), stored[weight].shape[:1]
        if weight in scales or scale.shape not in ((), (1,), (1, 1), rows, (*rows, 1)):
            raise DataError(
                "DATA-031",
                f"{scale.name} {list(scale.shape)} in {scale.file} is the scale of the 8-bit weight "
                f"{stored[weight].name} {list(stored[weight].shape)}; expected one number, or one for each row.",
                "Use weights that are not quantised.",
            )
        scales[weight] = scale
    return scales


def _first_ten(names: list[str]) -> str:
    if not names:
        return ""
    return f" ({', '.join(names[:10])}{', ...' if len(names) > 10 else ''})"


def _require_floats(stored: Mapping[str, StoredTensor]) -> None:
    other = [f"{entry.name} ({entry.dtype})" for entry in stored.values() if entry.dtype not in _FLOATS]
    if other:
        raise DataError(
            "DATA-031",
            f"{len(other)} tensors do not have one of the dtypes {', '.join(_FLOATS)}{_first_ten(other)}.",
            "Use weights that are not quantised.",
        )


def _twice(name: str, file: Path, first: StoredTensor) -> DataError:
    return DataError(
        "DATA-030",
        f"{name} in {file} is the same tensor as {first.name} in {first.file}.",
        "Keep one set of weights in the folder.",
    )
