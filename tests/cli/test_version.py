"""`mm --version` from a checkout, from a copy without git, and where git cannot read."""

import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
CHECK = "import sys; from mm.cli.main import main; main(['--version']); print('torch' in sys.modules)"


def shown(checkout: Path, *words: str) -> str:
    command = [sys.executable, *(words or [checkout / "mm" / "isolated.py", "mm.cli.main", "--version"])]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True).stdout.strip()


def test_versions_are_those_of_the_libraries() -> None:
    said = shown(ROOT, "-m", "mm.cli.main", "--version")
    assert f", torch {torch.__version__.partition('+')[0]}" in said
    pinned = re.search(r"^megatron-core==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None and f", megatron-core {pinned[1]}, " in said
    assert said.endswith(f", python {sys.version.split()[0]}")
    assert f"mm {version('mm-wan')} " in said or not (ROOT / ".git").exists()


def test_no_torch_is_imported() -> None:
    assert shown(ROOT, "-c", CHECK).endswith("\nFalse")


def test_the_commit_is_that_of_the_checkout(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "mm", tmp_path / "mm", ignore=shutil.ignore_patterns("__pycache__"))
    assert re.match(r"mm [0-9.]+, torch ", shown(tmp_path))

    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *who, *words], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init")
    assert "(commit unknown: " in shown(tmp_path)  # it has none
    git("add", "mm/__init__.py")
    git("commit", "-m", "one")
    git("tag", "v9")
    assert f"(commit {git('rev-parse', '--short=10', 'HEAD')}), " in shown(tmp_path)
    (tmp_path / "mm" / "__init__.py").write_text('__version__ = "9"\n')
    assert shown(tmp_path).startswith(f"mm 9 (commit {git('rev-parse', '--short=10', 'HEAD')} with changes), ")
