"""The page on which people make clips: what it makes is what its commands make, and nobody else is told of it."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from kept_frames import keeping_frames
from PIL import Image
from playwright.sync_api import Page, sync_playwright

import mm.generate.run
from mm.cli.entry import run
from mm.cli.run import main as run_file
from mm.cli.ui import main as ui
from mm.data.video import probe
from mm.demo.components import MODEL_NAMES
from mm.errors import MMError
from mm.ui.making import Asked, Maker
from mm.ui.models import Model, find_models

SMALL = {"num_frames": 5, "height": 32, "width": 32, "steps": 2, "guidance_scale": 2.0, "fps": 8, "seed": 3}


@pytest.fixture(scope="module")
def models(demo_of_images: Path) -> dict[str, Model]:
    weights = demo_of_images / "weights"
    found, _ = find_models(weights, weights / MODEL_NAMES["i2v"])
    return {model.name: model for model in found}


def picture(path: Path, seed: int) -> str:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return str(path)


@pytest.mark.parametrize("task", ["t2v", "i2v", "speedcontrol"])
def test_a_clip_is_that_of_its_command(task: str, models: dict[str, Model], tmp_path: Path) -> None:
    """Bit for bit before the codec, by the run.yaml beside it alone."""
    given: dict = {
        "t2v": {"negative_prompt": "a blue circle"},
        "i2v": {"files": {"images": (picture(tmp_path / "first.png", 1), picture(tmp_path / "last, 2.png", 2))}},
        "speedcontrol": {"columns": {"motion_bucket_id": 30.0}},
    }[task]
    steps: list[torch.Tensor] = []
    maker = Maker(tmp_path / "clips", "cpu", "fp32")
    asked = Asked("a red circle", **given, **SMALL)
    made, frames = maker.make(models[MODEL_NAMES[task]], asked, steps.append)
    assert [tuple(preview.shape) for preview in steps] == [(32, 32, 3)] * 2
    assert made.folder == tmp_path / "clips" / "0001" and probe(made.clip).num_frames == 5
    program, command, file = made.command.split()
    assert (program, command) == ("mm", "run")
    with keeping_frames(mm.generate.run):
        run_file([file])
    [again] = (made.folder / "again").glob("*.npy")
    assert np.array_equal(np.load(again), frames.numpy())
    other, _ = maker.make(models[MODEL_NAMES[task]], Asked("a red circle", **given, **{**SMALL, "seed": 4}))
    assert other.folder.name == "0002" and other.asked.differs(made.asked) == {"seed": (4, 3)}


def test_what_cannot_be_made_leaves_nothing(models: dict[str, Model], tmp_path: Path) -> None:
    maker = Maker(tmp_path / "clips", "cpu", "fp32")
    with pytest.raises(MMError, match="CFG-061"):
        maker.make(models[MODEL_NAMES["t2v"]], Asked("a", **{**SMALL, "height": 33}))
    assert list((tmp_path / "clips").iterdir()) == []


def test_models_that_are_not_offered(demo_of_images: Path, tmp_path: Path) -> None:
    """A transformer alone needs encoders, and weights that are damaged say so."""
    weights = demo_of_images / "weights"
    (tmp_path / "whole").symlink_to(weights / MODEL_NAMES["t2v"])
    (tmp_path / "alone").symlink_to(weights / MODEL_NAMES["fun_control"])
    (tmp_path / "damaged" / "transformer").mkdir(parents=True)
    (tmp_path / "damaged" / "transformer" / "model.safetensors").write_bytes(b"no header")
    found, reasons = find_models(tmp_path)
    assert [model.name for model in found] == ["whole"]
    assert [reason.split(":")[0] for reason in reasons] == ["alone", "damaged"]
    assert (
        "has no vae, text_encoder, tokenizer; --encoders FOLDER lends them" in reasons[0] and "DATA-022" in reasons[1]
    )
    found, _ = find_models(tmp_path, weights / MODEL_NAMES["i2v"])
    assert [model.name for model in found] == ["alone", "whole"]


def test_the_command_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MMError, match="CFG-411: models holds no model in the layout of diffusers"):
        ui([])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MMError, match="CFG-410: The page needs gradio"):
        ui([])
    assert run(ui, ["--port", "70000"]) == 64


@pytest.fixture(scope="module")
def page(demo_of_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Page, set[str], Path]]:
    """The page in headless Chromium, the hosts that it asked, and the folder of clips."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium; Debian and Ubuntu have it: apt-get install -y chromium")
    place = tmp_path_factory.mktemp("page")
    words = ["--models", demo_of_images / "weights", "--outputs", place / "clips", "--port", "0"]
    words += ["--device", "cpu", "--precision", "fp32"]
    command = [sys.executable, "-m", "mm.cli.ui", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "HOME": str(place)}) as server:
        try:
            assert server.stdout is not None
            address = re.search(r"http://127\.0\.0\.1:\d+/", server.stdout.readline())
            assert address is not None
            with sync_playwright() as playwright, playwright.chromium.launch(executable_path=program) as browser:
                opened, asked = browser.new_page(), set()
                opened.on("request", lambda request: asked.add(urlsplit(request.url).netloc))
                opened.goto(address[0])
                opened.wait_for_selector("#make")
                yield opened, asked, place / "clips"
        finally:
            server.terminate()


def write(page: Page, **values: object) -> None:
    for name, value in values.items():
        page.locator(f"#{name} input, #{name} textarea").first.fill(str(value))


def wait(page: Page, text: str) -> None:
    page.wait_for_function("text => document.querySelector('#said').innerText.includes(text)", arg=text, timeout=60_000)


def choose(page: Page, model: str) -> None:
    page.locator("#model input").first.click()
    page.get_by_role("option", name=model, exact=True).click()


def test_a_clip_is_made_kept_and_compared(page: tuple[Page, set[str], Path]) -> None:
    opened, asked, clips = page
    choose(opened, MODEL_NAMES["t2v"])
    opened.wait_for_selector("#images", state="hidden")
    write(opened, prompt="a red circle", **SMALL)
    opened.click("#make")
    wait(opened, "0001/clip.mp4")
    opened.wait_for_selector("#latest video")
    assert opened.locator("#latest-command textarea").input_value() == f"mm run {clips}/0001/run.yaml"
    opened.click("#keep")
    write(opened, seed=9)
    opened.click("#make")
    wait(opened, "0002/clip.mp4")
    opened.wait_for_function("document.querySelector('#differences').innerText.includes('seed')")
    assert opened.inner_text("#differences").split() == ["latest", "kept", "seed", "9", "3"]
    assert opened.locator("#kept-command textarea").input_value() == f"mm run {clips}/0001/run.yaml"
    assert asked == {urlsplit(opened.url).netloc}


def test_a_mistake_is_said_on_the_page(page: tuple[Page, set[str], Path]) -> None:
    opened, _, clips = page
    choose(opened, MODEL_NAMES["i2v"])
    opened.wait_for_selector("#images")
    write(opened, prompt="a red circle", **SMALL)
    before = sorted(clips.glob("*"))
    opened.click("#make")
    wait(opened, "CFG-120")
    assert "which needs inputs.images" in opened.inner_text("#said")
    assert sorted(clips.glob("*")) == before
