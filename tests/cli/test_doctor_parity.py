"""`mm doctor parity`: a layout beside one device, as a user asks for it, and a defect that it must see."""

import contextlib
import io
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ranks import ANY_PORT, run_ranks
from torch import Tensor

from mm.cli import doctor
from mm.config.flags import as_words
from mm.diffusion.flow import FlowMatching
from mm.errors import DifferenceError

EXAMPLES = Path(__file__).parents[2] / "examples" / "wan2.1"
WEIGHTS = "weights/Wan2.1-T2V-Tiny-Diffusers/transformer"


def words(demo: Path, **flags: Any) -> list[str]:
    return as_words(
        {
            "mm_data": demo / "configs" / "feature_data.json",
            "mm_model": demo / "configs" / "pretrain_model.json",
            "load": demo / WEIGHTS,
            "micro_batch_size": 1,
            "lr": 1e-3,
            "train_iters": 4,
            **flags,
        }
    )


def printed(argv: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        doctor.main(["parity", *argv])
    return out.getvalue()


def printed_with_a_loss_twice_as_large(argv: list[str]) -> str:
    """As where ranks that share a sample count its loss each."""
    loss = FlowMatching.loss

    def twice(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        total, each = loss(*args, **kwargs)
        return 2 * total, each

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FlowMatching, "loss", twice)
        with pytest.raises(DifferenceError) as caught:
            printed(argv)
    return str(caught.value)


LAYOUTS = {
    "one": (1, {}),
    "ring": (2, {"context_parallel_size": 2, "context_parallel_algo": "megatron_cp_algo"}),
    "pipeline": (2, {"pipeline_model_parallel_size": 2, "use_distributed_optimizer": True, "global_batch_size": 4}),
    "tensor": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "micro_batch_size": 2}),
    "packed": (2, {"context_parallel_size": 2, "pack": 100, "global_batch_size": 2}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_agrees(demo: Path, name: str) -> None:
    world_size, flags = LAYOUTS[name]
    told = run_ranks(world_size, printed, words(demo, **flags))
    assert told[1:] == [""] * (world_size - 1)
    rows = {line.split("  ")[0]: line.split() for line in told[0].splitlines() if line.endswith("ok")}
    assert rows.keys() == {"loss", "gradients", "gradient norm", "weights"}
    # A pipeline on the CPU repeats every sum in its order; others differ, or nothing was compared.
    assert float(rows["gradients"][1]) > 0 or name in ("one", "pipeline")


def test_what_is_left_out_is_named(demo: Path) -> None:
    [told] = run_ranks(1, printed, words(demo, trainable_modules=["self_attn"], abnormal_clip_start=10))
    [line] = [line for line in told.splitlines() if line.startswith("left out")]
    assert "--trainable-modules" in line and "--abnormal-clip-start" in line and "adapters" not in line


def test_a_defect_is_named(demo: Path) -> None:
    flags = {"context_parallel_size": 2}
    told = run_ranks(2, printed_with_a_loss_twice_as_large, words(demo, **flags))
    assert told[0] == told[1]
    assert told[0].startswith("NUM-005: The layout cp2(u2) differs from one device: ")
    found = re.search(r"gradients by ([\d.e+-]+) \((\S+)\), limit 1.0e-05", told[0])
    assert found is not None, told[0]
    assert float(found[1]) > 0.1


@pytest.mark.nightly
def test_from_the_script_with_the_released_shape(tmp_path: Path, demo: Path) -> None:
    """30 blocks and 12 heads, uneven stages."""
    done = subprocess.run(
        ["bash", EXAMPLES / "1.3b" / "t2v" / "pretrain.sh"],
        env={
            **os.environ, "PARITY": "1", "NPUS_PER_NODE": "4", "CP": "2", "TP": "2", "MASTER_PORT": ANY_PORT,
            "SAVE_PATH": str(tmp_path / "run"), "LOAD_PATH": str(demo / WEIGHTS),
        },
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "t2v, 30 blocks, 12 heads, 96 wide, fp32" in done.stdout
    assert done.stdout.count("  ok\n") == 4
    assert not (tmp_path / "run").exists()
