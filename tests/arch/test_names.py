"""Language of the source: how docstrings begin, what is documented and typed, and how many parameters have no name."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "mm").rglob("*.py"))
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

NEITHER_NOUN_NOR_VERB = {
    *("what", "which", "how", "whether", "where", "when", "who", "whom", "whose", "why", "that", "because"),
    *("as", "at", "by", "for", "from", "in", "of", "on", "to", "with", "without", "it", "its", "if", "once", "not"),
}
MOST_POSITIONAL = 6


@cache
def trees() -> dict[str, ast.Module]:
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in SOURCES}


def public(node: ast.AST) -> Iterator[Definition]:
    """Classes and functions that other files may use: not those with an underscore, nor what is inside a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.If, ast.Try, ast.With)):
            yield from public(child)
        elif isinstance(child, Definition) and not child.name.startswith("_"):
            yield child
            if isinstance(child, ast.ClassDef):
                yield from public(child)


def test_docstrings_open_with_a_noun_or_a_verb() -> None:
    found = []
    for path, tree in trees().items():
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, (ast.Module, Definition)) else None
            if text and text.split()[0].strip(".,:;").lower() in NEITHER_NOUN_NOR_VERB:
                found.append(f"{path}:{node.body[0].lineno} {text.splitlines()[0]}")
    assert found == []


def test_what_is_public_has_a_docstring_and_a_return_type() -> None:
    found = [path for path, tree in trees().items() if tree.body and not ast.get_docstring(tree)]
    for path, tree in trees().items():
        for node in public(tree):
            if not ast.get_docstring(node):
                found.append(f"{path}:{node.lineno} {node.name} has no docstring")
            if not isinstance(node, ast.ClassDef) and node.returns is None:
                found.append(f"{path}:{node.lineno} {node.name} has no return type")
    assert found == []


def test_few_parameters_go_by_their_position() -> None:
    """More than six are a value of their own, or have names. Operators take what their formula has."""
    found = []
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not path.startswith("mm/ops/"):
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in ("self", "cls")]
                if len(names) > MOST_POSITIONAL:
                    found.append(f"{path}:{node.lineno} {node.name} has {len(names)}")
    assert found == []


def test_the_formatter_lays_out_every_line() -> None:
    assert [name for name in trees() if "# fmt:" in (ROOT / name).read_text()] == []
