"""Extraction of i2v and flf2v: what it writes, against diffusers' pipeline, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from annotated import load_samples
from diffusers import WanImageToVideoPipeline
from feature_samples import make_image_encoder, make_vae, write_data_set, write_extraction_files
from store_content import listed, shards_of
from torch.nn import functional as F

from mm.cli.extract import main
from mm.config.data import data_sources
from mm.config.model import WanConfig
from mm.config.tasks.registry import TASKS as DECLARED
from mm.data.clips import load_clip
from mm.data.features import Feature
from mm.data.recipe import load_recipe
from mm.data.store.blobs import read_sample_blobs
from mm.data.store.opened import open_shards
from mm.dialects.mindspeed.extraction import read_extraction, source
from mm.dialects.mindspeed.files import load_extract_data
from mm.errors import ConfigError, DataError

CPU = torch.device("cpu")
TASKS = ["i2v", "flf2v"]
ROWS: list[dict[str, Any]] = [
    {"path": "videos/1.mp4", "cap": "a red circle", "num_frames": 14},
    {"path": "videos/2.mp4", "cap": "a square moving right"},
]


def model(task: str) -> WanConfig:
    shape = {"text_dim": 32, "hidden_size": 32, "ffn_dim": 64, "num_heads": 2, "num_layers": 1}
    images = {"model_type": task, "in_dim": 36, "img_dim": 16, "clip_token_len": 257} if DECLARED[task].frames else {}
    return WanConfig.model_validate({**shape, **images})


class Place:
    """A data set of two clips, 48 x 64 pixels, and the files that extract it at 32 x 48, which cuts columns off."""

    def __init__(self, home: Path, weights: Path) -> None:
        self.home, self.weights = home, weights
        self.store = home / "store"
        self.annotation = write_data_set(home / "set", ROWS, num_frames=14)

    def files(self, task: str | None) -> dict[str, Path]:
        return write_extraction_files(self.home, self.weights, self.annotation, self.home / "set", self.store, task)

    def run(self, task: str | None, *more: str) -> None:
        files = self.files(task)
        self.run_files(files, *more)

    def run_files(self, files: dict[str, Path], *more: str) -> None:
        words = [word for name, path in files.items() for word in (f"--{name.replace('_', '-')}", str(path))]
        main([*words, "--seed", "3", "--device", "cpu", *more])

    def feature(self, number: int, task: str) -> Feature:
        """A sample as training reads it."""
        opened = open_shards(self.store, load_recipe(self.store).key)
        return read_sample_blobs(*opened.blobs_of(number), model(task), (opened.name(number), opened.recipe_key))


@pytest.fixture
def place(tmp_path: Path, weights: Path) -> Place:
    return Place(tmp_path, weights)


def edit(path: Path, *keys: str, value: Any) -> None:
    content = json.loads(path.read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    if value is None:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("task", TASKS)
def test_features_are_those_of_diffusers_for_the_frames_of_the_clip(task: str, place: Place) -> None:
    """The clip is loaded as for any task; its frames go through diffusers' own preparation."""
    place.run(task)
    data = source(load_extract_data(place.home / "mm_data.json"))
    samples = load_samples(data_sources(data.path, data.folder))
    vae, image_encoder = make_vae(), make_image_encoder()
    pipeline = WanImageToVideoPipeline(None, None, vae, None, image_encoder=image_encoder)
    assert [row["task"] for row in listed(place.store)] == [task, task] and load_recipe(place.store).task == task
    assert len(listed(place.store)) == len(samples)
    for number, sample in enumerate(samples):
        found = place.feature(number, task)
        assert found.latents is not None and found.features.keys() == {"image_features", "condition"}
        pixels = load_clip(sample, data.clip, seed=3).pixels[None]
        first, last = pixels[:, :, 0], pixels[:, :, -1]
        both = task == "flf2v"
        _, condition = pipeline.prepare_latents(
            first, 1, height=32, width=48, num_frames=9, dtype=torch.float32, device=CPU,
            last_image=last if both else None,
        )  # fmt: skip
        assert torch.equal(found.features["condition"][:4], condition[0, :4])
        torch.testing.assert_close(found.features["condition"], condition[0], rtol=0, atol=1e-5)
        # the VAE is causal: its first latent frame is that of the first frame alone, known or to be made
        torch.testing.assert_close(found.features["condition"][4:, 0], found.latents[:, 0], rtol=0, atol=1e-5)
        frames = torch.cat((first, last)) if both else first
        square = F.interpolate(frames, size=(224, 224), mode="bicubic") / 2 + 0.5
        mean, std = (
            torch.tensor([0.48145466, 0.4578275, 0.40821073]),
            torch.tensor([0.26862954, 0.26130258, 0.27577711]),
        )
        with torch.no_grad():
            states = image_encoder((square - mean.view(3, 1, 1)) / std.view(3, 1, 1), output_hidden_states=True)
        expected = states.hidden_states[-2].flatten(0, 1)
        assert expected.shape == (257 * len(DECLARED[task].frames), 16)
        torch.testing.assert_close(found.features["image_features"], expected, rtol=0, atol=2e-5)


