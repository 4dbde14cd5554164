"""Functions, classes and constants that nothing of the program uses; what tests alone call belongs to the tests."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = [path for folder in ("mm", "tools", "scripts", "examples") for path in (ROOT / folder).rglob("*.py")]
TREES = {".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text()) for path in FILES}
FOR_OTHERS = (
    "mm.api",  # what users import
    "mm.config.flags.as_words",  # command lines built in Python
    "mm.doctor.formulas",  # what counted traffic is compared with, in tests and benchmarks/traffic.py
    "mm.lora.adapter.merge",  # docs/lora.md
    "mm.lora.layer.init_adapters",  # a model with adapters, without a run
    "mm.wan.conditions",  # what the tasks of Fun, VACE and Wan2.2 models are to declare
    "mm.ops.elementwise.reference",  # what fast paths are compared with
)


def defined(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def used(module: str, tree: ast.Module) -> Iterator[str]:
    """Full names that a module imports, asks another module for, or mentions outside their own definition."""
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            aliases |= {alias.asname: alias.name for alias in node.names if alias.asname}
    yield from aliases.values()
    for top in tree.body:
        own = getattr(top, "name", None)
        for node in ast.walk(top):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                yield f"{aliases.get(node.value.id)}.{node.attr}"
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id != own:
                yield f"{module}.{node.id}"


def test_nothing_is_kept_that_nobody_calls() -> None:
    names = {f"{module}.{name}" for module, tree in TREES.items() if module.startswith("mm.") for name in defined(tree)}
    unused = names - {name for module, tree in TREES.items() for name in used(module, tree)}
    assert sorted(name for name in unused if not name.startswith(FOR_OTHERS) and "__" not in name) == []


def test_the_exceptions_are_still_there() -> None:
    there = {f"{module}.{name}" for module, tree in TREES.items() for name in defined(tree)} | TREES.keys()
    assert [name for name in FOR_OTHERS if not any(one.startswith(name) for one in there) and name != "mm.api"] == []
