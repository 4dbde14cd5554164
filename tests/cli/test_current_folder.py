"""No entry point runs code of the current folder, which may hold a `torch.py`, a `random.py` or a folder `mm/`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import EXAMPLES, PRETRAIN, ROOT, variables

NAMES = ("torch", "yaml", "numpy", "pydantic", "tqdm", "json", "random", "socket", "selectors", "signal", "runpy")
TRAP = """
from pathlib import Path
Path({canary!r}).open("a").write(__file__ + chr(10))
raise SystemExit(3)
"""


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder whose modules leave their names in ../canary and end the process."""
    folder = tmp_path / "hostile"
    for name in (*NAMES, "mm/__init__", "torch/__init__", "mm/cli/__init__"):
        file = folder / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(TRAP.format(canary=str(tmp_path / "canary")))
    return folder


def outcome(command: list[str | Path], folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    """The exit code, and which modules of the folder were run."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        command, cwd=folder, env={**inherited, **environment}, capture_output=True, text=True, timeout=240
    )
    canary = folder.parent / "canary"
    ran = canary.read_text() if canary.exists() else ""
    assert not ran, ran + done.stderr[-2000:]
    return done.returncode, done.stdout + done.stderr


FEW = ("--train-iters", "2", "--num-workers", "1", "--device", "cpu")
EVERY_DAY = ("pretrain.sh", "tools/convert_ckpt.py")
PATHS = {"": "", "an empty word": ":", "a relative word": ".:./"}
COMMANDS = (
    "pretrain.sh", "pretrain.sh, 2 processes", "DRY_RUN", "DOCTOR", "PARITY", "feature_extraction.sh", "inference.sh",
    "mm train", "mm doctor", "tools/convert_ckpt.py", "examples/wan2.1/convert_ckpt.py", "scripts/zero_to_bf16.py",
)  # fmt: skip


def command_and_variables(name: str, demo: Path, out: Path) -> tuple[list[str | Path], dict[str, str]]:
    weights = demo / "weights" / "Wan2.1-T2V-Tiny-Diffusers" / "transformer"
    told = variables(demo, out / "run", 2 if "2 processes" in name or name == "PARITY" else 1)
    flags = ["--mm-data", told["MM_DATA"], "--mm-model", told["MM_MODEL"], "--load", told["LOAD_PATH"], "--save", out]
    if name in ("DRY_RUN", "DOCTOR", "PARITY"):
        told[name] = "1"
    if name.startswith("pretrain.sh") or name in told:
        return ["bash", PRETRAIN, *FEW], told
    if name.startswith("mm "):
        executable = Path(sys.executable).parent / "mm"
        return [executable, *name.split()[1:], *map(str, flags), *FEW, "--lr", "1e-4", "--save-interval", "1"], {}
    if name == "feature_extraction.sh":
        configs = demo / "configs"
        told |= {"MM_DATA": str(configs / "data.json"), "MM_MODEL": str(configs / "model_wan.json")}
        told |= {"MM_TOOL": str(configs / "tools.json"), "LOG_DIR": str(out / "logs")}
        return ["bash", EXAMPLES / "feature_extract" / name, "--num-workers", "1"], told
    if name == "inference.sh":
        told |= {"MM_MODEL": str(demo / "configs" / "inference_model.json"), "SAVE_PATH": str(out / "clips")}
        words = ["--num-inference-steps", "1", "--micro-batch-size", "16"]
        return ["bash", EXAMPLES / "1.3b" / "t2v" / name, *words], told
    if name == "scripts/zero_to_bf16.py":
        return [sys.executable, ROOT / name, "--help"], {}
    return [sys.executable, ROOT / name, "--mode", "inspect", "--source_path", weights], {}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        pytest.param(name, path, marks=[] if name in EVERY_DAY and path == "an empty word" else [pytest.mark.nightly])
        for name in COMMANDS
        for path in PATHS
        if not (name.startswith("mm ") or name.endswith(".py")) or path == ""
    ] + [pytest.param("tools/convert_ckpt.py", "", marks=[])],
)  # fmt: skip
def test_nothing_of_it_is_run(demo: Path, hostile: Path, tmp_path: Path, name: str, path: str) -> None:
    command, environment = command_and_variables(name, demo, tmp_path / "out")
    if PATHS[path]:
        environment["PYTHONPATH"] = PATHS[path]
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment["VIRTUAL_ENV"] = str(Path(sys.executable).parents[1])
    code, said = outcome(command, hostile, environment)
    assert code == 0, said[-3000:]


def test_what_lies_beside_a_script_is_not_run(hostile: Path, tmp_path: Path) -> None:
    """A copy of the scripts and of what they need, with the folder's files beside each of them."""
    checkout = tmp_path / "checkout"
    for name in ("mm/isolated.py", "mm/first_process.py", "mm/stopping.py", "mm/errors.py", "mm/__init__.py"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    (checkout / "mm" / "cli").mkdir()
    (checkout / "mm" / "cli" / "__init__.py").touch()
    (checkout / "mm" / "cli" / "convert.py").write_text("import json, random, socket, sys\nprint(sys.argv[1:])\n")
    for place in ("tools", "examples/wan2.1"):
        shutil.copytree(hostile, checkout / place)
        shutil.copy(ROOT / place / "convert_ckpt.py", checkout / place)
    for name in NAMES:
        shutil.copy(hostile / f"{name}.py", checkout)
    for place in ("tools", "examples/wan2.1"):
        code, said = outcome([sys.executable, checkout / place / "convert_ckpt.py", "a b"], checkout, {})
        assert (code, said.strip()) == (0, "['a b']")


FORK_SERVER = """
import multiprocessing, sys
sys.path.insert(0, sys.argv[1])
from mm.data.fork_server import ensure_fork_server
del sys.path[0]

def there(answer):
    import os, sys
    answer.send((os.getcwd(), [name for name in ("torch", "random") if name in sys.modules]))

if __name__ == "__main__":
    ours, theirs = multiprocessing.get_context("forkserver").Pipe()
    ensure_fork_server(["random"])
    multiprocessing.get_context("forkserver").Process(target=there, args=(theirs,)).start()
    print(ours.recv())
"""


@pytest.mark.parametrize("python", ["this one", "python3.10"])
def test_the_server_of_readers_imports_nothing_of_it(hostile: Path, tmp_path: Path, python: str) -> None:
    """Python 3.10 has no -P, which keeps the current folder out of later ones."""
    interpreter = sys.executable if python == "this one" else shutil.which(python)
    if interpreter is None or subprocess.run([interpreter, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"{python} is not installed")
    script = tmp_path / "script.py"
    script.write_text(FORK_SERVER)
    code, said = outcome([interpreter, script, ROOT], hostile, {})
    assert code == 0, said
    assert said.strip() == str((str(hostile), ["random"]))


def test_isolated_says_what_the_command_says(hostile: Path) -> None:
    code, said = outcome([sys.executable, ROOT / "mm" / "isolated.py", "mm.cli.main", "--help"], hostile, {})
    assert code == 0
    assert said.startswith("usage: mm COMMAND")
