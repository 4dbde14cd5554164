"""Several processes make the clips of one, and go on where they were stopped."""

import json
from pathlib import Path

import pytest
from generation_runs import LAYERZERO, PROMPTS, contents, generate, generate_here
from kept_frames import keeping_frames, largest_difference
from ranks import run_ranks

import mm.generate.run


@pytest.mark.parametrize(
    ("ranks", "words", "layout"),
    [
        (2, ["--context-parallel-size", "2"], "cp2(u2)"),
        pytest.param(2, LAYERZERO, "dp2-zero2", marks=pytest.mark.nightly),
        pytest.param(
            2, ["--context-parallel-size", "2", "--context-parallel-algo", "megatron_cp_algo"], "cp2(r2)",
            marks=pytest.mark.nightly,
        ),
        pytest.param(2, ["--tensor-model-parallel-size", "2"], "tp2", marks=pytest.mark.nightly),
        pytest.param(2, [], "dp2", marks=pytest.mark.nightly),
        pytest.param(
            4, ["--context-parallel-size", "2", "--batched-guidance", *LAYERZERO], "dp2-cp2(u2)-zero2",
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            4, ["--context-parallel-size", "4", "--context-parallel-algo", "hybrid_cp_algo",
                "--ulysses-degree-in-cp", "2"], "cp4(u2xr2)", marks=pytest.mark.nightly,
        ),
    ],
)  # fmt: skip
def test_several_processes_make_the_clips_of_one(workplace, weights, ranks, words, layout):
    """Three prompts over the replicas: with two of them one has nothing to do in the second round."""
    Path("zero.yaml").write_text("zero3_size: 2\n")
    with keeping_frames(mm.generate.run):
        generate(weights, "--save-path", "one")
    folder = str(weights / "transformer")
    run_ranks(ranks, generate_here, str(workplace), folder, [*words, "--save-path", "many"])
    assert contents("one").keys() == contents("many").keys()
    assert largest_difference(Path("one"), Path("many")) <= 1  # where rounding to whole numbers is near its edge
    for index in range(len(PROMPTS)):
        name = f"video_{index:04d}"
        one, many = (json.loads(Path(folder, f"{name}.json").read_text()) for folder in ("one", "many"))
        assert (one.pop("layout"), many.pop("layout")) == ("single", layout)
        assert many.pop("batched_guidance") == ("--batched-guidance" in words)
        del one["batched_guidance"]
        assert one == many  # the fingerprint of the weights too


@pytest.mark.parametrize(
    ("ranks", "words"),
    [(2, LAYERZERO), pytest.param(2, ["--context-parallel-size", "2"], marks=pytest.mark.nightly)],
)
def test_several_processes_go_on_where_they_were_stopped(workplace, weights, ranks, words):
    """With layer-zero every replica takes part in every batch, also the one that has nothing left to do."""
    Path("zero.yaml").write_text("zero3_size: 2\n")
    folder = str(weights / "transformer")
    run_ranks(ranks, generate_here, str(workplace), folder, words)
    whole = contents("clips")
    Path("clips/video_0001.mp4").unlink()
    Path("clips/video_0001.npy").unlink()
    times = {path.name: path.stat().st_mtime_ns for path in Path("clips").iterdir()}
    run_ranks(ranks, generate_here, str(workplace), folder, words)
    assert contents("clips") == whole
    kept = [name for name, time in times.items() if Path("clips", name).stat().st_mtime_ns == time]
    kept_clips = sorted(name for name in kept if not name.endswith(".npy"))
    assert kept_clips == ["video_0000.json", "video_0000.mp4", "video_0002.json", "video_0002.mp4"]