def test_nothing_is_done_twice_and_a_damaged_shard_again(place: Place) -> None:
    place.run("i2v")
    bodies = sorted((place.store / "shards").glob("*/body.bin"))
    before, content = [path.stat().st_mtime_ns for path in bodies], shards_of(place.store)
    place.run("i2v")
    assert [path.stat().st_mtime_ns for path in bodies] == before
    bodies[1].write_bytes(bodies[1].read_bytes()[:-7])
    place.run("i2v")
    assert [path.stat().st_mtime_ns == time for path, time in zip(bodies, before, strict=True)] == [True, False]
    assert shards_of(place.store) == content


def test_tiles_of_the_clip_and_of_its_frames_are_chosen_apart(place: Place) -> None:
    """With tiles smaller than the frame the latents differ, so it can be seen which were used."""
    files = place.files("i2v")
    edit(files["mm_model"], "ae", "tiling_param", value={"tile_size": [4, 4], "tile_stride": [2, 2]})
    found = {}
    for clip_in_tiles in (True, False):
        for frames_in_tiles in (True, False, "auto"):
            if not (clip_in_tiles or frames_in_tiles is True):
                continue  # the tiles would have no effect
            edit(files["mm_model"], "ae", "enable_tiling", value=clip_in_tiles)
            edit(files["mm_model"], "ae", "i2v_processor", "i2v_vae_encode_tiling", value=frames_in_tiles)
            place.run_files(files, "--overwrite")
            found[clip_in_tiles, frames_in_tiles] = place.feature(0, "i2v")
    tiled, mixed, other = found[True, True], found[True, False], found[False, True]
    assert torch.equal(tiled.latents, mixed.latents) and torch.equal(
        tiled.features["condition"], other.features["condition"]
    )
    assert not torch.allclose(tiled.latents, other.latents, atol=1e-4)
    assert not torch.allclose(tiled.features["condition"][4:], mixed.features["condition"][4:], atol=1e-4)
    assert torch.equal(found[True, "auto"].features["condition"], tiled.features["condition"])
    torch.testing.assert_close(mixed.features["condition"][4:, 0], other.latents[:, 0], rtol=0, atol=1e-5)


def test_a_store_of_another_task_or_image_encoder(place: Place, tmp_path: Path) -> None:
    place.run("i2v")
    with pytest.raises(DataError, match=r"DATA-014.*task is i2v, expected flf2v"):
        place.run("flf2v")
    files = place.files("i2v")
    changed = make_image_encoder()
    with torch.no_grad():
        changed.embeddings.class_embedding[0] += 1
    changed.save_pretrained(tmp_path / "other")
    edit(files["mm_model"], "ae", "i2v_processor", "image_encoder", value=str(tmp_path / "other"))
    with pytest.raises(DataError, match=r"DATA-014.*image_encoder is"):
        place.run_files(files)


