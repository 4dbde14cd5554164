"""A tiny model, and a folder to generate in."""

import json
from pathlib import Path

import pytest
from generation_runs import PROMPTS, settings

import mm.generate.run
from mm.demo.components import write_model


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    write_model(folder)
    return folder


@pytest.fixture
def workplace(tmp_path, weights, monkeypatch):
    """A folder with inference_model.json and prompts.txt, which the test runs in."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    Path("model.json").write_text(json.dumps(settings(weights)))
    return tmp_path


@pytest.fixture
def frames(monkeypatch):
    """The frames of every clip that is written, by its name."""
    seen = {}
    write = mm.generate.run.write_clip

    def write_and_keep(path, clip, *rest):
        seen[path.name] = clip.numpy()
        write(path, clip, *rest)

    monkeypatch.setattr(mm.generate.run, "write_clip", write_and_keep)
    return seen
