"""Features of tasks with images: store, checks against the model, loader."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from feature_stores import MODEL, ORIGIN, RECIPE, feature, feature_set, metadata, tensors, write_store
from safetensors.torch import load_file, save_file

from mm.config.model import WanConfig
from mm.config.tasks.registry import TASKS as DECLARED
from mm.data.dataset import open_features
from mm.data.features import Feature, Origin, feature_name, read_feature, text_hash, write_feature
from mm.data.listing import FeatureRow as Row
from mm.data.listing import write_listing
from mm.data.loader import FeatureBatch, feature_batches
from mm.data.recipe import save_recipe
from mm.data.sampler import BatchPlan
from mm.errors import DataError

TASKS = ["i2v", "flf2v"]


def with_images(task: str, **sizes: Any) -> WanConfig:
    images = {"model_type": task, "in_dim": 36, "img_dim": 4, "clip_token_len": 3}
    return WanConfig.model_validate({**MODEL.model_dump(), **images, **sizes})


def image_feature(task: str, seed: int = 0) -> Feature:
    random = torch.Generator().manual_seed(100 + seed)
    clean = feature(seed, tokens=1 + seed % 5)
    features = torch.randn(3 * len(DECLARED[task].frames), 4, generator=random)
    condition = torch.randn(20, 3, 8, 8, generator=random)
    return Feature(clean.latents, clean.prompt, 4, {"image_features": features, "condition": condition})


def image_store(folder: Path, task: str, num_samples: int = 4) -> Path:
    """A store of `task`; its empty prompt is that of a text-to-video store."""
    write_store(folder, 1)
    recipe = RECIPE.model_copy(update={"task": task, "image_encoder": "i"})
    save_recipe(folder, recipe)
    rows = []
    for index in range(num_samples):
        sample = f"videos/{index}.mp4"
        item = image_feature(task, index)
        path = folder / "features" / feature_name(sample)
        write_feature(path, item, Origin(sample, recipe.key, text_hash("x"), "v"), 512)
        rows.append(
            Row(
                sample=sample, file=f"features/{path.name}", path=sample, cap="x", start_frame_idx=0,
                sample_num_frames=9, sample_size="9x64x64", latent_shape=(16, 3, 8, 8), text_tokens=len(item.prompt),
                task=task,
            )
        )  # fmt: skip
    empty = Feature(None, torch.full((1, 8), 7.0))
    origin = Origin("empty_prompt", recipe.key, text_hash(""), "")
    write_feature(folder / "features" / "empty_prompt.safetensors", empty, origin, 512)
    write_listing(folder, rows)
    return folder


def refused(folder: Path, model: WanConfig, id: str) -> DataError:
    with pytest.raises(DataError) as caught:
        open_features(feature_set(folder), model)
    assert [problem.id for problem in caught.value.problems] == [id]
    return caught.value


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_comes_back_as_it_was(task: str, tmp_path: Path) -> None:
    dataset = open_features(feature_set(image_store(tmp_path / "s", task)), with_images(task))
    for index in range(4):
        item, written = dataset[index], image_feature(task, index)
        assert written.latents is not None and written.features.keys() == {"image_features", "condition"}
        assert torch.equal(item["latents"], written.latents)
        assert torch.equal(item["features"]["image_features"], written.features["image_features"])
        assert torch.equal(item["features"]["condition"], written.features["condition"])
    assert torch.equal(dataset.empty_prompt(), torch.full((1, 8), 7.0))
    row = (tmp_path / "s" / "data.jsonl").read_text().splitlines()[0]
    assert f'"task":"{task}"' in row
    file = load_file(tmp_path / "s" / "features" / feature_name("videos/0.mp4"))
    assert set(file) == {"latents", "prompt", "prompt_mask", "image_features", "condition"}


def test_a_store_of_another_task_than_the_model(tmp_path: Path) -> None:
    plain = write_store(tmp_path / "t2v", 2)
    message = str(refused(plain, with_images("i2v"), "DATA-046"))
    assert "of the task t2v, the model is i2v" in message and "tools.json" in message
    pictured = image_store(tmp_path / "i2v", "i2v")
    refused(pictured, MODEL, "DATA-046")
    refused(pictured, with_images("flf2v"), "DATA-046")


def test_two_tasks_mixed(tmp_path: Path) -> None:
    store = image_store(tmp_path / "s", "i2v")
    lines = (store / "data.jsonl").read_text().splitlines()
    (store / "data.jsonl").write_text("\n".join([lines[0].replace('"i2v"', '"flf2v"'), *lines[1:]]))
    assert "row 1 is of the task flf2v" in str(refused(store, with_images("i2v"), "DATA-046"))
    listing = tmp_path / "data.txt"
    listing.write_text(f"{image_store(tmp_path / 'a', 'i2v')}\n{write_store(tmp_path / 'b', 1)}\n")
    both = feature_set(store).model_copy(update={"path": str(listing), "folder": None})
    with pytest.raises(DataError, match=r"DATA-046.*/b are of the task t2v"):
        open_features(both, with_images("i2v"))


def pictured(task: str = "i2v", **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    images = {"image_features": torch.zeros(3 * len(DECLARED[task].frames), 4), "condition": torch.zeros(20, 3, 8, 8)}
    return {**tensors(), **images, **changes}


@pytest.mark.parametrize(
    ("content", "id"),
    [
        (tensors(), "DATA-046"),
        ({k: v for k, v in pictured().items() if k != "condition"}, "DATA-012"),
        ({k: v for k, v in pictured().items() if k != "image_features"}, "DATA-012"),
        (pictured("flf2v"), "DATA-048"),
        (pictured(image_features=torch.zeros(3, 5)), "DATA-048"),
        (pictured(image_features=torch.zeros(1, 3, 4)), "DATA-048"),
        (pictured(condition=torch.zeros(16, 3, 8, 8)), "DATA-048"),
        (pictured(condition=torch.zeros(20, 3, 8, 4)), "DATA-048"),
        (pictured(condition=torch.zeros(20, 3, 8, 8, dtype=torch.int32)), "DATA-012"),
        (pictured(image_features=torch.full((3, 4), float("nan"))), "DATA-013"),
        (pictured(latents=torch.zeros(36, 3, 8, 8)), "DATA-012"),
        (pictured(latents=torch.zeros(16, 1, 8, 8), condition=torch.ones(20, 1, 8, 8)), "DATA-047"),
    ],
)
def test_files_that_an_i2v_model_does_not_take(content: dict[str, torch.Tensor], id: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(content, path, metadata())
    with pytest.raises(DataError) as caught:
        read_feature(path, with_images("i2v"))
    assert caught.value.id == id and str(path) in str(caught.value)


def test_a_single_frame_of_which_a_mask_leaves_something_is_taken(tmp_path: Path) -> None:
    """What models of image to video learn from images, as Fun-InP's do; FLF2V models are given the frame itself."""
    condition = torch.ones(20, 1, 8, 8)
    condition[2, 0, 3, 4] = 0.75
    content = pictured(latents=torch.zeros(16, 1, 8, 8), condition=condition)
    save_file(content, tmp_path / "a.safetensors", metadata())
    assert torch.equal(read_feature(tmp_path / "a.safetensors", with_images("i2v")).features["condition"], condition)
    content |= pictured("flf2v", latents=torch.zeros(16, 1, 8, 8), condition=condition)
    save_file(content, tmp_path / "b.safetensors", metadata())
    with pytest.raises(DataError, match="DATA-047"):
        read_feature(tmp_path / "b.safetensors", with_images("flf2v"))


