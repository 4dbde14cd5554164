"""Stores of features: recipes, fingerprints, listings, buckets, and what is no whole store."""

import json
from pathlib import Path

import pytest
import torch
from feature_stores import MODEL, RECIPE, feature, feature_set, write_store
from safetensors.torch import save_file

from mm.config.model import of_task
from mm.config.tasks.fun_control_ref import FUN_CONTROL_REF
from mm.data.dataset import FeatureDataset, open_features
from mm.data.features import text_hash, video_fingerprint
from mm.data.listing import open_feature_store
from mm.data.recipe import Recipe, folder_fingerprint, load_recipe, save_recipe
from mm.errors import DataError


def test_recipe_key_depends_on_every_field(tmp_path: Path) -> None:
    save_recipe(tmp_path, RECIPE)
    assert load_recipe(tmp_path) == RECIPE
    changed = {
        "format_version": 3, "vae": "w", "text_encoder": "w", "tokenizer": "w", "height": 80, "width": 80,
        "num_frames": 13, "min_num_frames": 1, "frame_interval": 2, "crop": "none", "vae_dtype": "bf16",
        "text_dtype": "bf16", "tile_size": (34, 34), "tile_stride": None, "text_cleaning": "none",
        "max_text_tokens": 256, "seed": 2, "shape": {"rule": "max_pixels"}, "frames": {"fps": 8.0},
    }  # fmt: skip
    images = {"image_encoder": "w", "condition_tile_size": (34, 34), "condition_tile_stride": (18, 16)}
    assert set(changed) | set(images) | {"task"} == set(Recipe.model_fields)
    keys = [RECIPE.model_copy(update={name: value}).key for name, value in changed.items()]
    for task in ("i2v", "flf2v"):
        recipe = RECIPE.model_copy(update={"task": task})
        keys += [recipe.key, *(recipe.model_copy(update={name: value}).key for name, value in images.items())]
    assert len({*keys, RECIPE.key}) == len(keys) + 1


def test_recipe_key_of_text_to_video_is_that_of_earlier_stores() -> None:
    content = json.loads(RECIPE.model_dump_json())
    for name in ("image_encoder", "condition_tile_size", "condition_tile_stride", "shape", "frames"):
        assert content.pop(name) is None
    earlier = json.dumps(content, separators=(",", ":"))
    assert list(content)[:3] == ["format_version", "task", "vae"]
    assert RECIPE.key == text_hash(earlier) == Recipe.model_validate_json(earlier).key


def test_fingerprint_of_weights(tmp_path: Path) -> None:
    folder = tmp_path / "vae"
    folder.mkdir()
    weights = {f"w{i}": torch.randn(5000, generator=torch.Generator().manual_seed(i)) for i in range(4)}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text('{"z": 1, "_diffusers_version": "0.1"}')
    (folder / "README.md").write_text("one")
    before = folder_fingerprint(folder)
    (folder / "README.md").write_text("two")
    (folder / "config.json").write_text('{"_diffusers_version": "0.2",\n "z": 1}')
    assert folder_fingerprint(folder) == before
    for name in weights:  # training any tensor changes it
        save_file(weights | {name: weights[name] * 1.001}, folder / "model.safetensors")
        assert folder_fingerprint(folder) != before
    save_file(weights, folder / "model.safetensors")
    assert folder_fingerprint(folder) == before
    (folder / "config.json").write_text('{"z": 2}')
    assert folder_fingerprint(folder) != before
    with pytest.raises(DataError, match="DATA-040"):
        folder_fingerprint(tmp_path / "none")
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(DataError, match="DATA-042"):
        folder_fingerprint(folder)


def test_video_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "a"
    seen = set()
    for content in (b"", b"a", b"b", b"a" * 20000, b"b" + b"a" * 19999, b"a" * 19999 + b"b", b"a" * 20001):
        path.write_bytes(content)
        seen.add(video_fingerprint(path))
    assert len(seen) == 7
    with pytest.raises(DataError, match="DATA-001"):
        video_fingerprint(tmp_path / "none")


def test_data_set_of_two_stores(tmp_path: Path) -> None:
    first, second = write_store(tmp_path / "1", 3), write_store(tmp_path / "2", 2)
    listing = tmp_path / "data.txt"
    listing.write_text(f"{first}\n{second},data.jsonl\n")
    both = feature_set(first).model_copy(update={"path": str(listing), "folder": None})
    dataset = open_features(both, MODEL)
    names = ["videos/0.mp4", "videos/1.mp4", "videos/2.mp4", "1:videos/0.mp4", "1:videos/1.mp4"]
    assert [dataset.name(index) for index in range(len(dataset))] == names
    assert {dataset.num_tokens(index) for index in range(5)} == dataset.token_counts() == {3 * 4 * 4}
    assert {dataset.latent_shape(index) for index in range(5)} == {(16, 3, 8, 8)}
    with_reference = of_task(MODEL, FUN_CONTROL_REF)
    assert dataset.with_model(with_reference).token_counts() == {4 * 4 * 4}, "a frame of the reference image in front"
    with pytest.raises(IndexError):
        dataset.name(5)
    item = dataset[4]
    assert torch.equal(item["latents"], feature(1, 2).latents) and item["sample"] == 4
    assert item["prompt"].shape == (2, 8)


