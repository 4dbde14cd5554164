"""`mm run` on an extraction: the features of the flags, byte for byte, and the file's own words for what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from feature_samples import write_data_set, write_extraction_files

from mm.cli import extract as extract_command
from mm.cli import run as run_command
from mm.cli import translate as translate_command
from mm.cli.doctor_data import main as doctor_data
from mm.config.run.file import load_run, short_file, whole_file
from mm.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
ROWS: list[dict[str, Any]] = [{"path": "1.mp4", "cap": "a red circle"}, {"path": "2.mp4", "cap": ["a", "b"]}]


@pytest.fixture
def command(tmp_path: Path, weights: Path) -> list[str]:
    """The words of an extraction of two clips for i2v, in tiles."""
    annotation = write_data_set(tmp_path / "set", ROWS, num_frames=14)
    files = write_extraction_files(
        tmp_path, weights, annotation, tmp_path / "set", tmp_path / "store", "i2v", min_num_frames=5
    )
    values = json.loads(files["mm_model"].read_text())
    values["ae"] |= {"enable_tiling": True, "tiling_param": {"tile_size": [4, 4], "tile_stride": [2, 2]}}
    files["mm_model"].write_text(json.dumps(values))
    words = [word for name, path in files.items() for word in (f"--{name.replace('_', '-')}", str(path))]
    return [*words, "--seed", "3", "--device", "cpu", "--num-workers", "1"]


@pytest.fixture
def file(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """What `mm translate` prints of it, with a folder of its own."""
    translate_command.main(["--", "mm", "extract", *command])
    path = tmp_path / "run.yaml"
    path.write_text(capsys.readouterr().out.replace(str(tmp_path / "store"), str(tmp_path / "other")))
    return path


def content(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def refused(main: Any, words: list[str]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        main(words)
    return [str(problem) for problem in caught.value.problems]


def test_a_translated_command_makes_the_same_bytes(command: list[str], file: Path, tmp_path: Path) -> None:
    extract_command.main(command)
    run_command.main([str(file)])
    assert content(tmp_path / "store") == content(tmp_path / "other")
    assert len(content(tmp_path / "store")) == 1 + 2 + 2 + 2 * 3, "recipe, plan, manifest and catalog, shards"
    with pytest.raises(DataError) as caught:  # told in the file's words
        file.write_text(file.read_text().replace("seed: 3 ", "seed: 4 "))
        run_command.main([str(file)])
    assert caught.value.id == "DATA-014" and "output.overwrite true" in str(caught.value)
    assert "--" not in str(caught.value)


def test_every_value_is_printed_with_its_word(file: Path, command: list[str]) -> None:
    text = file.read_text()
    for line in (
        "  task: i2v  # task in ", "  seed: 3  # --seed\n", "    min_num_frames: 5  # dataset_param.preprocess",
        "    tiling: true  # ae.enable_tiling in ", "      size: [4, 4]  # ae.tiling_param.tile_size in ",
        "  workers: 1  # --num-workers\n",
    ):  # fmt: skip
        assert line in text, text
    run = load_run(file)
    file.write_text(whole_file(run))
    again = load_run(file)
    assert again.values() == run.values() and short_file(again).count("# ") == short_file(run).count("# ")


@pytest.mark.parametrize(
    ("keys", "value", "id", "told"),
    [
        ("data clip num_frames", 8, "CFG-050", "RUN: data.clip.num_frames is 8"),
        ("data clip min_num_frames", 13, "CFG-052", "data.clip.min_num_frames is 13, more than data.clip.num_frames 9"),
        ("data on_bad_sample", "skip", "CFG-110", 'data.on_bad_sample is "skip"'),
        ("data folder", None, "CFG-053", "data.folder is missing"),
        ("encoders image", None, "CFG-074", "The task is i2v, and RUN has no encoders.image"),
        ("extraction task", "t2v", "CFG-074", "encoders.image in RUN has no effect with the task t2v"),
        (
            "encoders vae tiling",
            False,
            "CFG-055",
            "vae.tiles has no effect while encoders.vae.tiling is false",
        ),
        ("encoders vae tiles stride", [9, 9], "CFG-055 CFG-055", "tiles of height 4 every 9"),
        ("encoders vae tilez", 1, "CFG-003", 'unknown key "encoders.vae.tilez". Did you mean "tiles"?'),
        ("training", {}, "CFG-003 CFG-003 CFG-003 CFG-003 CFG-003 CFG-003", 'unknown key "extraction"'),
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
    if name == "training":  # a file with it is a training
        assert any(told in text for text in found)
        return
    assert [text[:7] for text in found] == id.split()
    assert any(told.replace("RUN", str(file)) in text for text in found), found
    assert not any("--" in text for text in found), found


def test_flags_files_and_rules_are_refused_in_one_round(command: list[str], tmp_path: Path) -> None:
    """An unknown flag, an unknown key, a wrong value, and rules that need none of these."""
    data, model = (Path(command[command.index(flag) + 1]) for flag in ("--mm-data", "--mm-model"))
    values = json.loads(data.read_text())
    values["dataset_param"]["preprocess_parameters"] |= {"num_frames": 8, "max_width": 50, "max_hight": 3}
    data.write_text(json.dumps(values))
    values = json.loads(model.read_text())
    values["ae"]["dtype"] = "fp8"
    del values["ae"]["i2v_processor"]
    model.write_text(json.dumps(values))
    words = [*command, "--num-workrs", "3", "--on-bad-sample", "skip"]
    for main, prefix in ((extract_command.main, []), (translate_command.main, ["--", "mm", "extract"])):
        found = refused(main, [*prefix, *words])
        assert sorted(text[:7] for text in found) == [
            "CFG-003", "CFG-005", "CFG-007", "CFG-050", "CFG-051", "CFG-074", "CFG-110",
        ], found  # fmt: skip
    assert not (tmp_path / "store").exists()


def test_a_rule_says_nothing_of_what_was_not_read(command: list[str]) -> None:
    """The task cannot be read: whether the image encoder belongs to it is not known."""
    tools = Path(command[command.index("--mm-tool") + 1])
    model = Path(command[command.index("--mm-model") + 1])
    tools.write_text("{")
    values = json.loads(model.read_text())
    del values["task"]
    model.write_text(json.dumps(values))
    assert [text[:7] for text in refused(extract_command.main, command)] == ["CFG-002"]


def test_the_doctor_reads_the_videos_of_a_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    doctor_data([str(file), "--quick"])
    assert capsys.readouterr().out.startswith("2 samples, all of them can be used")
    (told,) = refused(doctor_data, [str(file), "--seed", "4"])
    assert told.startswith("CFG-190") and "Write extraction.seed into the file" in told


def test_the_example_is_of_the_embedded_default(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its features are complete already, by a recipe that has the same key."""
    (tmp_path / "demo").symlink_to(demo)
    monkeypatch.chdir(tmp_path)
    before = content(demo / "features")
    run_command.main([str(ROOT / "examples" / "run_extraction.yaml")])
    assert content(demo / "features") == before
