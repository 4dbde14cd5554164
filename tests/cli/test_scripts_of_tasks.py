"""The example scripts of each task, from videos to a checkpoint; and the files that are shipped with them."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from example_runs import (
    EXAMPLES,
    EXTRACTION,
    bash,
    few_clips,
    finetune_on_two_processes,
    in_tiny,
    pretrain_on_two_processes,
)
from mindspeed_alone import load_extract_model, load_extract_tools, load_generation, load_pretrain_model
from ranks import ANY_PORT
from script_words import words_of
from store_content import listed

from mm.config.base import load
from mm.config.flags import parse_flags
from mm.config.model import PUBLISHED
from mm.config.rules.extraction import check_extraction
from mm.config.tasks.registry import FEATURE_TASKS
from mm.demo.components import MODEL_NAMES
from mm.dialects.mindspeed.extraction import read_extraction
from mm.dialects.mindspeed.files import load_extract_data, load_train_data
from mm.dialects.mindspeed.generate_flags import GenerateFlags
from mm.dialects.mindspeed.inference_json import InferenceModel
from mm.dialects.mindspeed.pretrain_json import PretrainModel
from mm.dialects.mindspeed.train_flags import TrainFlags

ROOT = EXAMPLES.parent
FEATURES = EXAMPLES / "wan2.1" / "feature_extract"
FOLDERS = {
    "fun_inp": "fun_inp",
    "control": "fun_control",
    "control_ref": "fun_control_ref",
    "camera": "fun_camera",
    "vace": "vace",
}
TASKS = {
    "wan2.1/1.3b/i2v": "i2v",
    "wan2.1/14b/i2v": "i2v",
    "wan2.1/14b/flf2v": "flf2v",
    **{f"wan2.1/{size}/{folder}": task for size in ("1.3b", "14b") for folder, task in FOLDERS.items()},
    "wan2.1/1.3b/speedcontrol": "speedcontrol",
    "wan2.2/ti2v_5b": "ti2v",
}
"""Folders of scripts, and the task whose features they train on."""
SHARED_CLIPS = ["wan2.1/14b/i2v", "wan2.1/14b/flf2v", "wan2.1/14b/vace"]
"""Those whose clips two processes share."""
SHAPES = {
    "wan2.1/1.3b/fun_inp": "Wan2.1 Fun-InP 1.3B",
    "wan2.1/14b/fun_inp": "Wan2.1 I2V 14B",
    **{
        f"wan2.1/{size.lower()}/{folder}": f"Wan2.1 {FEATURE_TASKS[task].title} {size}"
        for size in ("1.3B", "14B")
        for folder, task in FOLDERS.items()
        if folder != "fun_inp"
    },
    "wan2.1/1.3b/speedcontrol": "Wan2.1 SpeedControl 1.3B",
    "wan2.2/t2v_a14b": "Wan2.1 T2V 14B",
    "wan2.2/i2v_a14b": "Wan2.2 I2V A14B",
    "wan2.2/ti2v_5b": "Wan2.2 TI2V 5B",
}
"""Folders of scripts, and the published model whose shape their files say."""
EXPERTS = {"t2v_a14b": "t2v", "i2v_a14b": "wan22_i2v"}
BANDS = {("t2v_a14b", "high"): (0.875, None), ("t2v_a14b", "low"): (None, 0.875)} | {
    ("i2v_a14b", "high"): (0.9, None),
    ("i2v_a14b", "low"): (None, 0.9),
}
READERS: dict[str, Callable[[Path, Any], Any]] = {
    "data.json": load_extract_data,
    "model_wan.json": load_extract_model,
    "tools.json": load_extract_tools,
    "feature_data.json": load_train_data,
}


@pytest.fixture(scope="module")
def features(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The files of a task for four clips, with features that the script of extraction has made on two processes."""
    made: dict[str, Path] = {}

    def of(task: str) -> Path:
        if task not in made:
            files = tmp_path_factory.mktemp("features") / task
            few_clips(demo / "configs" / ("" if task == "t2v" else task), files)
            named = {"MM_DATA": "data.json", "MM_MODEL": "model_wan.json", "MM_TOOL": "tools.json"}
            variables = {variable: str(files / name) for variable, name in named.items()} | {"TASK": task}
            variables |= {"NPUS_PER_NODE": "2", "MASTER_PORT": ANY_PORT, "LOG_DIR": str(files / "logs")}
            bash(EXTRACTION, "--device", "cpu", timeout_s=120, **variables)
            assert len(listed(files / "store")) == 4
            made[task] = files
        return made[task]

    return of


