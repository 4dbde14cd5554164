"""`mm translate` of VideoX-Fun's commands: a file for each run, which says the same again, and nothing is done."""

from pathlib import Path

import pytest
from videox_fun_files import DATA, home

from mm.cli import translate
from mm.cli.translate_scripts import documents_of
from mm.config.run.base import written
from mm.config.run.file import load_run
from mm.errors import ConfigError

MODEL = "models/Control"
WORDS = (
    f"--pretrained_model_name_or_path={MODEL} --train_data_dir={DATA} --train_data_meta={DATA}/metadata.json "
    "--train_mode=control_ref --trainable_modules . --enable_bucket --video_sample_n_frames=9 --train_batch_size=1 "
    "--num_train_epochs=3 --validation_prompts red --output_dir=output --use_deepspeed --low_vram "
    f"--validation_paths {DATA}/control/0000_red_left.mp4"
).split()
SCRIPT = "scripts/wan2.1_fun/train_control.py"
ZERO = ["accelerate", "launch", "--use_deepspeed", "--zero_stage", "3", "--num_processes", "4"]


@pytest.fixture(scope="module")
def folder(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return home(demo, tmp_path_factory.mktemp("videox"), {MODEL: "fun_control"})


@pytest.fixture(autouse=True)
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def test_every_run_of_a_command_is_printed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    translate.main(["--", *ZERO, SCRIPT, *WORDS])
    documents = capsys.readouterr().out.split("---\n")
    expected = documents_of([*ZERO, SCRIPT, *WORDS], {})
    assert documents == expected
    runs = []
    for number, text in enumerate(documents):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text)
        run = load_run(file, 4)
        assert not run.problems
        runs.append(written(run))
    features, training, clips = runs
    assert features["output"]["path"] == training["data"]["features"]["folder"] == "output/features"
    assert training["training"]["steps"] == 3 * 4  # of 16 clips on 4 processes
    assert training["parallel"]["layerzero"]["zero3_size"] == 4
    assert clips["inputs"]["prompts"] == training["validation"]["prompts"] == "output/sample/prompts.txt"
    assert "seed: 42" not in documents[0] and "  steps: 12  # --num_train_epochs\n" in documents[1]
    assert "# --low_vram changes nothing" in documents[1] and "prompts.txt: red\n" in documents[2]
    assert not (folder / "output").exists()


def test_what_the_command_refuses_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        translate.main(["--", *ZERO, SCRIPT, *WORDS, "--use_came", "--mixed_precision=fp16"])
    assert [problem.id for problem in caught.value.problems] == ["CFG-341", "CFG-341"]
    with pytest.raises(ConfigError) as caught:  # by python alone, nothing says what is sharded
        translate.main(["python", SCRIPT, *WORDS])
    assert [problem.id for problem in caught.value.problems] == ["CFG-342"]
