"""Memory of conversions: `python benchmarks/convert_memory.py [--folder DIR] [--layers N]`.

Weights with the shapes of Wan2.1 1.3B, as sparse files, are converted by the command, in a process each. Its peak of
resident memory, the interpreter, torch and the mapped pages of files included, stands beside the largest file that
was read or written. The results take about as much disk as the largest model, one after the other.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import results  # noqa: E402  (the path above)
import torch  # noqa: E402

from mm.checkpoint.manifest import MANIFEST_NAME, FileRecord, Manifest, PieceRecord, TensorRecord  # noqa: E402
from mm.config.model import WAN_1_3B, WanConfig  # noqa: E402
from mm.wan.config_json import wan_config_to_diffusers  # noqa: E402
from mm.wan.model import WanModel  # noqa: E402
from mm.wan.names import native_to_diffusers  # noqa: E402

TARGET = 1.3
SHARD_BYTES = 10**9
_CHILD = """
import sys
from mm.cli.convert import main
main(sys.argv[1:])
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024)
"""

Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(config: WanConfig) -> dict[str, tuple[int, ...]]:
    """Of every parameter by native name."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in WanModel(config).named_parameters()}


def shards_of(shapes: Shapes, itemsize: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """The tensors of each file of at most SHARD_BYTES."""
    shard: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if shard and itemsize * sum(map(math.prod, [*shard.values(), shape])) > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = shape
    yield shard


def sparse_file(path: Path, shapes: Shapes, dtype: str, itemsize: int) -> int:
    """A safetensors file of zeros that take no room on disk; returns its size."""
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + itemsize * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    return 8 + len(text) + position


def write_hf(folder: Path, config: WanConfig) -> None:
    """A diffusers folder in bf16 with its index."""
    folder.mkdir()
    shards = list(shards_of({native_to_diffusers(n): s for n, s in shapes_of(config).items()}, 2))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors"
        sparse_file(folder / name, shard, "BF16", 2)
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(wan_config_to_diffusers(config)))


def write_run(root: Path, config: WanConfig) -> None:
    """A training checkpoint with fp32 weights."""
    folder = root / "iter_0000001"
    folder.mkdir(parents=True)
    shards = list(shards_of({f"model.{name}": shape for name, shape in shapes_of(config).items()}, 4))
    files, tensors = {}, {}
    for number, shard in enumerate(shards):
        name = f"shard-{number:05d}-of-{len(shards):05d}.safetensors"
        files[name] = FileRecord(num_bytes=sparse_file(folder / name, shard, "F32", 4), sha256="0" * 64)
        for key, shape in shard.items():
            piece = PieceRecord(file=name, name=key, offsets=(0,) * len(shape), sizes=shape)
            tensors[key] = TensorRecord(dtype="F32", shape=shape, pieces=(piece,))
    manifest = Manifest(
        step=1, world_size=len(shards), versions={}, scalars={"wan_config": config.model_dump(mode="json")},
        files=files, tensors=tensors,
    )  # fmt: skip
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json())


def largest(*folders: Path) -> int:
    """Bytes of the largest file of weights below the folders."""
    kinds = (".safetensors", ".pt")
    return max(f.stat().st_size for folder in folders for f in folder.rglob("*") if f.suffix in kinds)


def measure(folder: Path, name: str, mode: str, source: str, words: Sequence[str] = ()) -> tuple[str, int, int]:
    """Convert `source` in a process of its own: what it was, the largest file and the peak of resident memory."""
    target = folder / name
    line = ["--mode", mode, "--source_path", str(folder / source), "--target_path", str(target), *words]
    done = subprocess.run([sys.executable, "-c", _CHILD, *line], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return f"{source} to {name}", largest(folder / source, target), int(done.stdout.split()[-1])


def rows_of(folder: Path, config: WanConfig) -> Iterator[tuple[str, int, int]]:
    """Every conversion; a result is deleted once nothing is made of it any more."""
    write_hf(folder / "hf", config)
    write_run(folder / "run", config)
    half, odd = divmod(config.num_layers, 2)
    size = ("--max_shard_size", f"{SHARD_BYTES}")
    yield measure(folder, "mm", "convert_to_mm", "hf")
    yield measure(folder, "hf2", "convert_to_hf", "mm", size)
    shutil.rmtree(folder / "hf2")
    shutil.rmtree(folder / "mm")
    yield measure(folder, "mm of 2 stages", "convert_to_mm", "hf", ("--pp_vpp_layers", f"[{half + odd},{half}]"))
    yield measure(folder, "hf3", "convert_to_hf", "mm of 2 stages", ("--ckpt_path", str(folder / "hf")))
    shutil.rmtree(folder / "hf3")
    rest = config.num_layers - 3
    yield measure(
        folder, "mm of 4 virtual stages", "resplit", "mm of 2 stages", ("--pp_vpp_layers", f"[[{rest},1],[1,1]]")
    )
    shutil.rmtree(folder / "mm of 4 virtual stages")
    shutil.rmtree(folder / "mm of 2 stages")
    for name, mode, words in (
        ("bf16", "zero_to_bf16", size),
        ("hf4", "convert_to_hf", size),
        ("native", "convert_to_native", ()),
        ("mm", "convert_to_mm", ()),
    ):
        yield measure(folder, name, mode, "run", words)
        shutil.rmtree(folder / name)


def main() -> None:
    """Measure, print, write."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--folder", type=Path, help="where to write; default: the folder for temporary files")
        parser.add_argument("--layers", type=int, default=WAN_1_3B.num_layers, help="fewer than 30, for a try")

    given = results.arguments(__doc__, add)
    config = WAN_1_3B.model_copy(update={"num_layers": given.layers})
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        rows = list(rows_of(Path(folder), config))
    result = results.Result("memory of conversions", "cpu", {"layers": given.layers, "shard": SHARD_BYTES})
    for name, largest_file, peak in rows:
        ratio = peak / largest_file
        result.rows.append({"conversion": name, "largest file": largest_file, "peak": peak, "ratio": round(ratio, 3)})
        result.targets.append(results.Target(f"{name}: peak by largest file", ratio, TARGET))
    results.publish([result], given.json)


if __name__ == "__main__":
    main()
