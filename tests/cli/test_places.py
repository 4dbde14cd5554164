"""Places to write to that cannot work, and inputs that are not there, are told before anything heavy begins."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mm.cli import convert, doctor_data, extract, generate, migrate, plot, score, train
from mm.cli import demo as demo_command
from mm.config.flags import as_words
from mm.config.output import require_writable_file, require_writable_folder
from mm.errors import ConfigError, MMError

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "wan2.1"
TINY = "weights/Wan2.1-T2V-Tiny-Diffusers/transformer"


def flags_of(command: str, home: Path, target: Path, tmp_path: Path) -> dict[str, Any]:
    """A command line of each command that writes, all of it sound but for `target`."""
    configs = home / "configs"
    data, model = configs / "feature_data.json", configs / "pretrain_model.json"
    if command == "extract":
        (tmp_path / "tools.json").write_text(json.dumps({"sorafeature": {"save_path": str(target)}}))
    sizes = {"num_frames": 9, "max_height": 64, "max_width": 64}
    return {
        "demo": {"out": target},
        "extract": {
            "mm_data": configs / "data.json", "mm_model": configs / "model_wan.json", "mm_tool": tmp_path / "tools.json"
        },
        "migrate": {"source": home / "features", "target": target, **sizes},
        "train": {"mm_data": data, "mm_model": model, "load": home / TINY, "save": target, "lr": 1, "train_iters": 1},
        "doctor data": {"mm_data": data, "mm_model": model, "output": target},
        "convert": {"mode": "convert_to_mm", "source_path": home / TINY, "target_path": target},
        "convert a LoRA": {"mode": "lora_to_hf", "source_path": home / "a.safetensors", "target_path": target},
        "generate": {"mm_model": configs / "inference_model.json", "save_path": target},
        "score": {"videos": home / "dataset/videos", "prompts": home / "prompts.txt", "sheet": target},
        "plot": {"run": home, "out": target},
    }[command]  # fmt: skip


MAINS: dict[str, Callable[[list[str]], None]] = {
    "demo": demo_command.main, "extract": extract.main, "migrate": migrate.main, "train": train.main,
    "doctor data": doctor_data.main, "convert": convert.main, "convert a LoRA": convert.main,
    "generate": generate.main, "score": score.main, "plot": plot.main,
}  # fmt: skip
FILES = ("convert a LoRA", "score", "plot")


@pytest.mark.parametrize("command", MAINS)
def test_a_place_that_cannot_be_written_is_refused_at_once(command: str, demo: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    places = [tmp_path / "file" / "below" / "it", tmp_path / "dangling" / "x", tmp_path / ("x" * 300) / "y"]
    if command in FILES:
        places.append(tmp_path)  # a folder where a file is wanted
    elif command != "demo":  # which says that it exists
        places.append(tmp_path / "file")
    for place in places:
        with pytest.raises(ConfigError, match="CFG-131"):
            MAINS[command](as_words(flags_of(command, demo, place, tmp_path)))
    assert (tmp_path / "file").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} <= {"file", "dangling", "tools.json"}


@pytest.mark.parametrize("command", [name for name in MAINS if name != "extract"])
def test_an_empty_place_is_no_place(command: str, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script's unset variable must not be the current folder."""
    monkeypatch.chdir(tmp_path)
    words = as_words(flags_of(command, demo, Path("TARGET"), tmp_path))
    with pytest.raises(ConfigError, match=r"CFG-005: --\S+ is empty"):
        MAINS[command](["" if word == "TARGET" else word for word in words])
    assert not list(tmp_path.iterdir())


def test_who_may_not_write_is_told(tmp_path: Path) -> None:
    """As somebody else than root, who may write anywhere."""
    (tmp_path / "closed").mkdir(mode=0o555)
    code = (
        "import os, sys\n"
        "from mm.config.output import require_writable_file, require_writable_folder\n"
        "from mm.errors import ConfigError\n"
        "if os.geteuid() == 0: os.setresuid(65534, 65534, 65534)\n"
        "for check in (require_writable_file, require_writable_folder):\n"
        "    try: check(sys.argv[1] + '/a/b', '--out'); print('taken')\n"
        "    except ConfigError as error: print(error)\n"
    )
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == "root" and folder != Path(folder.anchor) and folder.stat().st_mode & 0o001 == 0:
            folder.chmod(folder.stat().st_mode | 0o011)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "closed")], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("CFG-131") == 2 and "may not be written to" in done.stdout


def test_what_can_be_written_is_let_pass_and_nothing_is_made(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    for place in ("there", "link", "new", "new/a/b", "link/new"):
        require_writable_folder(tmp_path / place, "--out")
        require_writable_file(tmp_path / place / "x.png", "--out")
    assert {path.name for path in tmp_path.rglob("*")} == {"there", "link"}


@pytest.mark.parametrize("task", ["t2v", "i2v", "flf2v"])
def test_a_generation_without_its_inputs_ends_before_torch(task: str, tmp_path: Path) -> None:
    """The shipped files name weights and images that a fresh checkout does not have."""
    code = (
        "import sys\nfrom mm.cli.generate import main\nfrom mm.errors import MMError\n"
        "try: main(sys.argv[1:])\nexcept MMError as error: print(error)\n"
        "print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    words = as_words(
        {"mm_model": EXAMPLES / "14b" / task / "inference_model.json", "load": "no/weights", "lora": ["no"]}
    )
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    ids = [line.partition(":")[0] for line in lines[:-1]]
    encoders = ["DATA-040"] * (2 if task == "t2v" else 3)
    images = [] if task == "t2v" else ["DATA-001"]
    assert ids == ["DATA-020", "DATA-022", *encoders, "DATA-043", *images]
    assert lines[-1] == "[]"


def test_an_extraction_without_its_encoders_says_all_that_is_missing(demo: Path, tmp_path: Path) -> None:
    files = flags_of("extract", demo, tmp_path / "store", tmp_path)
    model = json.loads((demo / "configs" / "model_wan.json").read_text())
    for part in ("ae", "text_encoder"):
        model[part]["from_pretrained"] = "nowhere"
    (tmp_path / "model.json").write_text(json.dumps(model))
    with pytest.raises(MMError) as caught:
        extract.main(as_words({**files, "mm_model": tmp_path / "model.json"}))
    assert [problem.id for problem in caught.value.problems] == ["DATA-040", "DATA-040"]
