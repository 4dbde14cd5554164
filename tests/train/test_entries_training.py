"""SimpleTuner's multidatabackend.json from its entries to training: each at its own size, mixed as they say."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from feature_samples import write_clip
from PIL import Image
from training_runs import WEIGHTS, metrics

from mm.cli import migrate as migrate_command
from mm.cli import run as run_command
from mm.config.data import store_sources
from mm.config.model import WanConfig
from mm.config.run.data import FeatureSet, Mixture
from mm.config.run.file import load_training
from mm.config.storage import Storage
from mm.data.dataset import FeatureDataset, open_features
from mm.data.planning import sampling_plan
from mm.data.sampler import BatchPlan
from mm.errors import ConfigError, DataError, MMError

ROOT = Path(__file__).parents[2]
FILMS: dict[str, Any] = {
    "id": "films", "type": "local", "dataset_type": "video", "instance_data_dir": "films", "repeats": 2,
    "caption_strategy": "textfile", "resolution": 64, "resolution_type": "pixel_area", "crop_style": "center",
    "video": {"num_frames": 11, "min_frames": 11},
}  # fmt: skip
PICTURES: dict[str, Any] = {
    "id": "pictures", "type": "local", "instance_data_dir": "pictures", "caption_strategy": "filename",
    "resolution": 48, "resolution_type": "pixel", "crop": True, "crop_aspect": "square", "probability": 0.5,
    "start_step": 2, "max_num_samples": 4, "train_batch_size": 2,
}  # fmt: skip
TEXTS = {"id": "texts", "dataset_type": "text_embeds", "default": True, "cache_dir": "cache"}


@pytest.fixture
def home(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two clips, six pictures and an extraction of the example."""
    monkeypatch.chdir(tmp_path)
    for name, (num_frames, height, width) in {"a": (14, 64, 112), "b": (11, 112, 64)}.items():
        write_clip(Path("films", f"{name}.mp4"), num_frames, height, width)
        Path("films", f"{name}.txt").write_text("a red circle\n")
    Path("pictures").mkdir()
    for number in range(6):
        Image.fromarray(np.full((60, 90, 3), 40 * number, np.uint8)).save(f"pictures/a_{number}.png")
    values: dict[str, Any] = yaml.safe_load((ROOT / "examples" / "run_extraction.yaml").read_text())
    for section in ("vae", "text", "tokenizer"):
        named = values["encoders"][section]
        named["from_pretrained"] = named["from_pretrained"].replace("demo", str(demo), 1)
    values["data"]["workers"] = 1
    values["output"]["path"] = "stores"
    Path("extract.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def migrate(*entries: dict[str, Any], alignment: int = 16) -> None:
    Path("multidatabackend.json").write_text(json.dumps(entries))
    words = ["--source", "multidatabackend.json", "--extraction", "extract.yaml", "--out", "runs"]
    migrate_command.main(["entries", *words, "--alignment", str(alignment)])


def opened(features: FeatureSet, model: WanConfig) -> dict[str, FeatureDataset]:
    return {folder.name: part for folder, _, part in open_features(features, model).parts()}


def test_entries_are_encoded_at_their_own_sizes_and_mixed(
    home: Path, demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    migrate(FILMS, PICTURES, PICTURES | {"id": "off", "disabled": True}, TEXTS)
    told = capsys.readouterr().out
    assert "runs/extract_films.yaml -> stores/films\n  9 frames for 11, since the VAE takes 4k + 1\n" in told
    assert {path.name for path in Path("runs").iterdir()} == {
        "extract_films.yaml", "extract_pictures.yaml", "features.txt", "training.yaml"
    }  # fmt: skip
    for name in ("films", "pictures"):
        run_command.main([f"runs/extract_{name}.yaml"])
    data = yaml.safe_load(Path("runs/training.yaml").read_text())["data"]
    films = {"folder": "stores/films", "repeats": 3}
    assert data["mixture"] == {
        "shares": [films, {"folder": "stores/pictures", "weight": 0.5, "micro_batch_size": 2, "begin_step": 2}]
    }

    values: dict[str, Any] = yaml.safe_load((ROOT / "examples" / "run.yaml").read_text())
    values["training"]["steps"] = 4
    values["data"] |= data | {"micro_batch_size": 1, "global_batch_size": 2}
    values["checkpoint"] = {"load": str(demo / WEIGHTS), "save": str(home / "run"), "save_interval": 4}
    Path("train.yaml").write_text(yaml.safe_dump(values))
    run_command.main(["train.yaml"])
    rows = metrics(home / "run")
    # a clip of 3 x 6 x 10 latents has 45 tokens, a picture of 6 x 6 has 9; pictures come after two steps
    assert [(row["tokens"], row["token_pairs"]) for row in rows[:2]] == [(2 * 45, 2 * 45**2)] * 2
    assert {row["tokens"] for row in rows[2:]} <= {2 * 45, 45 + 2 * 9, 4 * 9}

    training = load_training(Path("train.yaml"))
    stores = opened(training.data.features, training.wan)
    # edge 64: 64 x sqrt(1.75) is 84.7 and 48.4, so 80 x 48; a shorter edge of 48, square
    assert stores["films"].shapes() == {(16, 3, 6, 10): 1, (16, 3, 10, 6): 1}
    assert stores["pictures"].shapes() == {(16, 1, 6, 6): 4}
    dataset = open_features(training.data.features, training.wan)
    mixture = Mixture.model_validate_json(json.dumps(data["mixture"]))
    plan = sampling_plan(dataset, BatchPlan(2, 1), mixture, 1, shuffle=True)
    drawn = [dataset.name(plan.group(slot)[0].index) for slot in range(4 + 4096)]
    assert not any("pictures" in name for name in drawn[:4])
    # 2 x 3 samples to 4 x 0.5, of which two share a slot
    assert Counter("pictures" in name for name in drawn[4:]) == {False: 3510, True: 586}


def test_what_an_entry_says_reaches_the_rules(home: Path) -> None:
    """Every field that decides sizes and lengths, in the words of run.yaml."""
    asked = FILMS | {
        "resolution": 0.25, "resolution_type": "area", "crop": True, "crop_aspect": "closest",
        "crop_aspect_buckets": [{"aspect": 1, "weight": 0.25}, {"aspect": 1.78, "weight": 0.75}],
        "minimum_aspect_ratio": 0.5, "maximum_aspect_ratio": 2, "max_upscale_threshold": 0.2,
        "minimum_image_size": 0.1, "maximum_image_size": 1, "target_downsample_size": 0.5,
        "probability": 0, "video": {"bucket_strategy": "resolution_frames", "frame_interval": 8, "max_frames": 42,
                                    "min_frames": 10},
    }  # fmt: skip
    migrate(asked, PICTURES)
    clip = yaml.safe_load(Path("runs/extract_films.yaml").read_text())["data"]["clip"]
    assert clip == {
        "num_frames": 41,
        "min_num_frames": 9,
        "shape": {
            "rule": "area", "resolution": 0.25, "alignment": 16, "minimum_image_size": 0.1, "maximum_image_size": 1.0,
            "target_downsample_size": 0.5, "max_upscale_threshold": 0.2, "minimum_aspect_ratio": 0.5,
            "maximum_aspect_ratio": 2.0, "crop": True, "crop_style": "center", "crop_aspect": "closest",
            "crop_aspect_buckets": [{"aspect": 1.0, "weight": 0.25}, {"aspect": 1.78, "weight": 0.75}],
        },
        "frames": {"start": "first", "length_multiple": 8, "max_frames": 42},
    }  # fmt: skip
    assert Path("runs/features.txt").read_text() == "stores/pictures\n", "probability 0 is not trained on"


@pytest.mark.parametrize(
    ("fields", "id", "told"),
    [
        ({"resolution": None}, "DATA-171", "has no resolution"),
        ({"video": None}, "DATA-171", "has no video.num_frames"),
        ({"id": ".."}, "DATA-171", "no name of a folder"),
        ({"id": "é" * 101}, "DATA-171", "no name of a folder"),
        ({"id": "a\nb"}, "CFG-130", r"stores/a\nb' holds a line end"),
        ({"crop_style": "face"}, "DATA-172", "has crop_style face"),
        ({"is_regularisation_data": True}, "DATA-172", "is regularisation data"),
        ({"video": {"num_frames": 9, "min_frames": 13}}, "DATA-172", "fewer than 13 frames"),
        ({"resolution": 8}, "CFG-211", "less than alignment 16"),
    ],
)
def test_what_has_no_word_here(fields: dict[str, Any], id: str, told: str, home: Path) -> None:
    entry = {name: value for name, value in (FILMS | fields).items() if value is not None}
    with pytest.raises(MMError) as caught:
        migrate(entry)
    assert [problem.id for problem in caught.value.problems] == [id] and told in str(caught.value)
    assert not Path("runs").exists()


def test_epochs_of_an_entry(home: Path) -> None:
    """SimpleTuner counts epochs from 1 and names the first and the last; here the ones before and up to which."""
    migrate(FILMS | {"start_epoch": 2, "end_epoch": 4}, PICTURES | {"start_epoch": 1, "end_epoch": 0})
    films, pictures = yaml.safe_load(Path("runs/training.yaml").read_text())["data"]["mixture"]["shares"]
    assert films == {"folder": "stores/films", "repeats": 3, "begin_epoch": 1, "end_epoch": 4}
    assert not {"begin_epoch", "end_epoch"} & pictures.keys()


def test_the_list_of_stores_is_read_back_whatever_their_names(home: Path) -> None:
    names = ["a,b", "#c", '"d', " e ", "é ~"]
    migrate(*(FILMS | {"id": name} for name in names))
    found = [str(source.folder) for source in store_sources("runs/features.txt", None, "data.jsonl", Storage())]
    assert found == [f"stores/{name}" for name in names]
    shares = yaml.safe_load(Path("runs/training.yaml").read_text())["data"]["mixture"]["shares"]
    assert [share["folder"] for share in shares] == found


def test_all_faults_at_once_and_no_file_is_replaced(home: Path) -> None:
    with pytest.raises(DataError) as caught:
        migrate(FILMS | {"crop_style": "face", "is_regularisation_data": True}, PICTURES | {"resolution": None})
    assert len(caught.value.problems) == 3
    migrate(PICTURES)
    before = {path: path.read_bytes() for path in Path("runs").iterdir()}
    with pytest.raises(ConfigError, match=r"CFG-193: runs/extract_pictures\.yaml exists"):
        migrate(FILMS, PICTURES)
    assert {path: path.read_bytes() for path in Path("runs").iterdir()} == before


def test_an_entry_is_named_of_entries_alone(home: Path) -> None:
    values = yaml.safe_load(Path("extract.yaml").read_text())
    values["data"]["entry"] = "films"
    Path("extract.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=r"CFG-170: .*data\.entry has no effect"):
        run_command.main(["extract.yaml"])
