"""Small stores of shards, and their bytes."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from feature_stores import MODEL, RECIPE, feature_set

from mm.data.dataset import FeatureDataset, open_features
from mm.data.features import Feature, Origin, text_hash
from mm.data.listing import FeatureRow
from mm.data.recipe import save_recipe
from mm.data.store.catalog import finish_store
from mm.data.store.table import open_table, write_table
from mm.data.store.writer import ShardWriter, prompt_blob, prompt_key

SHAPES = ((16, 3, 8, 8), (16, 1, 8, 8), (16, 2, 4, 8))
KEY = RECIPE.key
SEED = 2  # of shards with several samples each


def row(sample: str, caption: str, item: Feature) -> FeatureRow:
    assert item.latents is not None
    shape = tuple(item.latents.shape)
    return FeatureRow(
        sample=sample, file="features/x.safetensors", path=sample, cap=caption, start_frame_idx=item.start_frame,
        sample_num_frames=9, sample_size="9x64x64", latent_shape=shape, text_tokens=len(item.prompt), video="v",
    )  # fmt: skip


def add_prompt(writer: ShardWriter, caption: str, prompt: torch.Tensor) -> None:
    writer.add_prompt(prompt_key(caption), prompt_blob(caption, prompt, 512, KEY), len(prompt))


def write_shards(store: Path, shards: list[list[tuple[str, str, Feature]]], empty: bool = True) -> None:
    """A store of the given samples (id, caption, feature); a caption goes to the first shard that has it."""
    store.mkdir()
    save_recipe(store, RECIPE)
    owners: dict[str, int] = {}
    for number, samples in enumerate(shards):
        with ShardWriter(store, number, KEY) as writer:
            if empty and number == 0:
                owners[""] = 0
                add_prompt(writer, "", torch.full((1, 8), 7.0))
            for sample, caption, item in samples:
                if owners.setdefault(caption, number) == number:
                    add_prompt(writer, caption, item.prompt)
                origin = Origin(sample, KEY, text_hash(caption), "v")
                writer.add(row(sample, caption, item), item, origin, (owners[caption], prompt_key(caption)))
            writer.commit()
    finish_store(store, len(shards), KEY)


def random_shards(seed: int) -> list[list[tuple[str, str, Feature]]]:
    """Shards of random lengths, one of them perhaps empty, of random names, captions, shapes and kinds of numbers."""
    draw, numbers = random.Random(seed), torch.Generator().manual_seed(seed)
    prompts = {caption: torch.randn(draw.randint(1, 9), 8, generator=numbers) for caption in ("a", "é ∀", "c" * 300)}
    prompts[""] = torch.full((1, 8), 7.0)
    shards = []
    for number in range(draw.randint(1, 5)):
        samples = []
        for index in range(draw.randint(0, 12)):
            name = f"{''.join(draw.choices('ab/ é日', k=draw.randint(1, 40)))}{number}-{index}"
            caption, dtype = draw.choice(list(prompts)), draw.choice((torch.float32, torch.bfloat16, torch.float16))
            latents = torch.randn(draw.choice(SHAPES), generator=numbers).to(dtype)
            samples.append((name, caption, Feature(latents, prompts[caption], draw.randint(0, 99))))
        shards.append(samples)
    return shards


def opened(store: Path) -> FeatureDataset:
    return open_features(feature_set(store), MODEL)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path: Path, place: int) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[place] ^= 0x10
    path.write_bytes(damaged)


def body(store: Path, number: int = 1) -> Path:
    return store / "shards" / f"{number:08d}" / "body.bin"


def index(store: Path, number: int = 1) -> Path:
    return store / "shards" / f"{number:08d}" / "index.bin"


def read_all(store: Path) -> None:
    data = opened(store)
    data.empty_prompt()
    for number in range(len(data)):
        data[number]


def lie(store: Path, change: Callable[[dict[str, Any], dict[str, Any]], None], number: int = 1) -> None:
    """An index of a writer that errs: its checksum and the manifest are as they should be for it."""
    path = store / "shards" / f"{number:08d}" / "index.bin"
    table = open_table(path, "shard index", "")
    about, columns = json.loads(json.dumps(table.header.about)), {k: v.copy() for k, v in table.columns.items()}
    change(about, columns)
    write_table(path, "shard index", about, columns)
    finish_store(store, 3, KEY)


def nothing(_: int, __: int) -> None:
    pass
