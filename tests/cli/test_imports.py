"""Imports of commands leave nothing for the collector to go through."""

import gc
import sys
from pathlib import Path

import pytest

from mm.cli.imports import large_imports

MODULE = "made_for_test_imports"


def test_what_is_imported_is_left_out_of_collections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{MODULE}.py").write_text("import gc\ncollects = gc.isenabled()\nkept = [[] for _ in range(1000)]\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = gc.get_freeze_count()
    with large_imports():
        made = __import__(MODULE)
    monkeypatch.delitem(sys.modules, MODULE)
    assert not made.collects and gc.isenabled()
    left_out = gc.get_freeze_count()
    assert left_out >= before + 1000
    garbage = [[] for _ in range(1000)]
    with large_imports():
        import json  # noqa: F401  has been imported before
    assert gc.get_freeze_count() == left_out and garbage, "an import that brings nothing keeps what may be garbage"


def test_an_import_that_fails_leaves_the_collector_on() -> None:
    with pytest.raises(ModuleNotFoundError), large_imports():
        __import__("no_module_of_this_name")
    assert gc.isenabled()
