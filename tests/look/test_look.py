"""`mm data look`: the page shows what training takes, in a browser too; what keeps it from that is one line."""

import html
import io
import json
import math
import re
import shutil
from base64 import b64decode
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import open_page
from PIL import Image

from mm.cli import data as data_command
from mm.cli import migrate as migrate_command
from mm.cli import train as train_command
from mm.config.flags import as_words
from mm.data.features import EMPTY_PROMPT_ID, Feature, Origin, feature_name, text_hash, write_feature
from mm.data.listing import FeatureRow, write_listing
from mm.data.packed import segments_of
from mm.data.recipe import Recipe, folder_fingerprint, save_recipe
from mm.demo.clips import BACKGROUND, COLOURS, DIRECTIONS, NUM_FRAMES, SIZE, DemoClip
from mm.errors import DataError, MMError
from mm.look.pictures import principal_colours, shown
from mm.look.tables import in_bins, spread
from mm.train.callbacks.base import Callback, Every, StepDone

ROOT = Path(__file__).parents[2]
WEIGHTS = "weights/Wan2.1-T2V-Tiny-Diffusers"
CAPTIONS = {
    '<script>console.error("x")</script> & "quotes" \'single\' </p>': None,
    "一只红色的圆形，镜头固定。": "一只红色的圆形,镜头固定。",
    "a cat 🐈‍⬛ and a rocket 🚀": None,
    "دائرة حمراء تتحرك إلى اليسار": None,
    "two  spaces&amp;amp; an\nend ": "two spaces& an end",
}
"""Captions as listed and, where the cleaning that Wan trains with changes them, as the model gets them."""


