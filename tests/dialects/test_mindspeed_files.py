"""MindSpeed-MM's own files of today: what means the same is taken and told once, what differs is refused at once."""

import copy
import json
import shlex
from pathlib import Path
from typing import Any

import mindspeed_files as theirs
import pytest
from mindspeed_alone import load_extract_model, load_extract_tools, load_generation, load_pretrain_model

from mm.cli import migrate
from mm.config.flags import parse_flags
from mm.config.rules.extraction import check_extraction
from mm.config.rules.training import check_training
from mm.dialects.mindspeed.accepted import Note, settle
from mm.dialects.mindspeed.accepted_flags import ACCEPTED_GENERATE_FLAGS, take_accepted
from mm.dialects.mindspeed.extraction import read_extraction
from mm.dialects.mindspeed.files import load_extract_data, load_train_data
from mm.dialects.mindspeed.generate_flags import GenerateFlags
from mm.dialects.mindspeed.training import read_training
from mm.errors import ConfigError


def write(folder: Path, name: str, values: Any) -> Path:
    path = folder / name
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def told(folder: Path, size: str, task: str, more: str = "", *, lora: bool = False, **files: Any) -> list[str]:
    """Every problem that one start of a script tells."""
    model = write(folder, "m.json", files.get("model", theirs.pretrain_model(size, task)))
    data = write(folder, "d.json", files.get("data", theirs.feature_data(task)))
    zero = write(folder, "zero.yaml", theirs.ZERO)
    words = theirs.train_words(size, task, lora=lora).replace("zero.yaml", str(zero))
    try:
        check_training(read_training(shlex.split(f"--mm-model {model} --mm-data {data} {words} {more}"), 8))
    except ConfigError as error:
        return [str(problem) for problem in error.problems]
    return []


@pytest.mark.parametrize(
    ("size", "task", "lora", "noted"),
    [
        ("1.3b", "t2v", False, []),
        ("1.3b", "i2v", False, ["--sequence-parallel (without tensor parallelism there is nothing to cut)"]),
        ("14b", "t2v", False, ["--ckpt-format torch (checkpoints of layer-zero are torch_dist"]),
        ("14b", "i2v", False, ["--ckpt-format torch (checkpoints of layer-zero are torch_dist"]),
        ("1.3b", "t2v", True, ["--load base (read as the base model", "--ckpt-format torch (checkpoints of adapters"]),
        ("14b", "t2v", True, ["--load base (read as the base model", "--ckpt-format torch (checkpoints of adapters"]),
        ("14b", "i2v", True, ["--load base (read as the base model", "--ckpt-format torch (checkpoints of adapters"]),
    ],
)
def test_a_script_starts_and_tells_once_what_it_takes(
    tmp_path: Path, size: str, task: str, lora: bool, noted: list[str]
) -> None:
    for more in ("", theirs.DUMMIES):
        assert told(tmp_path, size, task, more, lora=lora) == []
    words = shlex.split(theirs.train_words(size, task, lora=lora).replace("zero.yaml", str(tmp_path / "zero.yaml")))
    run = read_training(["--mm-model", str(tmp_path / "m.json"), "--mm-data", str(tmp_path / "d.json"), *words], 8)
    (flags,) = (note for note in run.notes if note.startswith("flags: "))
    assert all(flags.count(note) == 1 for note in noted), flags
    assert (run.adapters is not None) == lora and (lora or run.checkpoint.load == "weights")
    if lora:
        assert run.adapters is not None and (run.adapters.base, run.checkpoint.load) == ("base", None)
        assert run.word("adapters.base") == "--load"
    assert run.checkpoint.format == ("torch_dist" if lora or size == "14b" else "torch")
    assert not run.parallel.sequence_parallel


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_their_extraction_starts(tmp_path: Path, task: str, early: bool) -> None:
    data = write(tmp_path, "data.json", theirs.extract_data(task))
    model, tools = (
        write(tmp_path, "model_wan.json", theirs.extract_model(task)),
        write(tmp_path, "tools.json", theirs.extract_tools()),
    )
    words = f"--mm-data {data} --mm-model {model} --mm-tool {tools} {theirs.extract_words(early=early)}"
    if task == "i2v":  # a clip of one frame is its own first frame: refused, with what to write, in the one round
        with pytest.raises(ConfigError) as caught:
            check_extraction(read_extraction(shlex.split(words)))
        assert [(problem.id, problem.remedy) for problem in caught.value.problems] == [("CFG-075", "Use at least 5.")]
        values = theirs.extract_data(task)
        values["dataset_param"]["preprocess_parameters"]["min_num_frames"] = 5
        write(tmp_path, "data.json", values)
    run = read_extraction(shlex.split(words))
    check_extraction(run)
    assert (run.task.name, run.data.clip.reader, run.data.workers) == (task, "decord", 8)
    assert run.encoders.vae.tiles is not None and run.encoders.vae.tiles.size == (34, 34)
    assert run.encoders.vae.tiles_of_conditions() == (None if task == "i2v" else run.encoders.vae.tiles)
    assert [note.partition(":")[0] for note in run.notes] == ["flags", str(data), str(model), str(tools)]
    for key in ("train_pipeline", "hw_aspect_thr", "min_hxw"):
        assert sum(note.count(f"preprocess_parameters.{key} ") for note in run.notes) == 1