@pytest.mark.parametrize(
    ("file", "keys", "value", "id", "said"),
    [
        ("mm_tool", ("task",), "flf2v", "CFG-070", '"task" is flf2v in '),
        ("mm_tool", ("task",), "t2i", "CFG-005", "task"),
        ("mm_model", ("ae", "i2v_processor"), None, "CFG-074", "no ae.i2v_processor"),
        ("mm_model", ("ae", "i2v_processor", "processor_id"), "other", "CFG-005", "processor_id"),
        ("mm_data", ("dataset_param", "preprocess_parameters", "num_frames"), 1, "CFG-075", "num_frames is 1"),
        ("mm_data", ("dataset_param", "preprocess_parameters", "min_num_frames"), 4, "CFG-075", "min_num_frames is 4"),
    ],
)
def test_files_that_contradict_each_other(
    file: str, keys: tuple[str, ...], value: Any, id: str, said: str, place: Place
) -> None:
    files = place.files("i2v")
    edit(files[file], *keys, value=value)
    with pytest.raises(ConfigError) as caught:
        place.run_files(files)
    assert [problem.id for problem in caught.value.problems] == [id] and said in str(caught.value)
    assert not place.store.exists()


def test_the_task_may_stand_in_either_file(place: Place) -> None:
    for file in ("mm_tool", "mm_model"):
        files = place.files("i2v")
        edit(files[file], "task", value=None)
        place.run_files(files, "--overwrite")
        assert load_recipe(place.store).task == "i2v"
        edit(files["mm_model"], "ae", "i2v_processor", value=None)
        with pytest.raises(ConfigError, match="CFG-074"):
            place.run_files(files)
    files = place.files("t2v")
    with pytest.raises(ConfigError, match=r"CFG-074.*no effect with the task t2v"):
        place.run_files(files)


@pytest.mark.parametrize(
    ("folder", "id"),
    [("nowhere", "DATA-040"), ("text_encoder", "DATA-04[12]"), ("vae", "DATA-04[12]"), ("coarse", "DATA-045")],
)
def test_an_image_encoder_that_is_none(folder: str, id: str, place: Place, weights: Path, tmp_path: Path) -> None:
    make_image_encoder(patch_size=28).save_pretrained(tmp_path / "coarse")
    files = place.files("flf2v")
    where = tmp_path / folder if folder == "coarse" else weights / folder
    edit(files["mm_model"], "ae", "i2v_processor", "image_encoder", value=str(where))
    with pytest.raises(DataError, match=id):
        place.run_files(files)
    assert not (place.store / "data.jsonl").exists()
    assert not list(place.store.glob("features/*")) if place.store.exists() else True


def test_the_vae_and_the_image_encoder_work_in_one_precision(place: Place) -> None:
    files = place.files("i2v")
    edit(files["mm_model"], "ae", "dtype", value="bf16")
    place.run_files(files)
    found = place.feature(0, "i2v")
    assert found.features.keys() == {"image_features", "condition"}
    assert found.features["condition"].dtype == found.features["image_features"].dtype == torch.bfloat16
    assert set(found.features["condition"][:4].unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("clip", "frames", "expected"),
    [(False, "auto", False), (True, "auto", True), (True, False, False), (False, True, True)],
)
def test_what_auto_means(clip: bool, frames: bool | str, expected: bool, place: Place) -> None:
    files = place.files("i2v")
    edit(files["mm_model"], "ae", "enable_tiling", value=clip)
    edit(files["mm_model"], "ae", "i2v_processor", "i2v_vae_encode_tiling", value=frames)
    run = read_extraction([word for name, path in files.items() for word in (f"--{name.replace('_', '-')}", str(path))])
    assert (run.encoders.vae.tiles_of_conditions() is not None) == expected