class Page(HTMLParser):
    """What stands in a page: its samples with their captions and pictures, and all of its elements and addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.samples: list[dict[str, Any]] = []
        self._in_caption = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.elements.append((tag, values))
        classes = (values.get("class") or "").split()
        if tag == "article":
            self.samples.append(
                {"id": values["data-sample"], "dropped": "dropped" in classes, "caption": "", "images": []}
            )
        elif tag == "p":
            self._in_caption = "caption" in classes
        elif tag == "img":
            address = values["src"] or ""
            picture = np.asarray(Image.open(io.BytesIO(b64decode(address.partition(",")[2]))).convert("RGB"))
            self.samples[-1]["images"].append((values["alt"], picture))

    def handle_endtag(self, tag: str) -> None:
        if tag == "p":
            self._in_caption = False

    def handle_data(self, data: str) -> None:
        if self._in_caption:
            self.samples[-1]["caption"] += data


def look(out: Path, *words: Any) -> Page:
    """The page that the command writes."""
    data_command.main(["look", *map(str, words), "--out", str(out)])
    return Page(out.read_text(encoding="utf-8"))


def training(demo: Path, **flags: Any) -> list[str]:
    """A training run on the embedded default."""
    return as_words(
        {
            "mm_data": demo / "configs" / "feature_data.json", "mm_model": demo / "configs" / "pretrain_model.json",
            "load": demo / WEIGHTS / "transformer", "train_iters": 4, "lr": 1e-3, "seed": 7,
            "micro_batch_size": 2, "global_batch_size": 4, "num_workers": 0, "no_progress_bar": True, **flags,
        }
    )  # fmt: skip


def text(page: Path) -> str:
    """The words of a page, in their order."""
    body = re.sub(r"(?s)<head>.*?</head>", "", page.read_text(encoding="utf-8"))
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def write_store(
    folder: Path, captions: list[str], shapes: list[tuple[int, ...]], *, vae: str = "unknown", **recipe: Any
) -> Path:
    """A store of one file a sample, with random latents."""
    values = {
        "text_encoder": "t", "tokenizer": "k", "height": 64, "width": 64, "num_frames": 9, "min_num_frames": None,
        "frame_interval": 1, "vae_dtype": "fp32", "text_dtype": "fp32", "tile_size": None, "tile_stride": None,
        "max_text_tokens": 32, "seed": 1,
    }  # fmt: skip
    made = Recipe(vae=vae, **{**values, **recipe})
    (folder / "features").mkdir(parents=True)
    save_recipe(folder, made)
    rows = []
    for number, (caption, shape) in enumerate(zip(captions, shapes, strict=True)):
        random = torch.Generator().manual_seed(number)
        item = Feature(torch.randn(shape, generator=random), torch.randn(1 + number % 5, 64, generator=random))
        sample = f"videos/{number}.mp4"
        origin = Origin(sample, made.key, text_hash(caption), "v")
        write_feature(folder / "features" / feature_name(sample), item, origin, 32)
        rows.append(
            FeatureRow(
                sample=sample, file=f"features/{feature_name(sample)}", path=sample, cap=caption, start_frame_idx=0,
                sample_num_frames=9, sample_size="9x64x64", latent_shape=shape, text_tokens=1 + number % 5,
            )
        )  # fmt: skip
    empty = Feature(None, torch.zeros(1, 64))
    origin = Origin(EMPTY_PROMPT_ID, made.key, text_hash(""), "")
    write_feature(folder / "features" / "empty_prompt.safetensors", empty, origin, 32)
    write_listing(folder, rows)
    return folder


def test_the_browser_shows_every_clip_as_it_was_drawn(demo: Path, tmp_path: Path) -> None:
    """Clips are drawn by code, encoded and decoded: colours of shape and background stand where they were drawn."""
    out = tmp_path / "look.html"
    page = look(out, demo / "features", "--vae", demo / WEIGHTS / "vae", "--batches", 16)
    clips = {
        DemoClip(colour, direction).caption: DemoClip(colour, direction)
        for colour in COLOURS
        for direction in DIRECTIONS
    }
    assert {sample["caption"].strip() for sample in page.samples} == set(clips)
    for sample in page.samples:
        clip = clips[sample["caption"].strip()]
        names = [name for name, _ in sample["images"]]
        assert names == [f"clip, frame {number} · source {number}" for number in (0, 2, 4, 6, 8)]
        for number in (0, NUM_FRAMES - 1):
            picture = sample["images"][number // 2][1].astype(int)
            assert picture.shape == (SIZE, SIZE, 3)
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

    def after_step(self, done: StepDone) -> list[Any]:
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


def test_samples_of_packs_are_those_of_each_step(demo: Path, tmp_path: Path) -> None:
    """Which share a sequence is the layout's matter; the samples of a step are shown as they are planned."""
    words = training(demo, micro_batch_size=1, pack=96)
    seen = _Seen()
    train_command.main(words, callbacks=[seen])
    page = look(tmp_path / "look.html", *words, "--batches", 16)
    for step in range(4):
        of_step = slice(4 * step, 4 * step + 4)
        assert sorted(sample["id"] for sample in page.samples[of_step]) == sorted(
            name for name, _ in seen.samples[of_step]
        )
    assert "packs at most 96 tokens; shown sample by sample, as planned" in text(tmp_path / "look.html")


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


def samples_of(page: Page) -> list[tuple[Any, ...]]:
    """Ids, captions and pictures."""
    return [
        (sample["id"], sample["caption"], [(name, picture.tobytes()) for name, picture in sample["images"]])
        for sample in page.samples
    ]


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
        page = look(tmp_path / f"{task}.html", demo / f"features_{task}", "--vae", vae, "--batches", 1, "--frames", 9)
        images = dict(page.samples[0]["images"])
        masks = [images[f"mask, frame {number}"] for number in range(9)]
        assert [int(mask.mean()) for mask in masks] == [255 if number in given else 0 for number in range(9)]
        for number in given:  # the first frame alone is the same latents in clip and condition
            if number == 0:
                clip = images["clip, frame 0 · source 0"].astype(int)
                assert np.abs(images["condition latents, frame 0"].astype(int) - clip).mean() < 3
        tokens = [name for name in images if name.startswith("image features")]
        assert tokens == [f"image features, image {number + 1}" for number in range(len(given))]
        assert f"given: {', '.join(f'frame {number}' for number in given)}" in text(tmp_path / f"{task}.html")