@pytest.mark.parametrize(
    ("stage", "step"),
    [
        ("video_only", {"trans_type": "RandomHorizontalFlipVideo"}),
        ("video_only", {"trans_type": "CenterCropResizeVideo", "param": {"transform_size": [256, 256]}}),
        ("video_only", {"trans_type": "norm_fun", "param": {"mean": [0.4, 0.5, 0.5]}}),
        ("video_and_first_frame", {"trans_type": "ResizeVideo", "param": {"interpolation_mode": "nearest"}}),
        ("image_only", {"trans_type": "ResizeVideo"}),
    ],
)
def test_other_transforms_are_refused(tmp_path: Path, stage: str, step: dict[str, Any]) -> None:
    values = copy.deepcopy(theirs.extract_data())
    values["dataset_param"]["preprocess_parameters"]["train_pipeline"].setdefault(stage, []).append(step)
    with pytest.raises(ConfigError, match=r"CFG-008: .*train_pipeline.* has no effect here"):
        load_extract_data(write(tmp_path, "d.json", values))


@pytest.mark.parametrize(("size", "task"), [("1.3b", "t2v"), ("1.3b", "i2v"), ("14b", "t2v"), ("14b", "i2v")])
def test_their_values_arrive(tmp_path: Path, size: str, task: str) -> None:
    notes: list[Note] = []
    model = load_pretrain_model(write(tmp_path, "m.json", theirs.pretrain_model(size, task)), notes)
    assert (model.predictor.num_layers, model.predictor.model_type) == (theirs.SHAPES[size]["num_layers"], task)
    assert model.predictor.img_dim == (None if task == "t2v" else 1280)
    assert {note.key for note in notes} >= {"predictor.qk_norm_type", "predictor.max_seq_len"}
    data = load_train_data(write(tmp_path, "d.json", theirs.feature_data(task)), notes)
    assert data.dataset_param.tokenizer_config is None and data.dataloader_param.shuffle
    assert load_extract_data(write(tmp_path, "e.json", theirs.extract_data())).dataset_param.dataset_type == "t2v"
    extract = load_extract_model(write(tmp_path, "x.json", theirs.extract_model(task)), notes)
    assert extract.text_encoder.from_pretrained == "w/text_encoder"
    assert load_extract_tools(write(tmp_path, "t.json", theirs.extract_tools())).sorafeature.save_path


@pytest.mark.parametrize(
    ("size", "task"), [("1.3b", "t2v"), ("14b", "t2v"), ("1.3b", "i2v"), ("14b", "i2v"), ("1.3b", "v2v")]
)
def test_their_generation_starts(tmp_path: Path, size: str, task: str) -> None:
    words, notes = take_accepted(
        shlex.split(
            "--load weights --mm-model X --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 "
            "--context-parallel-size 1 --micro-batch-size 1 --global-batch-size 1 --lr 5e-6 --min-lr 1e-6 "
            "--train-iters 5010 --weight-decay 0 --clip-grad 0 --adam-beta1 0.9 --adam-beta2 0.999 "
            "--no-gradient-accumulation-fusion --no-load-optim --no-load-rng --no-save-optim --no-save-rng --bf16 "
            "--attention-mask-type general --distributed-backend nccl"
        ),
        ACCEPTED_GENERATE_FLAGS,
    )
    assert len(notes) == 17
    path = write(tmp_path, "i.json", theirs.inference(size, task))
    flags = parse_flags(GenerateFlags, [str(path) if word == "X" else word for word in words], program="mm generate")
    run = load_generation(flags)
    assert (run.task, run.encoders.vae.precision, run.model.weights) == (task, "fp32", "weights")
    if task == "v2v":
        assert (run.inputs.strength, run.inputs.start_frame) == (0.7, 0)
    (note,) = run.notes
    assert note.count("ae.dtype float32 (read as fp32)") == 1


DIFFERENT: list[tuple[str, str, Any]] = [
    ("data", "dataset_param.use_feature_data", False),
    ("data", "dataset_param.text_preprocess_methods", {"method": "lower"}),
    ("data", "dataloader_param.group_frame", True),
    ("data", "dataloader_param.drop_last", False),
    ("data", "dataloader_param.batch_size", 4),
    ("data", "dataloader_param.initial_global_step_for_sampler", 7),
    ("data", "dataloader_param.sampler_type", "BucketBatchSampler"),
]