def test_a_file_with_images_is_none_of_a_text_to_video_model(tmp_path: Path) -> None:
    write_feature(tmp_path / "a.safetensors", image_feature("i2v"), ORIGIN, 512)
    with pytest.raises(DataError, match="DATA-046"):
        read_feature(tmp_path / "a.safetensors", MODEL)


def batches(folder: Path, task: str, **options: Any) -> list[FeatureBatch]:
    dataset = open_features(feature_set(folder), with_images(task))
    return list(islice(feature_batches(dataset, BatchPlan(2, 2), text_len=512, seed=5, **options), 6))


@pytest.mark.parametrize("task", TASKS)
def test_batches_are_the_samples_stacked_and_captions_alone_are_dropped(task: str, tmp_path: Path) -> None:
    store = image_store(tmp_path / "s", task)
    kept = batches(store, task)
    for batch in kept:
        assert batch["features"]["image_features"].shape == (2, 3 * len(DECLARED[task].frames), 4)
        assert batch["features"]["condition"].shape == (2, 20, 3, 8, 8)
        for row, name in enumerate(batch["sample"]):
            written = image_feature(task, int(name.removeprefix("videos/").removesuffix(".mp4")))
            assert torch.equal(batch["features"]["image_features"][row], written.features["image_features"])
            assert torch.equal(batch["features"]["condition"][row], written.features["condition"])
    for one, other in zip(kept, batches(store, task, caption_dropout=1.0, num_workers=1), strict=True):
        assert not torch.equal(one["text"], other["text"])
        assert torch.equal(one["latents"], other["latents"])
        for name in ("image_features", "condition"):
            assert torch.equal(one["features"][name], other["features"][name])


def test_a_feature_that_is_declared_so_is_dropped_with_the_caption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, condition = DECLARED["i2v"].features
    features = (tokens, replace(condition, dropped_with_caption=True))
    monkeypatch.setitem(DECLARED, "i2v", replace(DECLARED["i2v"], features=features))
    for batch in batches(image_store(tmp_path / "s", "i2v"), "i2v", caption_dropout=1.0):
        assert batch["features"]["image_features"].any() and not batch["features"]["condition"].any()