def test_without_a_vae_latents_are_false_colours_and_the_page_says_so(demo: Path, tmp_path: Path) -> None:
    page = look(tmp_path / "look.html", demo / "features", "--batches", 1)
    assert "latents in false colours, not what the clips look like" in text(tmp_path / "look.html")
    (images,) = (sample["images"] for sample in page.samples)
    assert [name for name, _ in images] == [f"clip, latent frame {n} · source {s}" for n, s in ((0, 0), (1, 1), (2, 5))]


def test_tables_by_hand(tmp_path: Path) -> None:
    """Three shapes: 6, 3 and 1 samples of 12, 4 and 16 tokens; costs by the formula of a block's operations."""
    shapes = [(16, 3, 4, 4)] * 6 + [(16, 1, 4, 4)] * 3 + [(16, 1, 8, 8)]
    captions = [f"caption {number}" for number in range(10)]
    store = write_store(tmp_path / "store", captions, shapes, height=None, width=None, shape={"rule": "max_pixels"})
    (store / "skipped.jsonl").write_text(
        json.dumps({"sample": "videos/bad.mp4", "file": "f", "error": "DATA-002", "reason": "<b>cut off</b>"}) + "\n"
    )
    out = tmp_path / "look.html"
    look(out, store, "--batches", len(CAPTIONS))
    width, ffn, layers, context = 5120, 13824, 40, 32  # of Wan2.1 14B, with captions padded to the store's 32
    cost = {
        tokens: layers * (tokens * 2 * (6 * width**2 + 2 * width * ffn + 2 * context * width) + 4 * width * tokens**2)
        for tokens in (12, 4, 16)
    }
    total = 6 * cost[12] + 3 * cost[4] + cost[16]
    words = text(out)
    for size, samples, tokens in (("9 × 32 × 32", 6, 12), ("image, 32 × 32", 3, 4), ("image, 64 × 64", 1, 16)):
        operations = f"{cost[tokens] / 1e12:.3g} T" if cost[tokens] >= 1e12 else f"{cost[tokens] / 1e9:.3g} G"
        share = f"{samples * cost[tokens] / total:.1%}".replace("%", " %")
        row = f"{size} {samples} {tokens} {operations} {samples} {samples * 10}.0 % {share}"
        assert row in words
    assert "videos/bad.mp4 DATA-002 <b>cut off</b>" in words and "left 1 clips out" in words
    assert "Frames of all 10 samples 1 4 9 6" in words  # a histogram: four of one frame, six of nine
    assert "Tokens of captions of all 10 samples 1 2 2 2 3 2 4 2 5 2" in words


