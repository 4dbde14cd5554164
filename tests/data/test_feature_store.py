import errno
import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mm.data.files
from mm.config.model import WanConfig, of_task
from mm.config.run.data import FeatureSet
from mm.config.tasks.fun_control_ref import FUN_CONTROL_REF
from mm.data.dataset import FeatureDataset, open_features
from mm.data.features import (
    EMPTY_PROMPT_ID,
    Feature,
    Origin,
    feature_name,
    read_feature,
    read_header,
    require_finite,
    text_hash,
    video_fingerprint,
    write_feature,
)
from mm.data.listing import FeatureRow, open_feature_store, write_listing
from mm.data.recipe import Recipe, folder_fingerprint, load_recipe, save_recipe
from mm.dialects.mindspeed.data_json import TrainData
from mm.dialects.mindspeed.training import features
from mm.errors import DataError

MODEL = WanConfig(text_dim=8, hidden_size=32, ffn_dim=64, num_heads=2, num_layers=1)
ORIGIN = Origin("videos/a.mp4", "key", text_hash("a"), "video")
RECIPE = Recipe(
    vae="v",
    text_encoder="t",
    tokenizer="k",
    height=64,
    width=64,
    num_frames=9,
    min_num_frames=None,
    frame_interval=1,
    vae_dtype="fp32",
    text_dtype="fp32",
    tile_size=None,
    tile_stride=(18, 16),
    max_text_tokens=512,
    seed=1,
)


def feature(seed: int = 0, tokens: int = 3, shape: tuple[int, ...] = (16, 3, 8, 8)) -> Feature:
    random = torch.Generator().manual_seed(seed)
    return Feature(torch.randn(shape, generator=random), torch.randn(tokens, 8, generator=random), start_frame=4)


def write_store(
    folder: Path, num_samples: int, shapes: tuple[tuple[int, ...], ...] = ((16, 3, 8, 8),), recipe: Recipe = RECIPE
) -> Path:
    (folder / "features").mkdir(parents=True)
    save_recipe(folder, recipe)
    rows = []
    for index in range(num_samples):
        sample = f"videos/{index}.mp4"
        item = feature(index, tokens=1 + index % 5, shape=shapes[index % len(shapes)])
        name = feature_name(sample)
        assert item.latents is not None
        write_feature(folder / "features" / name, item, Origin(sample, recipe.key, text_hash("x"), "v"), 512)
        rows.append(
            FeatureRow(
                sample=sample,
                file=f"features/{name}",
                path=sample,
                cap="x",
                start_frame_idx=0,
                sample_num_frames=9,
                sample_size="9x64x64",
                latent_shape=tuple(item.latents.shape),
                text_tokens=len(item.prompt),
            )
        )
    empty = Feature(None, torch.full((1, 8), 7.0))
    empty_origin = Origin(EMPTY_PROMPT_ID, recipe.key, text_hash(""), "")
    write_feature(folder / "features" / "empty_prompt.safetensors", empty, empty_origin, 512)
    write_listing(folder, rows)
    return folder


def train_data(folder: Path, **preprocess: Any) -> TrainData:
    clip = {"num_frames": 9, "max_height": 64, "max_width": 64, **preprocess}
    values = {
        "dataset_param": {
            "dataset_type": "t2v",
            "basic_parameters": {"data_path": str(folder / "data.jsonl"), "data_folder": str(folder)},
            "preprocess_parameters": clip,
        }
    }
    return TrainData.model_validate_json(json.dumps(values))


def feature_set(folder: Path, **preprocess: Any) -> FeatureSet:
    return features(train_data(folder, **preprocess).dataset_param)


def test_a_feature_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    written = feature(tokens=5)
    write_feature(path, written, ORIGIN, 512)
    assert read_header(path).origin == ORIGIN
    found = read_feature(path, MODEL, (ORIGIN.sample, ORIGIN.recipe))
    assert found.latents is not None and written.latents is not None
    assert torch.equal(found.latents, written.latents) and torch.equal(found.prompt, written.prompt)
    assert found.start_frame == 4
    plain = load_file(path)  # the library's own reader agrees on the format
    assert set(plain) == {"latents", "prompt", "prompt_mask"}
    assert plain["prompt_mask"].dtype == torch.uint8 and plain["prompt_mask"].tolist() == [1] * 5 + [0] * 507
    assert os.listdir(tmp_path) == ["a.safetensors"]


def metadata() -> dict[str, str]:
    return {"made_from": json.dumps({**{f: getattr(ORIGIN, f) for f in Origin.__slots__}, "start_frame": 0})}


def tensors() -> dict[str, torch.Tensor]:
    mask = torch.zeros(512, dtype=torch.uint8)
    mask[:3] = 1
    return {"latents": torch.zeros(16, 3, 8, 8), "prompt": torch.zeros(3, 8), "prompt_mask": mask}


def without(name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors().items() if key != name}


