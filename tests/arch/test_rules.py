"""The rules of CONTRIBUTING.md that can be read off the source: import direction, banned names, sizes, docstrings."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

import mm

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "mm").rglob("*.py"))
SCRIPTS = sorted(path for folder in ("tools", "scripts", "examples") for path in (ROOT / folder).rglob("*.py"))
LEVELS = {
    "__init__": 0, "errors": 0, "rng": 0, "drops": 0, "poses": 0, "canvas": 0,
    "stopping": 0, "isolated": 0, "first_process": 0, "config": 0,
    "dialects": 1,  # for commands alone, see below
    "device": 1, "supervise": 1,
    "ops": 2,
    "wan": 3, "diffusion": 3, "data": 3,
    "parallel": 4, "checkpoint": 4,
    "activation": 5, "residency": 5, "optim": 5, "lora": 5,
    "extract": 6, "generate": 6, "demo": 6,
    "train": 7,  # renders clips between its steps
    "look": 7,
    "doctor": 8,
    "api": 9,
    "ui": 10,
    "cli": 11,
}  # fmt: skip
PUBLIC = {"mm", *(f"mm.{name}" for name in mm.__all__)}
MAY_USE_TORCH_DISTRIBUTED = {"parallel", "optim", "supervise", "doctor", "checkpoint", "device"}


def room(path: Path) -> str:
    parts = path.relative_to(ROOT / "mm").parts
    return parts[0].removesuffix(".py")


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


@cache
def imports(path: Path) -> list[str]:
    """Every module name that a file imports, inside functions too, `from a import b` as both a and a.b."""
    names = []
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def each(paths: list[Path]) -> Callable[[Callable[[Path], None]], Callable[[], None]]:
    """One test that a check holds for every file, and tells each that fails; a test for each would be thousands."""

    def of(check: Callable[[Path], None]) -> Callable[[], None]:
        def test() -> None:
            failed = []
            for path in paths:
                try:
                    check(path)
                except (AssertionError, pytest.fail.Exception) as error:
                    failed.append(f"{path.relative_to(ROOT)}: {error}")
            assert failed == [], "\n".join(failed)

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return of


@each(SOURCES)
def test_imports_go_one_way(path: Path) -> None:
    here = room(path)
    if here == "__init__":
        return  # hands on names of `mm.api` when they are asked for; see `test_importing_mm_is_cheap`
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "mm" or len(parts) < 2 or parts[1] not in LEVELS or parts[1] == here:
            continue
        siblings_at_the_bottom = LEVELS[here] == 0 and LEVELS[parts[1]] == 0
        assert siblings_at_the_bottom or LEVELS[parts[1]] < LEVELS[here], f"{path.name} ({here}) imports {name}"


@each(SOURCES)
def test_only_commands_know_a_dialect(path: Path) -> None:
    """What flags and files of other systems are called is behind sections for everyone else."""
    if room(path) in {"dialects", "cli"}:
        return
    for name in imports(path):
        assert not name.startswith("mm.dialects"), f"{path} imports {name}"


@each(SOURCES)
def test_room_is_known(path: Path) -> None:
    assert room(path) in LEVELS


@each(SOURCES)
def test_libraries_stay_in_their_rooms(path: Path) -> None:
    here = room(path)
    for name in imports(path):
        if here in {"config", "dialects", "errors"}:
            assert name.split(".")[0] not in {"torch", "diffusers", "transformers", "megatron"}, name
        if name.startswith("torch.distributed") and here not in MAY_USE_TORCH_DISTRIBUTED:
            pytest.fail(f"{path} imports {name}")
        if name.startswith("megatron") and here not in {"parallel", "optim", "doctor", "device"}:
            pytest.fail(f"{path} imports {name}")
        assert name.split(".")[0] not in {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}, name


@each(SOURCES)
def test_banned_constructs(path: Path) -> None:
    here = room(path)
    for node in nodes(path):
        assert not isinstance(node, ast.Global), f"{path}:{getattr(node, 'lineno', 0)} global"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            spelled = f"{node.value.id}.{node.attr}"
            assert spelled != "torch.distributed" or here in MAY_USE_TORCH_DISTRIBUTED, path
            assert spelled not in {"os.system", "tempfile.mktemp", "np.random"}, f"{path}:{node.lineno} {spelled}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called == "torch.load":
                assert keywords.get("weights_only") == "True", f"{path}:{node.lineno}"
            assert called not in {"eval", "exec"}, f"{path}:{node.lineno} {called}"
            assert keywords.get("shell") != "True", f"{path}:{node.lineno} shell=True"
            if called in {"torch.randn", "torch.rand", "torch.randint", "torch.randperm"}:
                assert "generator" in keywords, f"{path}:{node.lineno} draws without a keyed generator"


@each(SOURCES)
def test_kinds_of_device_are_named_only_in_the_device_room(path: Path) -> None:
    if room(path) in {"device", "ops"}:
        return
    for node in nodes(path):
        # the choices of the --device flag are data for mm.device; everything else must ask a Backend
        if (
            isinstance(node, ast.Constant)
            and node.value in {"cuda", "npu"}
            and room(path) not in {"config", "dialects"}
        ):
            pytest.fail(f'{path}:{node.lineno} names "{node.value}"')
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"torch.cuda", "torch.npu"}:
            pytest.fail(f"{path}:{node.lineno} uses {ast.unparse(node)}")


@each(SOURCES)
def test_sizes(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400, "split the file by concept"
    for node in nodes(path):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 80, f"{path}:{node.lineno} {node.name} has {length} lines"


def test_only_an_optimizer_s_own_file_spells_its_state() -> None:
    """Everything else asks the declaration, so that one more optimizer is one more file."""
    spelled = re.compile(r"exp_avg|adam_step")
    assert {path.stem for path in SOURCES if spelled.search(path.read_text())} == {"adamw", "lion"}


def test_scripts_only_import_commands() -> None:
    for path in SCRIPTS:
        if path.name.startswith("train_"):
            continue  # scripts that make an asset of this repository use its rooms
        used = {name for name in imports(path) if name.startswith("mm")}
        assert all(name.startswith("mm.cli") or name in PUBLIC for name in used), f"{path} imports {used}"


def test_importing_mm_is_cheap() -> None:
    told = "import sys, mm; print(*(name for name in sys.modules if name == 'torch' or name.startswith('mm.')))"
    words = [sys.executable, "-c", told]
    assert subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split() == []


def test_every_error_id_is_documented() -> None:
    """An id that the source raises has a line in docs/errors.md, and no documented id is dead."""
    pattern = re.compile(r'"((?:CFG|DATA|CKPT|NUM|MEM|RUN)-\d{3})"')
    raised = {found for path in SOURCES for found in pattern.findall(path.read_text())}
    lines = re.findall(r"\| `((?:CFG|DATA|CKPT|NUM|MEM|RUN)-\d{3})` \|", (ROOT / "docs" / "errors.md").read_text())
    documented = set(lines)
    assert len(lines) == len(documented), "an id with two meanings"
    assert sorted(raised - documented) == [], "raised, not documented"
    assert sorted(documented - raised) == [], "documented, not raised"


def test_commands_that_scripts_start_run_something() -> None:
    """A module without its last two lines would do nothing and report success."""
    texts = [path.read_text() for path in [*SCRIPTS, *(ROOT / "examples").rglob("*.sh")]]
    started = {name for text in texts for name in re.findall(r"mm\.cli\.(\w+)", text)}
    assert {"train", "launch", "convert", "zero_to_bf16"} <= started
    silent = [name for name in started if '__name__ == "__main__"' not in (ROOT / f"mm/cli/{name}.py").read_text()]
    assert silent == []