def test_a_store_of_another_recipe_names_the_differences(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", 1)
    with pytest.raises(DataError) as caught:
        open_features(feature_set(store, num_frames=13, max_width=80), MODEL)
    message = caught.value.problems[0].message
    assert caught.value.id == "DATA-014"
    assert "num_frames is 9, expected 13" in message and "width is 64, expected 80" in message
    assert "height" not in message


def test_stores_of_different_encoders_do_not_mix(tmp_path: Path) -> None:
    first = write_store(tmp_path / "1", 1)
    second = write_store(tmp_path / "2", 1, recipe=RECIPE.model_copy(update={"vae": "other"}))
    listing = tmp_path / "data.txt"
    listing.write_text(f"{first}\n{second}\n")
    both = feature_set(first).model_copy(update={"path": str(listing), "folder": None})
    with pytest.raises(DataError, match=r"DATA-014.*vae is other"):
        open_features(both, MODEL)


def test_incomplete_stores(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", 3)
    files = sorted((store / "features").glob("[0-9]*"))
    files[0].unlink()
    files[2].unlink()
    with pytest.raises(DataError) as caught:
        open_features(feature_set(store), MODEL)
    assert [p.id for p in caught.value.problems] == ["DATA-011", "DATA-011"]
    (store / "data.jsonl").unlink()
    with pytest.raises(DataError, match=r"DATA-010.*no complete feature store"):
        open_features(feature_set(store), MODEL)
    (store / "recipe.json").unlink()
    with pytest.raises(DataError, match="DATA-010"):
        open_features(feature_set(store), MODEL)


def test_listing_cannot_lead_out_of_the_store(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", 1)
    row = json.loads((store / "data.jsonl").read_text())
    for file in ("../x.safetensors", "features/../../x.safetensors", "/etc/x.safetensors", "features/a/b.safetensors"):
        (store / "data.jsonl").write_text(json.dumps({**row, "file": file}))
        with pytest.raises(DataError, match="DATA-010"):
            open_feature_store(store, store / "data.jsonl", RECIPE.key)


@pytest.mark.parametrize("linked", ["file", "folder", "store"])
def test_links_of_a_store_are_followed(linked: str, tmp_path: Path) -> None:
    """Features on another disk, or in a hub's cache: what is read is what lies there."""
    store = write_store(tmp_path / "s", 2)
    wanted = FeatureDataset([open_feature_store(store, store / "data.jsonl", RECIPE.key)], MODEL)[0]["latents"].clone()
    row = json.loads((store / "data.jsonl").read_text().splitlines()[0])
    moved = {"file": store / row["file"], "folder": store / "features", "store": store}[linked]
    (tmp_path / "disk").mkdir()
    moved.rename(tmp_path / "disk" / "blob")
    moved.symlink_to(tmp_path / "disk" / "blob")
    dataset = FeatureDataset([open_feature_store(store, store / "data.jsonl", RECIPE.key)], MODEL)
    assert torch.equal(dataset[0]["latents"], wanted)


def test_buckets_of_two_stores(tmp_path: Path) -> None:
    shapes = ((16, 3, 8, 8), (16, 1, 8, 8), (16, 3, 8, 8))
    first = write_store(tmp_path / "1", 5, shapes)  # 0 2 3 and 1 4
    second = write_store(tmp_path / "2", 3, ((16, 2, 4, 8), (16, 1, 8, 8)))  # 5 7 and 6
    listing = tmp_path / "data.txt"
    listing.write_text(f"{first}\n{second},data.jsonl\n")
    dataset = open_features(feature_set(first).model_copy(update={"path": str(listing), "folder": None}), MODEL)
    wanted = {(16, 1, 8, 8): [1, 4, 6], (16, 2, 4, 8): [5, 7], (16, 3, 8, 8): [0, 2, 3]}
    assert list(dataset.buckets().items()) == [(shape, len(samples)) for shape, samples in wanted.items()]
    for shape, samples in wanted.items():
        assert [dataset.of_draw(0).in_bucket(shape, k) for k in range(len(samples))] == samples
        assert {dataset.latent_shape(index) for index in samples} == {shape}
    for shape, k in (((16, 3, 8, 8), 3), ((16, 3, 8, 8), -1), ((16, 9, 8, 8), 0)):
        with pytest.raises(IndexError):
            dataset.of_draw(0).in_bucket(shape, k)
    assert dataset.shapes() == dataset.buckets() and list(dataset.shapes()) == [
        (16, 3, 8, 8),
        (16, 1, 8, 8),
        (16, 2, 4, 8),
    ]


@pytest.mark.parametrize("shape", [[16, 3, -8, 8], [16, 0, 8, 8], [16, 3, 100_000, 100_000]])
def test_a_list_with_a_shape_that_cannot_be(shape: list[int], tmp_path: Path) -> None:
    """Readers make room for the largest sample that is listed: such a list would have the run killed."""
    store = write_store(tmp_path / "s", 2)
    first, rest = (store / "data.jsonl").read_text().split("\n", 1)
    (store / "data.jsonl").write_text(json.dumps({**json.loads(first), "latent_shape": shape}) + f"\n{rest}")
    with pytest.raises(DataError, match=r"DATA-010: \S+/data\.jsonl row 1: .*latents cannot be"):
        open_features(feature_set(store), MODEL)