@pytest.mark.parametrize(("file", "key", "value"), DIFFERENT)
def test_what_differs_is_refused(tmp_path: Path, file: str, key: str, value: Any) -> None:
    values = copy.deepcopy(theirs.feature_data("t2v"))
    section, name = key.split(".")
    values[section][name] = value
    (text,) = told(tmp_path, "1.3b", "t2v", **{file: values})
    assert text.startswith("CFG-008") and f'"{key}"' in text


def test_flags_and_both_files_are_refused_in_one_round(tmp_path: Path) -> None:
    model, data = theirs.pretrain_model("14b", "t2v"), theirs.feature_data("t2v")
    model["predictor"] |= {"qk_norm_type": "layernorm", "FPDT": True}
    data = copy.deepcopy(data)
    data["dataset_param"]["use_feature_data"] = False
    more = "--num-layers 2 --attention-mask-type causal --optimizer-selection fused_ema_adamw"
    found = told(tmp_path, "14b", "t2v", more, model=model, data=data)
    for part in (
        "--num-layers",
        "--attention-mask-type",
        "--optimizer-selection",
        "qk_norm_type",
        "FPDT",
        "use_feature",
    ):
        assert sum(part in text for text in found) == (3 if part == "FPDT" else 1), (part, found)


def test_what_is_taken_is_told_once(tmp_path: Path) -> None:
    model = write(tmp_path, "m.json", theirs.pretrain_model("1.3b", "t2v"))
    data = write(tmp_path, "d.json", theirs.feature_data("t2v"))
    words = shlex.split(f"--mm-model {model} --mm-data {data} {theirs.train_words('1.3b', 't2v')}")
    notes = read_training(words, 8).notes
    assert [note.partition(":")[0] for note in notes] == ["flags", str(model), str(data)]
    assert "predictor.img_dim 1280 (models of this task take no images)" in notes[1]
    assert "speed_factor 1.0" in notes[2] and "dataset_param.dataset_type feature (read as t2v)" in notes[2]
    _, flags = take_accepted(words)
    assert {note.key for note in flags} == {
        "--no-gradient-accumulation-fusion", "--no-save-rng", "--attention-mask-type", "--distributed-backend",
        "--mm-tool", "--eval-iters", "--eval-interval",
    }  # fmt: skip


def test_a_file_is_not_changed_by_being_read() -> None:
    values = theirs.inference("14b", "i2v")
    before = copy.deepcopy(values)
    settle(values, "inference_model.json")
    assert values == before


@pytest.mark.parametrize(
    ("name", "values", "load"),
    [
        ("feature_data.json", theirs.feature_data("i2v"), load_train_data),
        ("data.json", theirs.extract_data(), load_extract_data),
        ("pretrain_model.json", theirs.pretrain_model("14b", "i2v"), load_pretrain_model),
        ("model_wan.json", theirs.extract_model("i2v"), load_extract_model),
        ("tools.json", theirs.extract_tools(), load_extract_tools),
    ],
)
def test_a_migrated_file_needs_nothing_more(
    tmp_path: Path, name: str, values: dict[str, Any], load: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = write(tmp_path, name, values), tmp_path / f"new-{name}"
    migrate.main(["config", str(old), str(new)])
    text = capsys.readouterr().out
    notes: list[Note] = []
    assert load(new, notes) == load(old) and notes == []
    assert "dropped" in text or "written otherwise" in text
    assert json.loads(old.read_text()) == values


def test_a_migrated_generation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = theirs.inference("14b", "i2v") | {"frame_interval": 2}
    old, new = write(tmp_path, "inference_model.json", values), tmp_path / "new.json"
    migrate.main(["config", str(old), str(new)])
    assert "frame_interval 2: Remove it; clips are made of consecutive frames" in capsys.readouterr().out
    assert load_generation(GenerateFlags(mm_model=str(new), load="w")).notes == ()


@pytest.mark.parametrize(
    ("values", "id"),
    [({"dataset_param": {}}, "CFG-004"), ({"what": 1}, "CFG-192"), ([], "CFG-192"), ("{", "CFG-002")],
)
def test_what_cannot_be_migrated(tmp_path: Path, values: Any, id: str) -> None:
    old = write(tmp_path, "x.json", values)
    with pytest.raises(ConfigError, match=id):
        migrate.main(["config", str(old), str(tmp_path / "new.json")])
    assert not (tmp_path / "new.json").exists()


def test_an_existing_file_is_not_replaced(tmp_path: Path) -> None:
    old = write(tmp_path, "d.json", theirs.feature_data("t2v"))
    with pytest.raises(ConfigError, match="CFG-193"):
        migrate.main(["config", str(old), str(old)])
    assert json.loads(old.read_text()) == theirs.feature_data("t2v")
