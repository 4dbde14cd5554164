"""What keeps `mm data look` from writing a page is one line, and leaves what was there."""

import json
import shutil
from pathlib import Path

import pytest
from pages import WEIGHTS, look, write_store
from PIL import Image

from mm.cli import data as data_command
from mm.data.recipe import folder_fingerprint
from mm.errors import DataError, MMError


@pytest.mark.parametrize(
    ("words", "id"),
    [
        (["nowhere"], "DATA-010"),
        (["unfinished"], "DATA-010"),
        (["store", "--vae", "other"], "DATA-220"),
        (["store", "--vae", "nothing"], "DATA-040"),
        (["store", "--out", "page.txt"], "CFG-221"),
        (["store", "--out", "there.html"], "CFG-220"),
        (["store", "--out", "sheet_there.html"], "CFG-220"),
        (["store", "--batches", "0"], "CFG-005"),
        (["store", "--world-size", "2"], "CFG-007"),
        (["damaged"], "DATA-011"),
        ([], "CFG-004"),
    ],
)
def test_refused(words: list[str], id: str, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    vae = demo / WEIGHTS / "vae"
    write_store(tmp_path / "store", ["a"], [(16, 3, 8, 8)], vae=folder_fingerprint(vae))
    (write_store(tmp_path / "unfinished", ["a"], [(16, 3, 8, 8)]) / "data.jsonl").unlink()
    for file in (write_store(tmp_path / "damaged", ["a"], [(16, 3, 8, 8)]) / "features").glob("0*"):
        file.write_bytes(file.read_bytes()[:-9])
    shutil.copytree(vae, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "latents_mean": [0.5] * 16}))
    (tmp_path / "there.html").write_text("mine")
    (tmp_path / "sheet_there.png").write_text("mine")
    before = set(tmp_path.iterdir())
    with pytest.raises(MMError) as caught:
        data_command.main(["look", *words, *([] if "--out" in words else ["--out", "look.html"])])
    assert id in {problem.id for problem in caught.value.problems}
    assert set(tmp_path.iterdir()) == before and (tmp_path / "there.html").read_text() == "mine"


def test_overwriting_and_a_disk_that_refuses(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "look.html"
    look(out, demo / "features", "--batches", 1)
    assert Image.open(out.with_suffix(".png")).size[0] > 400
    first = out.read_bytes()
    look(out, demo / "features", "--batches", 2, "--overwrite")
    assert out.read_bytes() != first
    monkeypatch.setattr("os.replace", refuse)
    second = out.read_bytes()
    with pytest.raises(DataError) as caught:
        look(out, demo / "features", "--batches", 1, "--overwrite")
    assert caught.value.id == "DATA-018" and out.read_bytes() == second
    assert sorted(path.name for path in tmp_path.iterdir()) == ["look.html", "look.png"]


def refuse(*_: object) -> None:
    raise OSError(30, "Read-only file system")
