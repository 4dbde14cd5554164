"""Check that what a command is to read is there at all, before torch is imported and anything is loaded."""

from __future__ import annotations

import os

from mm.config.run.encoders import EncodersSection
from mm.config.run.generation import GenerationRun
from mm.errors import Problem


def missing_parts(run: GenerationRun) -> list[Problem]:
    """Missing parts of a generation's model: DATA-020, DATA-022, DATA-040 or DATA-043, as loading it would say."""
    transformer = run.model.weights or ""
    problems = []
    if not os.path.exists(transformer):
        problems.append(Problem("DATA-020", f"Weights not found: {transformer} does not exist.", "Check the path."))
    for adapter in run.model.adapters:
        if not os.path.exists(adapter.path):
            word = run.origins["model.adapters"].name
            problems.append(Problem("DATA-022", f"The LoRA {adapter.path} does not exist.", f"Check {word}."))
    return [*problems, *missing_encoders(run.encoders)]


def missing_encoders(encoders: EncodersSection) -> list[Problem]:
    """Missing encoders of a run: DATA-040 or DATA-043."""
    folders = [encoders.vae.from_pretrained, encoders.text.from_pretrained]
    if encoders.image is not None:
        folders.append(encoders.image.from_pretrained)
    return _missing(folders, encoders.tokenizer.from_pretrained)


def _missing(folders: list[str], tokenizer: str) -> list[Problem]:
    problems = [
        Problem("DATA-040", f"{os.path.join(folder, 'config.json')} does not exist.", "Correct from_pretrained.")
        for folder in folders
        if not os.path.isfile(folder) and not os.path.isfile(os.path.join(folder, "config.json"))
    ]
    if not os.path.isdir(tokenizer):
        remedy = "Correct from_pretrained of the tokenizer."
        problems.append(Problem("DATA-043", f"The tokenizer's folder {tokenizer} does not exist.", remedy))
    return problems