@pytest.mark.nightly
@pytest.mark.parametrize("script", TASKS)
def test_scripts_from_videos_to_a_checkpoint(
    demo: Path, tmp_path: Path, features: Callable[[str], Path], script: str
) -> None:
    """Extraction, training and LoRA of each task by their scripts, all on two processes, with the shipped objective."""
    task, replicas = TASKS[script], 1 if script in SHARED_CLIPS else 2
    data = features(task) / "feature_data.json"
    tiny = demo / "configs" / task / "pretrain_model.json"
    model = in_tiny(EXAMPLES / script / "pretrain_model.json", tiny, tmp_path / "model.json")
    weights = demo / "weights" / MODEL_NAMES[task] / "transformer"
    rows = pretrain_on_two_processes(script, data, model, weights, tmp_path)
    assert [row["consumed_samples"] for row in rows] == [4 * replicas, 8 * replicas]
    layout = f"CP {2 // replicas} x DP {replicas}"
    assert layout in (tmp_path / "run" / "train.log").read_text()
    checkpoint = finetune_on_two_processes(script, data, model, weights, tmp_path)
    assert (checkpoint / "pytorch_lora_weights.safetensors").is_file()
    assert layout in (tmp_path / "lora" / "train.log").read_text()


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "expert"), BANDS)
def test_an_expert_is_trained_on_its_band(
    demo: Path, tmp_path: Path, features: Callable[[str], Path], name: str, expert: str
) -> None:
    """The checkpoint records the band of the file that EXPERT names."""
    task, script = EXPERTS[name], f"wan2.2/{name}"
    configs = demo / "configs" / ("" if task == "t2v" else task)
    data = configs / "feature_data.json" if task == "t2v" else features(task) / "feature_data.json"
    shipped = EXAMPLES / script / f"pretrain_model_{expert}.json"
    model = in_tiny(shipped, configs / "pretrain_model.json", tmp_path / "model.json")
    weights = demo / "weights" / MODEL_NAMES[task] / "transformer"
    rows = pretrain_on_two_processes(script, data, model, weights, tmp_path, EXPERT=expert)
    assert [row["consumed_samples"] for row in rows] == [8, 16]
    manifest = json.loads((tmp_path / "run" / "iter_0000002" / "manifest.json").read_text())
    objective = next(values["objective"] for values in _sections(manifest) if "objective" in values)
    assert (objective["band_from"], objective["band_below"]) == BANDS[name, expert]
    if (name, expert) == ("i2v_a14b", "high"):
        finetune_on_two_processes(script, data, model, weights, tmp_path)


@pytest.mark.nightly
def test_experts_that_were_trained_make_clips_in_their_places(demo: Path, tmp_path: Path) -> None:
    """Runs of both by the scripts, and generation from their folders; swapped ones are refused."""
    configs, script = demo / "configs", EXAMPLES / "wan2.2" / "t2v_a14b"
    weights = demo / "weights" / MODEL_NAMES["t2v"] / "transformer"
    for expert in ("high", "low"):
        (tmp_path / expert).mkdir()
        shipped, tiny = script / f"pretrain_model_{expert}.json", configs / "pretrain_model.json"
        model = in_tiny(shipped, tiny, tmp_path / expert / "model.json")
        pretrain_on_two_processes("wan2.2/t2v_a14b", configs / "feature_data.json", model, weights, tmp_path / expert)
    values, shipped_values = (json.loads((folder / "inference_model.json").read_text()) for folder in (configs, script))
    (tmp_path / "model.json").write_text(json.dumps(values | {"low_noise": shipped_values["low_noise"]}))
    (tmp_path / "prompts.txt").write_text("a red circle moving left\n")
    runs = [str(tmp_path / expert / "run") for expert in ("high", "low")]
    for high, low, code in ((*runs, 0), (*reversed(runs), 64)):
        variables = {
            "NPUS_PER_NODE": "1", "TP": "1", "MM_MODEL": str(tmp_path / "model.json"), "LOAD_PATH": high,
            "LOW_NOISE": low, "PROMPT": str(tmp_path / "prompts.txt"), "SAVE_PATH": str(tmp_path / f"clips{code}"),
        }  # fmt: skip
        done = subprocess.run(
            ["bash", script / "inference.sh", "--num-inference-steps", "4", "--device", "cpu"],
            env={**os.environ, **variables}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, "CFG-295" in done.stderr) == (code, code != 0), done.stderr[-2000:]
    assert (tmp_path / "clips0" / "video_0000.mp4").is_file() and not (tmp_path / "clips64").exists()


