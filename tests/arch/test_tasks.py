"""Tasks are declared in one place: the rest of the package asks the declaration and names none."""

import ast
import re
from pathlib import Path

from test_rules import ROOT, SOURCES, imports

from mm.config.tasks.registry import FEATURE_TASKS, TASKS
from mm.wan.embeddings import EMBEDDINGS

DECLARATIONS = ROOT / "mm" / "config" / "tasks"
NAMED = re.compile(r"\b(?:IMAGES|model_type|" + "|".join(name for name in TASKS if name != "t2v") + r")\b")
"""Words by which code would know a task. Text to video is left out: MindSpeed-MM's files call data sets so."""
IMPORTS = ("from mm.config.tasks.", "from mm.wan.conditions.")
"""Of declarations, and of files that are named after a model's publication."""
OF_OTHERS = {"mm/parallel/stage.py": "ModelType.encoder_or_decoder", "mm/wan/tokenizer.py": "rules.model_type"}
"""A megatron-core attribute and a SentencePiece field of the same name, by what else is in their lines."""


def lines_that_name_a_task(path: Path) -> list[str]:
    """Lines of code, these imports apart, and of documentation."""
    foreign = OF_OTHERS.get(path.relative_to(ROOT).as_posix())
    return [
        line
        for line in path.read_text().splitlines()
        if NAMED.search(line) and not line.startswith(IMPORTS) and not (foreign and foreign in line)
    ]


def test_three_files_name_tasks() -> None:
    """The field of the model's configuration, config.json of three systems, and the embedded default's files."""
    elsewhere = [path for path in SOURCES if DECLARATIONS not in path.parents]
    named = {path.relative_to(ROOT).as_posix() for path in elsewhere if lines_that_name_a_task(path)}
    assert named <= {"mm/config/model.py", "mm/wan/config_json.py", "mm/demo/configs.py"}


def test_a_file_for_each_task() -> None:
    files = {path.stem for path in DECLARATIONS.glob("*.py")} - {"__init__", "task", "registry", "frames", "fun"}
    assert files == set(FEATURE_TASKS)


def test_declarations_are_plain_data() -> None:
    for path in DECLARATIONS.glob("*.py"):
        assert not [name for name in imports(path) if name.startswith("mm.") and not name.startswith("mm.config.tasks")]
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, (ast.Import, ast.ImportFrom)) or "torch" not in ast.unparse(node)


def test_what_declarations_refer_to_is_there() -> None:
    assert {name for task in TASKS.values() for name in task.modules} == EMBEDDINGS.keys()
    for task in TASKS.values():
        assert len({feature.name for feature in task.features}) == len(task.features)
        assert task.with_last_frame is None or task.with_last_frame in TASKS
