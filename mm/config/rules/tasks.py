"""Rules of tasks."""

from __future__ import annotations

from collections.abc import Iterator

from mm.config.tasks.registry import GENERATED, MADE, named
from mm.config.tasks.task import Task
from mm.errors import Problem


def not_made(task: Task) -> Iterator[Problem]:
    """CFG-274: a task that extraction does not know."""
    if task.only_called:
        found = f"Features of {task.title} models (the task {task.name}) cannot be made yet."
        how = f"Load the model with mm.load_model and call it, or use one of {named(MADE.values())}."
        yield Problem("CFG-274", found, how)


def not_generated(task: Task) -> Iterator[Problem]:
    """CFG-274: a task that generation does not know."""
    if not task.is_generated:
        found = f"Clips of {task.title} models (the task {task.name}) cannot be generated yet."
        how = f"Load the model with mm.load_model and call it, or use one of {named(GENERATED.values())}."
        yield Problem("CFG-274", found, how)