def test_small_buckets_and_the_mixture_are_told(tmp_path: Path) -> None:
    """Stores of 6 and 4 samples at weights 1 and 3 until step 60: a third and two thirds; one image has no partner."""
    first = write_store(tmp_path / "first", ["a"] * 7, [(16, 3, 8, 8)] * 6 + [(16, 1, 8, 8)])
    second = write_store(tmp_path / "second", ["b"] * 4, [(16, 3, 8, 8)] * 4)
    (tmp_path / "features.txt").write_text(f"{first}\n{second}\n")
    mixture = {"shares": [{"folder": str(second), "weight": 3.0, "end_step": 60}]}
    data = {
        "dataset_param": {
            "dataset_type": "t2v", "basic_parameters": {"data_path": str(tmp_path / "features.txt")},
            "preprocess_parameters": {"num_frames": 9, "max_height": 64, "max_width": 64},
        },
        "dataloader_param": {"mixture": mixture},
    }  # fmt: skip
    predictor = {"hidden_size": 48, "ffn_dim": 64, "num_heads": 4, "num_layers": 4, "text_dim": 64, "text_len": 32}
    (tmp_path / "data.json").write_text(json.dumps(data))
    (tmp_path / "model.json").write_text(json.dumps({"predictor": predictor, "diffusion": {"shift": 3.0}}))
    words = as_words(
        {
            "mm_data": tmp_path / "data.json", "mm_model": tmp_path / "model.json", "load": "weights", "lr": 1e-4,
            "train_iters": 90, "micro_batch_size": 2, "global_batch_size": 8, "world_size": 2, "batches": 12,
            "min_bucket": "drop",
        }
    )  # fmt: skip
    page = look(tmp_path / "look.html", *words)
    told = text(tmp_path / "look.html")
    # 60 steps of 4 micro-batches at 6 : 12, then 30 steps of the first store alone
    assert f"{first} 6 as large as it is 55.6 % 66.7" in told
    assert f"{second} 4 weight 3, until step 60 44.4 % 80" in told
    assert "1 shapes with 1 samples are left out: a micro-batch takes 2 of one shape" in told
    assert "the whole training, 90 steps" in told and "on 2 replicas" in told
    assert not [sample for sample in page.samples if sample["id"] == "videos/6.mp4"] and len(page.samples) == 24
    assert Counter(re.findall("computed by replica ([01])", told)) == {"0": 6, "1": 6}
    assert len(re.findall(f"from {re.escape(str(second))}", told)) > 3


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


def test_one_sample_and_two_hundred(tmp_path: Path) -> None:
    one = write_store(tmp_path / "one", ["a"], [(16, 1, 8, 8)])
    assert len(look(tmp_path / "one.html", one, "--batches", 1).samples) == 1
    many = write_store(tmp_path / "many", ["word " * 150] * 20, [(16, 3, 8, 8)] * 20)
    page = look(tmp_path / "many.html", many, "--batches", 20, "--micro-batch-size", 10)
    assert len(page.samples) == 200 and (tmp_path / "many.html").stat().st_size < 4 * 2**20
    draws = Counter(sample["id"] for sample in page.samples)
    assert set(draws.values()) == {10}  # ten passes over twenty samples
    assert Image.open(tmp_path / "many.png").size[1] < 20_000


def test_frames_that_are_shown() -> None:
    assert shown(81, 5) == [0, 20, 40, 60, 80] and shown(3, 5) == [0, 1, 2]
    assert shown(9, 1) == [0] and shown(1, 5) == [0] and shown(10, 3) == [0, 4, 9]


def test_some_of_many_samples() -> None:
    assert list(spread(10, 64, 8)) == list(range(10))
    found = list(spread(10**7, 4096, 64))
    assert len(found) == 4096 and found[0] == 0 and found[-1] == 10**7 - 1
    gaps = [later - earlier for earlier, later in pairwise(found) if later - earlier > 1]
    assert len(gaps) == 63 and max(gaps) - min(gaps) <= 1


def test_bins_hold_every_count() -> None:
    counts = Counter({1: 3, 5: 2, 512: 7})
    bins = in_bins(counts)
    assert sum(count for _, count in bins) == 12 and len(bins) <= 12
    assert bins[0] == ("1 to 43", 5) and bins[-1] == ("474 to 516", 7)
    assert in_bins(Counter({4: 2, 6: 1})) == [("4", 2), ("5", 0), ("6", 1)]


def test_false_colours_are_the_directions_of_most_difference() -> None:
    """Against numpy's singular values: a row's red is its place along the first direction."""
    rows = torch.randn(200, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 4.0, 2.0, *[0.1] * 13])
    centred = (rows - rows.mean(0)).double().numpy()
    _, sizes, vectors = np.linalg.svd(centred, full_matrices=False)
    found = principal_colours(rows).numpy().astype(float)
    for axis in range(3):
        place = centred @ vectors[axis]
        place *= np.sign(vectors[axis][np.abs(vectors[axis]).argmax()]) * math.sqrt(len(rows)) / sizes[axis]
        expected = np.clip(place / 5 + 0.5, 0, 1) * 255
        assert np.abs(found[:, axis] - expected).max() <= 1


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