@pytest.mark.parametrize(
    ("content", "id"),
    [
        (without("latents"), "DATA-012"),
        (without("prompt"), "DATA-012"),
        (without("prompt_mask"), "DATA-012"),
        (tensors() | {"more": torch.zeros(1)}, "DATA-012"),
        (tensors() | {"latents": torch.full((16, 3, 8, 8), float("nan"))}, "DATA-013"),
        (tensors() | {"prompt": torch.full((3, 8), float("inf"))}, "DATA-013"),
        (tensors() | {"latents": torch.zeros(16, 3, 8, 8, dtype=torch.float64)}, "DATA-012"),
        (tensors() | {"latents": torch.zeros(16, 3, 8, 8, dtype=torch.int32)}, "DATA-012"),
        (tensors() | {"latents": torch.zeros(4, 3, 8, 8)}, "DATA-012"),
        (tensors() | {"latents": torch.zeros(16, 3, 8, 7)}, "DATA-012"),
        (tensors() | {"latents": torch.zeros(16, 0, 8, 8)}, "DATA-012"),
        (tensors() | {"latents": torch.zeros(1, 16, 3, 8, 8)}, "DATA-012"),
        (tensors() | {"prompt": torch.zeros(3, 9)}, "DATA-012"),
        (tensors() | {"prompt": torch.zeros(0, 8)}, "DATA-012"),
        (tensors() | {"prompt": torch.zeros(4, 8)}, "DATA-012"),
        (tensors() | {"prompt": torch.zeros(513, 8)}, "DATA-017"),
        (tensors() | {"prompt_mask": torch.zeros(512)}, "DATA-012"),
    ],
)
def test_wrong_tensors(content: dict[str, torch.Tensor], id: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(content, path, metadata())
    with pytest.raises(DataError) as caught:
        read_feature(path, MODEL)
    assert caught.value.id == id and str(path) in str(caught.value)


def good_bytes(tmp_path: Path) -> bytes:
    save_file(tensors(), tmp_path / "good", metadata())
    return (tmp_path / "good").read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b"",
        lambda b: b[:4],
        lambda b: b[:200],
        lambda b: b[:-1],
        lambda b: b + b"x",
        lambda b: struct.pack("<Q", 2**40) + b[8:],
        lambda b: struct.pack("<Q", len(b)) + b[8:],
        lambda b: b[:8] + b"!" + b[9:],
        lambda b: b"\x80\x04\x95" + b[3:],
        lambda b: b.replace(b"[16,3,8,8]", b"[16,3,-8,8"),
        lambda b: b.replace(b"recipe", b"recipX"),
    ],
)
def test_damaged_files(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(damage(good_bytes(tmp_path)))
    with pytest.raises(DataError, match="DATA-011"):
        read_feature(path, MODEL)


def test_header_that_lies_about_a_shape(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(good_bytes(tmp_path).replace(b"[16,3,8,8]", b"[16,6,8,8]"))
    with pytest.raises(DataError, match="DATA-011"):
        read_feature(path, MODEL)


def test_pickle_in_place_of_a_feature_runs_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / "a.safetensors"
    path.write_bytes(f"cos\nsystem\n(S'touch {canary}'\ntR.".encode())
    with pytest.raises(DataError, match="DATA-011"):
        read_feature(path, MODEL)
    assert not canary.exists()


def test_features_of_another_sample_under_this_name(tmp_path: Path) -> None:
    write_feature(tmp_path / "a.safetensors", feature(), ORIGIN, 512)
    with pytest.raises(DataError, match="DATA-016"):
        read_feature(tmp_path / "a.safetensors", MODEL, ("videos/b.mp4", ORIGIN.recipe))


def test_values_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    bad = Feature(torch.full((16, 3, 8, 8), float("nan")), torch.zeros(3, 8))
    with pytest.raises(DataError, match="DATA-013"):
        write_feature(tmp_path / "a.safetensors", bad, ORIGIN, 512)
    assert not os.listdir(tmp_path)


def test_a_full_disk_leaves_the_old_file_and_no_leftovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's answer is put in at the last moment it can come, when the data are forced to disk."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(mm.data.files.os, "fsync", full)
    with pytest.raises(DataError) as caught:
        write_feature(path, feature(), ORIGIN, 512)
    assert caught.value.id == "DATA-019"
    assert str(path) in str(caught.value) and re.search(r"\d [KMG]iB free", str(caught.value))
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.safetensors"]


def test_no_place_to_write(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="DATA-018"):
        write_feature(tmp_path / "none" / "a.safetensors", feature(), ORIGIN, 512)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype) -> None:
    """As by asking each value, at every place of vectors and their remainders, beside each other's signs."""
    for size in (1, 7, 64, 1000):
        good = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
        require_finite({"x": good}, "here", "")
        for place in {0, size // 2, size - 1, *range(0, size, 97)}:
            for value in (float("nan"), -float("nan"), float("inf"), -float("inf")):
                bad = good.clone()
                bad[place] = value
                assert not torch.isfinite(bad).all()
                with pytest.raises(DataError, match="DATA-013"):
                    require_finite({"x": bad}, "here", "")
    require_finite({"x": torch.full((3,), torch.finfo(dtype).max, dtype=dtype), "y": torch.zeros(0)}, "here", "")


@pytest.mark.parametrize("shape", [[16, 3, -8, 8], [16, 0, 8, 8], [16, 3, 100_000, 100_000]])
def test_a_list_with_a_shape_that_cannot_be(shape: list[int], tmp_path: Path) -> None:
    """Readers make room for the largest sample that is listed: such a list would have the run killed."""
    store = write_store(tmp_path / "s", 2)
    first, rest = (store / "data.jsonl").read_text().split("\n", 1)
    (store / "data.jsonl").write_text(json.dumps({**json.loads(first), "latent_shape": shape}) + f"\n{rest}")
    with pytest.raises(DataError, match=r"DATA-010: \S+/data\.jsonl row 1: .*latents cannot be"):
        open_features(feature_set(store), MODEL)
