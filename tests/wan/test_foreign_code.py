"""Model folders of other people whose files ask for code: none runs, and no question is asked.

Each folder has the Python file that its JSON names; whoever imports it leaves the canary. Everything runs in processes
whose standard input says "y" for ever.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from feature_samples import write_data_set, write_encoders, write_extraction_files

ROOT = Path(__file__).parents[2]
EVIL = 'open({canary!r}, "w").close()\nfrom transformers import PreTrainedTokenizerFast as Evil\n'
LOAD = """
import json, sys
from pathlib import Path
import torch
from mm.errors import MMError
from mm.wan.encoders import TextEncoder, VideoEncoder
from mm.wan.image_encoder import ImageEncoder
CPU = torch.device("cpu")
def load(folder):
    VideoEncoder.from_pretrained(folder / "vae", "fp32", CPU)
    ImageEncoder.from_pretrained(folder / "image_encoder", "fp32", CPU)
    TextEncoder.from_pretrained(folder / "text_encoder", folder / "tokenizer", "fp32", CPU)
for name in sys.argv[1:]:
    try:
        load(Path(name))
        print(json.dumps([Path(name).name, "loaded", ""]))
    except MMError as error:
        print(json.dumps([Path(name).name, error.id, str(error)]))
"""
COMMANDS = """
import json, os, sys
from mm.cli import extract
from mm.cli.entry import run
yes = os.dup(0)
for words in json.loads(sys.argv[1]):
    os.dup2(yes, 0)  # which a command closes
    print("exit code", run(extract.main, words), file=sys.stderr, flush=True)
"""
MAP = {"AutoTokenizer": [None, "evil.Evil"], "AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}
CHANGES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "code of a tokenizer": ("tokenizer", "tokenizer_config.json", {"auto_map": MAP, "tokenizer_class": "Evil"}),
    "code beside a known tokenizer": ("tokenizer", "tokenizer_config.json", {"auto_map": MAP}),
    "code of a tokenizer, as a list": ("tokenizer", "tokenizer_config.json", {"auto_map": [None, "evil.Evil"]}),
    "code in tokenizer.json": ("tokenizer", "tokenizer.json", {"auto_map": MAP}),
    "a configuration beside a tokenizer": ("tokenizer", "config.json", {"auto_map": MAP, "model_type": "evil"}),
    "code of a text encoder": ("text_encoder", "config.json", {"auto_map": MAP, "model_type": "evil"}),
    "code of a VAE": ("vae", "config.json", {"auto_map": MAP, "_class_name": ["evil", "Evil"]}),
    "code of an image encoder": ("image_encoder", "config.json", {"auto_map": MAP}),
    "code deep inside": ("image_encoder", "config.json", {"vision_config": {"auto_map": MAP}}),
    "a kernel of the Hub": ("text_encoder", "config.json", {"attn_implementation": "evil/kernel"}),
    "the same for a part": ("image_encoder", "config.json", {"_attn_implementation": {"vision": "evil/kernel"}}),
    "generation of its own": ("text_encoder", "generation_config.json", {"custom_generate": "evil/generate"}),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoders(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def saying_yes(tmp_path: Path) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Runs Python with a standard input that never ends in yes, and caches of its own."""
    agree = subprocess.Popen(["yes"], stdout=subprocess.PIPE)
    caches = {"HF_HOME": str(tmp_path / "hub"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **caches}

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *map(str, words)]
        return subprocess.run(
            command, stdin=agree.stdout, capture_output=True, text=True, env=environment, timeout=240, cwd=tmp_path
        )

    yield run
    agree.kill()
    agree.wait()


def poisoned(weights: Path, folder: Path, canary: Path, part: str, file: str, values: dict[str, Any]) -> Path:
    shutil.copytree(weights, folder)
    for name in ("", "vae", "text_encoder", "tokenizer", "image_encoder"):
        (folder / name / "evil.py").write_text(EVIL.format(canary=str(canary)))
    path = folder / part / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **values}))
    return folder


def test_no_part_of_a_model_runs_code(
    weights: Path, tmp_path: Path, saying_yes: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    canary = tmp_path / "canary"
    folders = [poisoned(weights, tmp_path / name, canary, *change) for name, change in CHANGES.items()]
    redirected = poisoned(weights, tmp_path / "redirected", canary, "text_encoder", "adapter_config.json", {"a": 1})
    harmless = poisoned(weights, tmp_path / "harmless", canary, "vae", "README.json", {"attn_implementation": "sdpa"})
    done = saying_yes("-c", LOAD, *folders, redirected, harmless)
    assert done.returncode == 0, done.stderr
    found = {name: (id, text) for name, id, text in map(json.loads, done.stdout.splitlines())}
    assert {name: id for name, (id, _) in found.items()} == {
        **dict.fromkeys(CHANGES, "DATA-120"),
        "redirected": "DATA-121",
        "harmless": "loaded",
    }
    for name, (part, file, _) in CHANGES.items():
        assert str(tmp_path / name / part / file) in found[name][1] and "evil" in found[name][1]
    assert not canary.exists() and "y/N" not in done.stdout + done.stderr


def test_the_unguarded_library_runs_it(
    weights: Path, tmp_path: Path, saying_yes: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """The folder is dangerous: transformers as it is asks, takes the y, and runs the file."""
    folder = poisoned(weights, tmp_path / "bad", tmp_path / "canary", *CHANGES["code of a tokenizer"])
    code = "import sys; from transformers import AutoTokenizer; AutoTokenizer.from_pretrained(sys.argv[1])"
    saying_yes("-c", code, folder / "tokenizer")
    assert (tmp_path / "canary").exists()


@pytest.mark.nightly
def test_a_command_asks_nothing(
    weights: Path, tmp_path: Path, saying_yes: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Extraction from a whole model folder: what no command reads may ask for what it likes, the tokenizer may not."""
    annotation = write_data_set(tmp_path / "set", [{"path": "1.mp4", "cap": "a red circle"}], num_frames=9)
    good, bad = (
        poisoned(weights, tmp_path / name, tmp_path / "canary", *change)
        for name, change in {
            "good": ("", "model_index.json", {"_class_name": ["evil", "Evil"], "scheduler": ["evil", "Evil"]}),
            "bad": CHANGES["code of a tokenizer"],
        }.items()
    )
    (good / "scheduler").mkdir()
    (good / "scheduler" / "scheduler_config.json").write_text(json.dumps({"auto_map": MAP, "_class_name": "Evil"}))
    commands = []
    for folder in (bad, good):
        files = write_extraction_files(
            tmp_path / f"of {folder.name}", folder, annotation, tmp_path / "set", tmp_path / f"{folder.name} store"
        )
        words = [word for name, path in files.items() for word in (f"--{name.replace('_', '-')}", str(path))]
        commands.append([*words, "--num-workers", "1", "--device", "cpu"])
    done = saying_yes("-c", COMMANDS, json.dumps(commands))
    of_bad, of_good = done.stderr.split("exit code 65\n")
    assert "error DATA-120: " in of_bad
    assert "1 samples are listed" in of_good and of_good.endswith("exit code 0\n")
    assert "y/N" not in done.stdout + done.stderr
    assert not (tmp_path / "canary").exists() and not (tmp_path / "bad store" / "manifest.json").exists()


def test_commands_find_the_end_of_standard_input(
    tmp_path: Path, saying_yes: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    code = "import os, sys; from mm.cli.entry import run; run(lambda argv: print(os.read(0, 9), sys.stdin.read(9)), [])"
    assert saying_yes("-c", code).stdout.split() == ["b''"]
