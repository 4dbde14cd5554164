"""`mm data look`: the page shows what training takes, in a browser too."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import open_page
from diffusers import AutoencoderKLWan
from pages import ROOT, WEIGHTS, Page, keeping_pictures, look, on_the_sheet, samples_of, text, training, write_store
from PIL import Image
from store_content import listed

from mm.cli import data as data_command
from mm.cli import migrate as migrate_command
from mm.cli import train as train_command
from mm.data.packed import segments_of
from mm.demo.clips import BACKGROUND, COLOURS, DIRECTIONS, NUM_FRAMES, SIZE, DemoClip
from mm.look.alone import open_alone
from mm.train.callbacks.base import Callback, Every, StepDone

CAPTIONS = {
    '<script>console.error("x")</script> & "quotes" \'single\' </p>': None,
    "一只红色的圆形，镜头固定。": "一只红色的圆形,镜头固定。",
    "a cat 🐈‍⬛ and a rocket 🚀": None,
    "دائرة حمراء تتحرك إلى اليسار": None,
    "two  spaces&amp;amp; an\nend ": "two spaces& an end",
}
"""Captions as listed and, where the cleaning that Wan trains with changes them, as the model gets them."""


def decoded(demo: Path) -> dict[str, np.ndarray]:
    """The clips of the store by their captions, as diffusers decodes their latents: [T, height, width, 3]."""
    vae = AutoencoderKLWan.from_pretrained(demo / WEIGHTS / "vae")
    mean = torch.tensor(vae.config.latents_mean).view(1, 16, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, 16, 1, 1, 1)
    data, found = open_alone(demo / "features"), {}
    captions = {row["sample"]: row["cap"] for row in listed(demo / "features")}
    for index in range(len(data)):
        with torch.no_grad():
            frames = vae.decode(data[index]["latents"][None].float() * std + mean).sample[0]
        whole = ((frames / 2 + 0.5).clamp(0, 1) * 255).round()
        found[captions[data.name(index)]] = whole.permute(1, 2, 3, 0).numpy()
    return found


def test_the_browser_shows_every_clip_as_it_was_drawn(demo: Path, tmp_path: Path) -> None:
    """Clips are drawn by code, encoded and decoded: colours of shape and background stand where they were drawn."""
    out = tmp_path / "look.html"
    with keeping_pictures() as pictures:
        page = look(out, demo / "features", "--vae", demo / WEIGHTS / "vae", "--batches", 16)
    clips = {
        DemoClip(colour, direction).caption: DemoClip(colour, direction)
        for colour in COLOURS
        for direction in DIRECTIONS
    }
    assert {sample["caption"].strip() for sample in page.samples} == set(clips)
    of_diffusers = decoded(demo)
    for place, (sample, images) in enumerate(zip(page.samples, pictures, strict=True)):
        caption = sample["caption"].strip()
        clip = clips[caption]
        names = [name for name, _ in sample["images"]]
        assert names == list(images) == [f"clip, frame {number} · source {number}" for number in (0, 2, 4, 6, 8)]
        assert {picture.shape for _, picture in sample["images"]} == {(SIZE, SIZE, 3)}
        sheet = on_the_sheet(out.with_suffix(".png"), place, len(images))
        for number, picture, small in zip((0, 2, 4, 6, 8), images.values(), sheet, strict=True):
            assert np.abs(picture - of_diffusers[caption][number]).max() <= 1  # where rounding is near its edge
            assert np.array_equal(np.asarray(Image.fromarray(picture).resize((96, 96))), small)
        for number in (0, NUM_FRAMES - 1):
            picture = images[f"clip, frame {number} · source {number}"].astype(int)
            column, row = (round(value) for value in clip.centres()[number])
            shape = picture[row - 2 : row + 3, column - 2 : column + 3].mean((0, 1))
            corner = picture[:4, :4] if row > 16 and column > 16 else picture[-4:, -4:]
            assert np.abs(shape - COLOURS[clip.colour]).max() < 25
            assert np.abs(corner.mean((0, 1)) - BACKGROUND).max() < 10
    opened = open_page(out, tmp_path, size=(1280, 5200))
    assert opened.console == [] and opened.asked == set()
    assert [sample["id"] for sample in Page(opened.dom).samples] == [sample["id"] for sample in page.samples]
    for colour in COLOURS.values():  # 20 pictures of 118 x 118 pixels of each; the smallest shape fills 4 %
        near = (np.abs(opened.pixels.astype(int) - colour).max(-1) < 25).sum()
        assert near > 0.02 * 20 * 118 * 118


def test_the_browser_would_tell_what_is_wrong_with_a_page(tmp_path: Path) -> None:
    """The test above can fail: scripts that complain and pictures from elsewhere are seen."""
    page = tmp_path / "bad.html"
    page.write_text("<!DOCTYPE html><img src='http://127.0.0.1:9/x.png'><script>console.error('wrong')</script>")
    opened = open_page(page, tmp_path)
    assert len(opened.console) == 1 and "wrong" in opened.console[0]
    assert opened.asked == {"http://127.0.0.1:9/x.png"}


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (500, True)])
def test_captions_are_text_in_every_script(tmp_path: Path, width: int, dark: bool) -> None:
    store = write_store(tmp_path / "store", list(CAPTIONS), [(16, 3, 8, 8)] * len(CAPTIONS))
    out = tmp_path / "look.html"
    look(out, store, "--batches", len(CAPTIONS))
    opened = open_page(out, tmp_path, size=(width, 3000), dark=dark)
    page = Page(opened.dom)
    assert {sample["caption"].strip() for sample in page.samples} == {
        cleaned or caption for caption, cleaned in CAPTIONS.items()
    }
    assert not [tag for tag, _ in page.elements if tag in {"script", "iframe", "object", "embed", "link"}]
    assert all(values["dir"] == "auto" for tag, values in page.elements if values.get("class") == "caption")
    addresses = [values[name] for _, values in page.elements for name in ("src", "href") if name in values]
    assert addresses and all(str(address).startswith(("data:image/webp;base64,", "#")) for address in addresses)
    assert opened.console == [] and opened.asked == set()
    paper = opened.pixels[1500, 2].astype(int)
    assert (paper < 60).all() if dark else (paper > 220).all()
    assert opened.pixels.shape[1] == width


class _Seen(Callback):
    """Notes the samples of every step."""

    every = Every(1)

    def __init__(self) -> None:
        self.samples: list[tuple[str, bool]] = []
        self.sizes: list[int] = []

    def after_step(self, done: StepDone) -> list[Any]:
        self.sizes += [len(batch["sample"]) for batch in done.batches]
        for batch in (one for packed in done.batches for one in segments_of(packed)):
            self.samples += zip(batch["sample"], batch["without_caption"], strict=True)
        return []


def test_samples_and_dropped_captions_are_those_of_the_training(demo: Path, tmp_path: Path) -> None:
    data = json.loads((demo / "configs" / "feature_data.json").read_text())
    data["dataset_param"]["preprocess_parameters"]["cfg"] = 0.5
    (tmp_path / "data.json").write_text(json.dumps(data))
    words = training(demo, mm_data=tmp_path / "data.json")
    seen = _Seen()
    train_command.main(words, callbacks=[seen])
    page = look(tmp_path / "look.html", *words, "--batches", 100)
    shown_samples = [(sample["id"], sample["dropped"]) for sample in page.samples]
    assert shown_samples == seen.samples and len(shown_samples) == 16
    assert {dropped for _, dropped in shown_samples} == {True, False}
    assert text(tmp_path / "look.html").count("caption dropped") == sum(dropped for _, dropped in shown_samples)
    later = look(tmp_path / "later.html", *words, "--batches", 2, "--first-step", 3)
    assert [(sample["id"], sample["dropped"]) for sample in later.samples] == seen.samples[8:12]
    assert "Step 3, micro-batch 1 of 2" in text(tmp_path / "later.html")


def test_packs_are_those_of_the_training(demo: Path, tmp_path: Path) -> None:
    """Clips of 48 tokens, two in a sequence of 96 and one in the last of three."""
    words = training(demo, micro_batch_size=1, pack=96, global_batch_size=5)
    seen = _Seen()
    train_command.main(words, callbacks=[seen])
    page = look(tmp_path / "look.html", *words, "--batches", 100)
    assert [sample["id"] for sample in page.samples] == [name for name, _ in seen.samples]
    shown = text(tmp_path / "look.html")
    sequences = re.findall(r"micro-batch (\d) of (\d) (\d) samples? in one sequence, (\d+) of 96 tokens", shown)
    assert [int(size) for _, _, size, _ in sequences] == seen.sizes
    assert all((int(count), int(tokens)) == (3, 48 * int(size)) for _, count, size, tokens in sequences)
    assert [int(number) for number, *_ in sequences] == [1, 2, 3] * 4


def test_packs_of_replicas_have_the_samples_of_each_step(demo: Path, tmp_path: Path) -> None:
    """On two replicas a step of four clips is two sequences of two, whose samples are those that one process takes."""
    seen = _Seen()
    train_command.main(training(demo, micro_batch_size=1), callbacks=[seen])
    page = look(tmp_path / "look.html", *training(demo, micro_batch_size=1, pack=96, world_size=2), "--batches", 100)
    for step in range(4):
        of_step = slice(4 * step, 4 * step + 4)
        shown = [(sample["id"], sample["dropped"]) for sample in page.samples[of_step]]
        assert sorted(shown) == sorted(seen.samples[of_step])
    words = re.findall(r"micro-batch (\d) of 2 computed by replica (\d) 2 samples in one", text(tmp_path / "look.html"))
    assert words == [("1", "0"), ("2", "1")] * 4


def test_a_file_s_run_and_a_store_of_shards_show_the_same(demo_of_files: Path, tmp_path: Path) -> None:
    words = training(demo_of_files)
    of_flags = look(tmp_path / "a.html", *words, "--batches", 3)
    shards = tmp_path / "shards"
    migrate_command.main(
        ["shards", "--source", str(demo_of_files / "features"), "--target", str(shards), "--shard-megabytes", "0.05"]
    )
    listing = tmp_path / "features.txt"
    listing.write_text(f"{shards}\n")
    data = json.loads((demo_of_files / "configs" / "feature_data.json").read_text())
    data["dataset_param"]["basic_parameters"]["data_path"] = str(listing)
    (tmp_path / "data.json").write_text(json.dumps(data))
    of_shards = look(tmp_path / "b.html", *training(demo_of_files, mm_data=tmp_path / "data.json"), "--batches", 3)
    assert len(list((shards / "shards").iterdir())) > 3
    assert samples_of(of_shards) == samples_of(of_flags) and len(of_flags.samples) == 6


def test_the_run_of_a_file(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mm.cli import translate as translate_command

    capsys.readouterr()
    translate_command.main(["--", "mm", "train", *training(demo)])
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    of_file = look(tmp_path / "a.html", tmp_path / "run.yaml", "--batches", 3)
    assert samples_of(of_file) == samples_of(look(tmp_path / "b.html", *training(demo), "--batches", 3))


def test_what_a_task_is_given_is_drawn(demo_of_images: Path, tmp_path: Path) -> None:
    demo = demo_of_images
    for task, given in (("i2v", (0,)), ("flf2v", (0, 8))):
        vae = next((demo / "weights").glob(f"Wan2.1-{task.upper()}-*")) / "vae"
        words = [demo / f"features_{task}", "--vae", vae, "--batches", 1, "--frames", 9]
        with keeping_pictures() as pictures:
            page = look(tmp_path / f"{task}.html", *words)
        (images,) = pictures
        assert [name for name, _ in page.samples[0]["images"]] == list(images)
        masks = [images[f"mask, frame {number}"] for number in range(9)]
        assert [set(mask.flat) for mask in masks] == [{255 if number in given else 0} for number in range(9)]
        for number in given:  # the first frame alone is the same latents in clip and condition
            if number == 0:
                clip = images["clip, frame 0 · source 0"].astype(int)
                assert np.abs(images["condition latents, frame 0"].astype(int) - clip).max() <= 1
        tokens = [name for name in images if name.startswith("image features")]
        assert tokens == [f"image features, image {number + 1}" for number in range(len(given))]
        assert f"given: {', '.join(f'frame {number}' for number in given)}" in text(tmp_path / f"{task}.html")


def test_without_a_vae_latents_are_false_colours_and_the_page_says_so(demo: Path, tmp_path: Path) -> None:
    page = look(tmp_path / "look.html", demo / "features", "--batches", 1)
    assert "latents in false colours, not what the clips look like" in text(tmp_path / "look.html")
    (images,) = (sample["images"] for sample in page.samples)
    assert [name for name, _ in images] == [f"clip, latent frame {n} · source {s}" for n, s in ((0, 0), (1, 1), (2, 5))]


@pytest.mark.nightly
def test_the_commands_of_the_documentation(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mm.cli import translate as translate_command

    monkeypatch.chdir(tmp_path)
    (tmp_path / "STORE").symlink_to(demo / "features")
    (tmp_path / "weights").symlink_to(demo / WEIGHTS)
    capsys.readouterr()
    translate_command.main(["--", "mm", "train", *training(demo)])
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    for name in ("feature_data.json", "pretrain_model.json"):
        (tmp_path / name).symlink_to(demo / "configs" / name)
    shown_commands = re.findall(r"^mm data (look .*)$", (ROOT / "docs" / "data.md").read_text(), re.MULTILINE)
    assert len(shown_commands) == 3
    for command in shown_commands:
        data_command.main([*command.split(), "--overwrite"])
        assert Page(Path("look.html").read_text()).samples
