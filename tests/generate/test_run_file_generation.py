"""`mm run` on a generation: the clips of the flags, kept by either, and the file's own words for what is wrong."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from family import SIDE, SIZE, inference_json, noise, write_image, write_transformer
from generation_runs import settings
from kept_frames import keeping_frames

import mm
import mm.generate.run
from mm.cli import generate as generate_command
from mm.cli import run as run_command
from mm.cli import translate as translate_command
from mm.config.run.encoders import Tiles
from mm.config.run.file import load_run, whole_file
from mm.config.tasks.registry import TASKS
from mm.demo.components import write_model
from mm.errors import ConfigError
from mm.generate.sampling import decode
from mm.wan.encoders import VideoEncoder

ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of a generation of two clips, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red disc moves left\na blue disc moves up\n")
    values = settings(weights) | {"negative_prompt": None}
    values["ae"] |= {"enable_tiling": True, "tiling_param": {"tile_size": [4, 4], "tile_stride": [2, 2]}}
    Path("model.json").write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    words = ["--mm-model", "model.json", "--load", str(weights / "transformer"), "--device", "cpu"]
    return [*words, "--seed", "5", "--no-progress-bar", "--guidance-scale", "1"]


@pytest.fixture
def file(command: list[str], capsys: pytest.CaptureFixture[str]) -> Path:
    translate_command.main(["--", "mm", "generate", *command])
    path = Path("run.yaml").resolve()
    path.write_text(capsys.readouterr().out)
    return path


def refused(main: Any, words: list[str]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        main(words)
    return [str(problem) for problem in caught.value.problems]


def test_clips_of_the_flags_are_clips_of_the_file(
    command: list[str], file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    generate_command.main(command)
    clips = sorted(Path("clips").glob("*.mp4"))
    before = {clip: clip.stat().st_mtime_ns for clip in clips}
    with caplog.at_level(logging.INFO):
        run_command.main([str(file)])
    assert "2 of 2 clips are in clips already, of this very command; they are kept" in caplog.text
    assert {clip: clip.stat().st_mtime_ns for clip in clips} == before
    file.write_text(file.read_text().replace("path: clips ", "path: others "))
    run_command.main([str(file)])
    said, others = (json.loads(Path(of, "video_0000.json").read_text()) for of in ("clips", "others"))
    assert said == others


def test_what_is_beside_a_clip_is_what_earlier_versions_wrote(command: list[str], weights: Path) -> None:
    """Otherwise a folder that was begun by one of them could not be gone on with."""
    generate_command.main(command)
    said = json.loads(Path("clips/video_0001.json").read_text())
    parts = {name: {key: value for key, value in said[name].items() if key != "fingerprint"}
             for name in ("ae", "tokenizer", "text_encoder")}  # fmt: skip
    assert parts == {
        "ae": {
            "model_id": "wan_video_vae", "from_pretrained": str(weights / "vae"), "dtype": "fp32",
            "enable_tiling": True, "tiling_param": {"tile_size": [4, 4], "tile_stride": [2, 2]}, "norm_latents": True,
            "norm_mode": "channel_specified_shift_scale", "do_sample": False,
        },
        "tokenizer": {
            "hub_backend": "hf", "autotokenizer_name": "AutoTokenizer", "from_pretrained": str(weights / "tokenizer"),
            "model_max_length": 512,
        },
        "text_encoder": {
            "model_id": "UMT5", "hub_backend": "hf", "from_pretrained": str(weights / "text_encoder"), "dtype": "fp32",
        },
    }  # fmt: skip
    of_the_sampler = {"sample_solver": "unipc", "solver_order": 2, "solver_type": "bh2", "num_inference_steps": 3,
                      "flow_shift": 3.0, "guidance_scale": 1.0, "batched_guidance": False}  # fmt: skip
    assert {name: said[name] for name in of_the_sampler} == of_the_sampler
    assert said["lora"] == [] and said["input_size"] == [9, 32, 48] and said["negative_prompt"] is None
    assert not {"tea_cache_l1_thresh", "sliding_window_size"} & said.keys()
    assert said["transformer"].keys() == {"path", "format", "dtype", "fingerprint"}


def test_every_value_is_printed_with_its_word(file: Path) -> None:
    text = file.read_text()
    for line in (
        "  seed: 5  # --seed\n", "  weights: ", "  # --load\n", "  prompts: prompts.txt  # prompt in model.json\n",
        "  shift: 3.0  # diffusion.flow_shift in model.json\n", "  guidance_scale: 1.0  # --guidance-scale\n",
        "  num_frames: 9  # pipeline_config.input_size in model.json\n", "    tiling: true  # ae.enable_tiling in m",
        "  progress_bar: false  # --no-progress-bar\n",
    ):  # fmt: skip
        assert line in text, text
    run = load_run(file)
    file.write_text(whole_file(run))
    assert load_run(file).values() == run.values()


def test_adapters_and_columns_are_read_back(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    more = [
        "--lora",
        "a.safetensors",
        "b",
        "--lora-strength",
        "0.5",
        "1",
        "--layerzero",
        "--layerzero-config",
        "z.yaml",
    ]
    Path("z.yaml").write_text("zero3_size: 1\n")
    translate_command.main(["--", "torchrun", "inference_sora.py", *command, *more])
    Path("run.yaml").write_text(capsys.readouterr().out)
    run = load_run(Path("run.yaml"))
    values = run.values()
    assert values["model.adapters"] == [{"path": "a.safetensors", "strength": 0.5}, {"path": "b", "strength": 1.0}]
    assert values["parallel.layerzero.zero3_size"] == 1
    Path("run.yaml").write_text(whole_file(run))
    assert load_run(Path("run.yaml")).values() == values


@pytest.mark.parametrize(
    ("keys", "value", "id", "told"),
    [
        ("output num_frames", 8, "CFG-060", "output.num_frames asks for 8 frames"),
        ("output width", 50, "CFG-061", "a width of 50 pixels"),
        ("model weights", None, "CFG-062", "model.weights in RUN does not say where the transformer is"),
        ("sampling batched_guidance", True, "CFG-063", "sampling.batched_guidance in RUN has no effect with"),
        ("model shape text_len", 16, "CFG-064", "encoders.tokenizer.model_max_length is 512, more than the 16"),
        (
            "inputs images",
            "i.txt",
            "CFG-120",
            "model_type is t2v (in_dim 16), which takes no inputs.images",
        ),
        ("inputs strength", 0.5, "CFG-121", "inputs.strength in RUN has no effect without inputs.videos"),
        ("inputs videos", "v.txt", "CFG-121", "inputs.videos in RUN is given without inputs.strength"),
        ("encoders vae tiling", False, "CFG-055", "encoders.vae.tiles has no effect"),
        ("inputs promts", "x", "CFG-003", 'unknown key "inputs.promts". Did you mean "prompts"?'),
        ("parallel", {"sequence_parallel": True}, "CFG-037", "parallel.sequence_parallel true has no effect"),
        ("parallel", {"tensor_size": 2}, "CFG-032", "1 processes do not divide"),
    ],
)
def test_rules_speak_of_the_file(file: Path, keys: str, value: Any, id: str, told: str) -> None:
    values = yaml.safe_load(file.read_text())
    *parents, name = keys.split()
    place = values
    for parent in parents:
        place = place[parent]
    place[name] = value
    file.write_text(yaml.safe_dump(values))
    found = refused(run_command.main, [str(file)])
    assert [text[:7] for text in found] == id.split(), found
    assert any(told.replace("RUN", str(file)) in text for text in found), found
    assert not any("--" in text for text in found), found


def test_flags_files_and_rules_are_refused_in_one_round(command: list[str]) -> None:
    """An unknown and a wrong flag, an unknown key, a wrong value, and rules that need none of these."""
    values = json.loads(Path("model.json").read_text())
    values["pipeline_config"]["input_size"] = [8, 32, 50]
    values["fpss"] = 3
    values["text_encoder"]["dtype"] = "fp8"
    values["image"] = "images.txt"
    Path("model.json").write_text(json.dumps(values))
    words = [*command, "--overwrit", "--strength", "0.5", "--fps", "many", "--lora-strength", "1"]
    for main, prefix in ((generate_command.main, []), (translate_command.main, ["--", "mm", "generate"])):
        found = refused(main, [*prefix, *words])
        assert sorted(text[:7] for text in found) == [
            "CFG-003", "CFG-005", "CFG-005", "CFG-007", "CFG-060", "CFG-061", "CFG-120", "CFG-121", "CFG-122",
        ], found  # fmt: skip
    assert not Path("clips").exists()


def test_a_flag_beside_the_file(file: Path) -> None:
    (told,) = refused(run_command.main, [str(file), "--num-inference-steps", "3"])
    assert told.startswith("CFG-190") and "Write sampling.steps into the file" in told


def test_the_example_runs_on_the_embedded_default(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "demo"
    place.mkdir()
    for name in ("configs", "weights"):
        (place / name).symlink_to(demo / name)
    (place / "prompts.txt").write_text((demo / "prompts.txt").read_text().splitlines()[0] + "\n")
    monkeypatch.chdir(tmp_path)
    run_command.main([str(ROOT / "examples" / "run_generation.yaml")])
    assert sorted(os.listdir(place / "videos")) == ["video_0000.json", "video_0000.mp4"]


def test_what_the_model_sees_is_encoded_in_tiles_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tiles of the given frame, and whole frames of the clip: a model of text alone is told that this is nothing."""
    monkeypatch.chdir(tmp_path)
    parts = tmp_path / "parts"
    write_model(parts, TASKS["wan22_i2v"])
    wan = write_transformer(Path("weights/wan22_i2v"), "wan22_i2v")
    Path("prompts.txt").write_text("a red disc")
    write_image(Path("start.png"), noise(3, SIDE, SIDE))
    Path("starts.txt").write_text("start.png")
    values = inference_json(parts, wan.model_copy(update={"text_len": 32}), image="starts.txt")
    values["diffusion"]["model_id"] = "FlowMatchEulerDiscreteScheduler"  # what it predicts last is the clip
    Path("model.json").write_text(json.dumps(values))
    words = ["--mm-model", "model.json", "--load", "weights/wan22_i2v", "--device", "cpu", "--no-progress-bar"]
    translate_command.main(["--", "mm", "generate", *words])
    run = yaml.safe_load(capsys.readouterr().out)
    clean: list[torch.Tensor] = []
    tiles = Tiles(size=(3, 3), stride=(2, 2))
    mm.generate_videos(
        mm.load_model("weights/wan22_i2v", dtype="fp32", device="cpu", task="wan22_i2v", text_len=32), "a red disc",
        mm.Encoders.of(parts, text_dtype="fp32", tiling=tiles), images=["start.png"], size=SIZE, steps=2, seed=7,
        guidance_scale=4.0, negative_prompt="a green disc", on_step=clean.append,
        solver="euler",
    )  # fmt: skip
    whole = VideoEncoder.from_pretrained(parts / "vae", "fp32", torch.device("cpu"))
    expected = decode(whole, clean[-1], SIZE, "VAE")[0].numpy()
    made = []
    for name, more in {
        "plain": {},
        "tiles": {"condition_tiling": True, "tiles": {"size": [3, 3], "stride": [2, 2]}},
    }.items():
        run["output"]["path"] = name
        Path("run.yaml").write_text(
            yaml.safe_dump({**run, "encoders": {**run["encoders"], "vae": run["encoders"]["vae"] | more}})
        )
        with keeping_frames(mm.generate.run):
            run_command.main(["run.yaml"])
        made.append(np.load(f"{name}/video_0000.npy"))
    plain, tiled = (np.abs(frames.astype(int) - expected).max() for frames in made)
    assert tiled <= 1 < 3 < plain  # where rounding to whole numbers is near its edge
    assert json.loads(Path("tiles/video_0000.json").read_text())["ae"]["condition_tiling"] is True


def test_tiles_of_nothing_are_refused(file: Path) -> None:
    file.write_text(file.read_text().replace("    tiling: true", "    tiling: true\n    condition_tiling: true"))
    [said] = refused(run_command.main, [str(file)])
    assert "CFG-055: encoders.vae.condition_tiling" in said and "nothing that T2V models see" in said
