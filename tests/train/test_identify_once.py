"""What a job of two processes looks at of the weights that it starts from: rank 0 finds out what they are, once."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from training_runs import WEIGHTS, run, words

from mm.checkpoint import convert
from mm.cli import train as train_command

LISTINGS = ("os.listdir", "os.scandir")


def looked_at(line: list[str], folder: str) -> list[tuple[str, str]]:
    """Train; what Python opened and listed below `folder`. It does not see the library that reads tensors."""
    seen: list[tuple[str, str]] = []

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", *LISTINGS) and isinstance(arguments[0], str) and arguments[0].startswith(folder):
            seen.append((event, arguments[0].removeprefix(folder).lstrip("/")))

    sys.addaudithook(note)  # for as long as this process lives, which is until the end of the test
    train_command.main(line)
    return seen


def files(seen: list[tuple[str, str]]) -> Counter[str]:
    return Counter(path for event, path in seen if event == "open")


def listed(seen: list[tuple[str, str]]) -> bool:
    return any(event in LISTINGS for event, _ in seen)


def of_hf(demo: Path, folder: Path) -> None:
    convert.convert_to_hf(demo / WEIGHTS, folder, max_shard_bytes=200_000)


def of_mm(demo: Path, folder: Path) -> None:
    convert.convert_to_mm(demo / WEIGHTS, folder, ((1, 3),))


def of_a_run(demo: Path, folder: Path) -> None:
    run(demo, folder, train_iters=2, save_interval=1)


@pytest.mark.parametrize("make", [of_hf, of_mm, of_a_run])
def test_what_is_there_is_found_out_by_rank_zero(
    demo: Path, tmp_path: Path, make: Callable[[Path, Path], None]
) -> None:
    folder = tmp_path / "start"
    make(demo, folder)
    line = words(demo, tmp_path / "run", train_iters=3, load=folder, micro_batch_size=2)
    first, second = run_ranks(2, looked_at, line, str(folder))
    assert listed(first) and not listed(second)
    shards = {file.name for file in folder.glob("*.safetensors")}
    if make is of_hf:
        assert len(shards) > 2
        index = "diffusion_pytorch_model.safetensors.index.json"
        assert files(first) == dict.fromkeys([*shards, index, "config.json"], 1)
        assert files(second) == {}
    elif make is of_mm:
        assert {Path(path).name for path in files(second)} == {"model_optim_rng.pt"}, "which has the tensors"
    else:
        assert files(second) == {"iter_0000002/manifest.json": 1}, "which says where the tensors are"