def _sections(values: Any) -> list[dict[str, Any]]:
    """All sections of a JSON file."""
    if isinstance(values, list):
        return [found for value in values for found in _sections(value)]
    return [values, *_sections(list(values.values()))] if isinstance(values, dict) else []


@pytest.mark.parametrize("expert", ["high", "low"])
@pytest.mark.parametrize("name", EXPERTS)
def test_scripts_of_two_experts_name_each_in_its_place(tmp_path: Path, name: str, expert: str) -> None:
    folder = EXAMPLES / "wan2.2" / name
    weights = {"high": "transformer", "low": "transformer_2"}
    for stage in ("pretrain", "finetune_lora"):
        _, module, words = words_of(folder / f"{stage}.sh", tmp_path, EXPERT=expert, NPUS_PER_NODE="1")
        flags = parse_flags(TrainFlags, words, program=module)
        assert Path(flags.mm_model).samefile(folder / f"pretrain_model_{expert}.json")
        loaded = flags.load_base_model if flags.lora else flags.load
        assert loaded is not None and Path(loaded).parts[-2:] == (_released(name), weights[expert])
        assert flags.save is not None and f"-{expert}" in flags.save
        diffusion = load(PretrainModel, Path(flags.mm_model)).diffusion
        assert (diffusion.band_from, diffusion.band_below) == BANDS[name, expert]
    _, module, words = words_of(folder / "inference.sh", tmp_path, NPUS_PER_NODE="1")
    found = parse_flags(GenerateFlags, words, program=module)
    assert found.load is not None and found.low_noise is not None
    assert (Path(found.load).name, Path(found.low_noise).name) == ("transformer", "transformer_2")
    low = load(InferenceModel, folder / "inference_model.json").low_noise
    assert low is not None and low.boundary == BANDS[name, "high"][0]


def _released(name: str) -> str:
    return f"Wan2.2-{name.split('_')[0].upper()}-A14B-Diffusers"


@pytest.mark.parametrize("stage", ["pretrain", "finetune_lora"])
def test_scripts_of_ti2v_name_its_files(tmp_path: Path, stage: str) -> None:
    folder = EXAMPLES / "wan2.2" / "ti2v_5b"
    _, module, words = words_of(folder / f"{stage}.sh", tmp_path, NPUS_PER_NODE="1")
    flags = parse_flags(TrainFlags, words, program=module)
    assert Path(flags.mm_model).samefile(folder / "pretrain_model.json")
    assert Path(flags.mm_data).samefile(FEATURES / "ti2v" / "feature_data.json")
    loaded = flags.load_base_model if flags.lora else flags.load
    assert loaded is not None and Path(loaded).parts[-2:] == ("Wan2.2-TI2V-5B-Diffusers", "transformer")


def test_an_expert_that_does_not_exist(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", EXAMPLES / "wan2.2" / "t2v_a14b" / "pretrain.sh"],
        env={**os.environ, "EXPERT": "middle", "SAVE_PATH": str(tmp_path / "run")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr[:13]) == (64, "error ENV-007")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "file", sorted(EXAMPLES.rglob("*.json")), ids=lambda path: str(path.relative_to(EXAMPLES).with_suffix(""))
)
def test_every_shipped_file_is_read_whole(file: Path) -> None:
    """Nothing in it is refused, dropped or read otherwise; lists that it names have a line for each prompt."""
    if file.name == "inference_model.json":
        given = {"image": "images.txt"} if file.parent.name == "fun_inp" else {}
        run = load_generation(GenerateFlags(mm_model=str(file), load="weights", **given))
        assert run.notes == ()
        listed = {**run.inputs.lists, **run.inputs.columns, "prompts": run.inputs.prompts}
        lines = [(ROOT / path).read_text().splitlines() for path in listed.values() if path not in given.values()]
        assert len({len(found) for found in lines}) == 1
        return
    notes: list[Any] = []
    reader = load_pretrain_model if file.name.startswith("pretrain_model") else READERS[file.name]
    assert reader(file, notes) is not None
    assert notes == []


