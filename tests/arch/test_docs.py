"""What the pages say is there: error ids, headings for them, tests by name, files that links name."""

import ast
import re
from pathlib import Path

import pytest

from mm import errors

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ID = re.compile(r"`((?:CFG|DATA|CKPT|NUM|MEM|RUN)-\d{3})`")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
PAGES_OF_PROOF = ["troubleshooting.md", "reliability.md"]


def rows(page: str) -> list[str]:
    return [line for line in (DOCS / page).read_text().splitlines() if line.startswith("| ")]


def test_thirty_failures() -> None:
    numbers = [match[1] for row in rows("troubleshooting.md") if (match := re.match(r"\| (\d+) \|", row))]
    assert numbers == [str(number) for number in range(1, 31)]


def test_every_id_of_the_table_has_a_heading_and_a_meaning() -> None:
    text, errors = (DOCS / "troubleshooting.md").read_text(), (DOCS / "errors.md").read_text()
    headings = re.findall(r"^### (\S+)$", text, re.MULTILINE)
    assert len(set(headings)) == len(headings)
    named = {found for row in rows("troubleshooting.md") for found in ID.findall(row)}
    assert named
    assert named <= set(headings)
    assert all(f"| `{found}` |" in errors for found in headings)


def raised_with() -> dict[str, set[int]]:
    """Exit codes of the errors that the source raises by name, by id."""
    found: dict[str, set[int]] = {}
    for path in (ROOT / "mm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not node.args:
                continue
            kind, first = getattr(errors, node.func.id, None), node.args[0]
            if isinstance(kind, type) and issubclass(kind, errors.MMError) and isinstance(first, ast.Constant):
                found.setdefault(first.value, set()).add(kind.exit_code)
    return found


def test_exit_codes_are_those_of_the_page() -> None:
    """An id stands under a heading with its exit code, or has one of its own at the begin of its row."""
    documented: dict[str, int] = {}
    for part in (DOCS / "errors.md").read_text().split("\n## ")[1:]:
        if code := re.match(r"[^\n]* \((\d+)\)\n", part):
            rows = re.findall(r"^\| `(\S+)` \| (?:\((\d+)\))?", part, re.MULTILINE)
            documented |= {id: int(own or code[1]) for id, own in rows}
    raised = raised_with()
    assert len(raised) > 100
    assert {id: codes for id, codes in raised.items() if id in documented and codes != {documented[id]}} == {}


@pytest.mark.parametrize("page", PAGES_OF_PROOF)
def test_every_test_that_a_page_names_exists(page: str) -> None:
    named = TEST.findall((DOCS / page).read_text())
    assert named
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text())
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"


@pytest.mark.parametrize("page", sorted([*DOCS.glob("*.md"), ROOT / "README.md"]), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
