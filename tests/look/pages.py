"""Pages of `mm data look`: what stands in them, and stores that are looked at."""

import html
import io
import re
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mm.cli import data as data_command
from mm.config.flags import as_words
from mm.data.features import EMPTY_PROMPT_ID, Feature, Origin, feature_name, text_hash, write_feature
from mm.data.listing import FeatureRow, write_listing
from mm.data.recipe import Recipe, save_recipe
from mm.look import page
from mm.look.facts import Looked

ROOT = Path(__file__).parents[2]
WEIGHTS = "weights/Wan2.1-T2V-Tiny-Diffusers"


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


def samples_of(page: Page) -> list[tuple[Any, ...]]:
    """Ids, captions and pictures."""
    return [
        (sample["id"], sample["caption"], [(name, picture.tobytes()) for name, picture in sample["images"]])
        for sample in page.samples
    ]


@contextmanager
def keeping_pictures() -> Iterator[list[dict[str, np.ndarray]]]:
    """The pictures of every sample by their names, of pages that are written meanwhile, before WebP changed them."""
    render, kept = page.render_page, []

    def keep_and_render(looked: Looked) -> bytes:
        for sample in (sample for batch in looked.batches for sample in batch.samples):
            strips = (
                (f"{strip.title}, {frame.label}", frame.pixels) for strip in sample.strips for frame in strip.frames
            )
            kept.append(dict(strips))
        return render(looked)

    page.render_page = keep_and_render
    try:
        yield kept
    finally:
        page.render_page = render


def on_the_sheet(sheet: Path, number: int, count: int) -> list[np.ndarray]:
    """The pictures of a sample on a contact sheet, each [96, 96, 3]: two columns of cells with two lines above them."""
    pixels = np.asarray(Image.open(sheet).convert("RGB"))
    width = max(480, 98 * count)
    left, top = 8 + number % 2 * (width + 16), 8 + number // 2 * (2 * 17 + 96 + 8) + 2 * 17
    return [pixels[top : top + 96, left + 98 * place : left + 98 * place + 96] for place in range(count)]