@pytest.mark.parametrize("script", SHAPES)
def test_shipped_shapes_are_published_ones(script: str) -> None:
    shape = PUBLISHED[SHAPES[script]]
    files = sorted((EXAMPLES / script).glob("pretrain_model*.json"))
    assert len(files) == (2 if "a14b" in script else 1)
    assert all(load(PretrainModel, file).predictor.wan() == shape for file in files)
    assert load(InferenceModel, EXAMPLES / script / "inference_model.json").predictor.wan() == shape


@pytest.mark.parametrize("task", [task for task in FEATURE_TASKS if (FEATURES / task / "feature_data.json").is_file()])
def test_features_are_those_that_training_asks_for(tmp_path: Path, task: str) -> None:
    """The files that the script of extraction finds by TASK, and those of training, agree on task, size and folder."""
    _, module, words = words_of(EXTRACTION, tmp_path, TASK=task, NPUS_PER_NODE="1", LOG_DIR=str(tmp_path / "logs"))
    assert module == "mm.cli.extract"
    run = read_extraction(words)
    check_extraction(run)
    assert run.task.name == task
    values = load_train_data(FEATURES / task / "feature_data.json").dataset_param
    asked, clip = values.preprocess_parameters, run.data.clip
    assert (asked.num_frames, asked.frame_interval) == (clip.num_frames, clip.frame_interval)
    assert (asked.max_height, asked.max_width) == (clip.height, clip.width)
    assert (ROOT / values.basic_parameters.data_path).read_text().strip() == run.output.path
    rates = {name for name, rate in asked.condition_dropout if rate}
    assert rates <= FEATURE_TASKS[task].dropped


def test_the_script_of_extraction_takes_every_task(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", EXTRACTION], env={**os.environ, "TASK": "i2i", "LOG_DIR": str(tmp_path / "logs")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr[:13]) == (64, "error ENV-005")
    named = set(done.stderr.partition("use one of ")[2].rstrip(".\n").split())
    assert set(FEATURE_TASKS) <= named <= set(FEATURE_TASKS)
    assert not (tmp_path / "logs").exists()


def reports(script: str, *, lora: bool = False) -> dict[str, Any]:
    """The dry run of a script as it is shipped."""
    name = "finetune_lora.sh" if lora else "pretrain.sh"
    output = bash(EXAMPLES / script / name, "--json-output", timeout_s=400, DRY_RUN="1")
    found: dict[str, Any] = json.loads(output)
    return found


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("script", "tokens", "full", "lora"),
    [
        ("wan2.1/14b/fun_inp", 32_760, 47.9, 52.3),
        ("wan2.1/14b/control", 32_760, 47.9, 52.3),
        ("wan2.1/14b/control_ref", 34_320, 49.0, 53.3),
        ("wan2.1/14b/camera", 32_760, 50.4, 53.9),
        ("wan2.1/14b/vace", 32_760, 49.6, 47.4),
        ("wan2.2/t2v_a14b", 32_760, 43.9, 47.7),
        ("wan2.2/i2v_a14b", 32_760, 43.9, 47.7),
        ("wan2.2/ti2v_5b", 27_280, 44.8, 18.9),
    ],
)
def test_memory_of_the_shipped_scripts(script: str, tokens: int, full: float, lora: float) -> None:
    """Predicted, in GiB, on 8 devices: of 64 GB (59.6 GiB) some are left for what no program can know."""
    for report, expected in ((reports(script), full), (reports(script, lora=True), lora)):
        assert (report["world_size"], report["tokens"]) == (8, tokens)
        assert report["peak_bytes"] / 2**30 == pytest.approx(expected, abs=1)
        assert report["peak_bytes"] < 55 * 2**30
