import json
from pathlib import Path

import pytest
from mindspeed_alone import load_extract_model, load_extract_tools

from mm.config.data import data_sources, store_sources
from mm.config.flags import as_words
from mm.config.rules.extraction import check_extraction
from mm.config.rules.training import check_training
from mm.config.run.extraction import ExtractionRun
from mm.config.storage import Storage
from mm.dialects.mindspeed.extraction import read_extraction
from mm.dialects.mindspeed.files import load_extract_data, load_train_data
from mm.dialects.mindspeed.training import read_training
from mm.errors import ConfigError

EXAMPLES = Path(__file__).parents[2] / "examples" / "wan2.1" / "feature_extract"

TRAIN = {
    "dataset_param": {
        "dataset_type": "t2v",
        "basic_parameters": {"data_path": "data.txt", "data_storage_mode": "sorafeatured"},
        "preprocess_parameters": {"num_frames": 81, "max_height": 480, "max_width": 832, "cfg": 0.1},
    }
}


def write(folder: Path, values: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return path


def ids_of(error: ConfigError) -> list[str]:
    return [problem.id for problem in error.problems]


def checked(data: Path, model: Path = EXAMPLES / "model_wan.json") -> ExtractionRun:
    run = read_extraction(as_words({"mm_data": data, "mm_model": model, "mm_tool": EXAMPLES / "tools.json"}))
    check_extraction(run)
    return run


def edited(path: Path, folder: Path, **preprocess: object) -> Path:
    values = json.loads(path.read_text())
    values["dataset_param"]["preprocess_parameters"].update(preprocess)
    return write(folder, values)


def test_the_shipped_files_say_what_the_guide_says() -> None:
    data = load_extract_data(EXAMPLES / "data.json").dataset_param
    clip = data.preprocess_parameters
    assert (clip.num_frames, clip.max_height, clip.max_width) == (81, 480, 832)
    assert data.basic_parameters.data_path == "./examples/wan2.1/feature_extract/data.txt"
    run = checked(EXAMPLES / "data.json")
    tiles = run.encoders.vae.tiles
    assert tiles is not None and (tiles.size, tiles.stride) == ((34, 34), (18, 16))
    assert load_extract_tools(EXAMPLES / "tools.json").sorafeature.save_path
    sources = data_sources(str(EXAMPLES / "data.txt"))
    assert [source.annotation.name for source in sources] == ["data.json"]


def test_all_impossible_values_at_once(tmp_path: Path) -> None:
    bad = edited(EXAMPLES / "data.json", tmp_path, num_frames=80, max_height=490, max_width=7, min_num_frames=99)
    with pytest.raises(ConfigError) as caught:
        checked(bad)
    assert ids_of(caught.value) == ["CFG-050", "CFG-051", "CFG-051", "CFG-052"]
    text = str(caught.value)
    assert "Use 77 or 81." in text and "Use 480 or 496." in text and "Use 16." in text


@pytest.mark.parametrize("num_frames", [1, 5, 77, 81, 121])
def test_frame_rule_accepts_4k_plus_1(num_frames: int, tmp_path: Path) -> None:
    run = checked(edited(EXAMPLES / "data.json", tmp_path, num_frames=num_frames))
    assert run.data.clip.num_frames == num_frames


@pytest.mark.parametrize("num_frames", [2, 3, 4, 80, 82, 83])
def test_frame_rule_refuses_others(num_frames: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="CFG-050"):
        checked(edited(EXAMPLES / "data.json", tmp_path, num_frames=num_frames))


def test_fields_of_mindspeed_mm_without_effect_are_told_with_what_to_do_beside_other_problems(tmp_path: Path) -> None:
    bad = edited(EXAMPLES / "data.json", tmp_path, speed_factor=2.0, max_hxw=100, cfg=0.1, nm=3)
    with pytest.raises(ConfigError) as caught:
        load_extract_data(bad)
    assert sorted(ids_of(caught.value)) == ["CFG-003", "CFG-008", "CFG-008", "CFG-008"]
    assert "feature_data.json" in str(caught.value)


def test_typing_mistake_gets_a_hint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'CFG-003.*Did you mean "frame_interval"'):
        load_extract_data(edited(EXAMPLES / "data.json", tmp_path, frame_intervall=2))


def test_training_file(tmp_path: Path) -> None:
    data = load_train_data(write(tmp_path, TRAIN))
    assert data.dataset_param.preprocess_parameters.cfg == 0.1
    assert data.dataloader_param.shuffle
    with pytest.raises(ConfigError, match="CFG-005"):
        bad = json.loads(json.dumps(TRAIN))
        bad["dataset_param"]["preprocess_parameters"]["cfg"] = 1.5
        load_train_data(write(tmp_path, bad))


@pytest.mark.parametrize(
    ("basic", "said"),
    [
        ({"data_path": "a.txt", "data_folder": "x"}, "no effect"),
        ({"data_path": "s3://b/x", "data_folder": "x"}, "no effect"),
        ({"data_path": "a.jsonl"}, "missing"),
        ({"data_path": "a.csv", "data_folder": "x"}, "none of"),
    ],
)
def test_where_the_data_are_must_be_said_in_one_way(basic: dict[str, str], said: str, tmp_path: Path) -> None:
    values = json.loads(json.dumps(TRAIN))
    values["dataset_param"]["basic_parameters"] = basic
    words = ["--mm-data", str(write(tmp_path, values)), "--mm-model", "none.json", "--lr", "1", "--train-iters", "1"]
    with pytest.raises(ConfigError, match=f"CFG-053.*{said}"):
        check_training(read_training(words, 1))


def test_list_of_data_sets(tmp_path: Path) -> None:
    listing = tmp_path / "data.txt"
    listing.write_bytes(b"\xef\xbb\xbf# two sets\r\n/one,data.json\r\n\r\n two , other/rows.jsonl \r\n/three\r\n")
    sources = store_sources(str(listing), None, "data.jsonl", Storage())
    assert [(str(s.folder), str(s.annotation)) for s in sources] == [
        ("/one", "/one/data.json"),
        ("two", "other/rows.jsonl"),
        ("/three", "/three/data.jsonl"),
    ]
    with pytest.raises(ConfigError) as caught:  # without a default, a folder alone is not enough
        data_sources(str(listing))
    assert ids_of(caught.value) == ["CFG-054"] and "line 5" in str(caught.value)


@pytest.mark.parametrize("text", ["", "\n\n", "a,b,c\n,x\n"])
def test_list_of_data_sets_malformed(text: str, tmp_path: Path) -> None:
    listing = tmp_path / "data.txt"
    listing.write_text(text)
    with pytest.raises(ConfigError) as caught:
        data_sources(str(listing))
    assert set(ids_of(caught.value)) == {"CFG-054"}
    assert len(caught.value.problems) == (2 if "a,b,c" in text else 1)


def test_tiles_that_cannot_work(tmp_path: Path) -> None:
    values = json.loads((EXAMPLES / "model_wan.json").read_text())
    values["ae"]["tiling_param"] = {"tile_size": [34, 34], "tile_stride": [40, 16]}
    values["ae"]["enable_tiling"] = False
    with pytest.raises(ConfigError) as caught:
        checked(EXAMPLES / "data.json", write(tmp_path, values))
    assert ids_of(caught.value) == ["CFG-055", "CFG-055"]
    values["ae"]["do_sample"] = True
    with pytest.raises(ConfigError, match=r"CFG-005.*do_sample"):
        load_extract_model(write(tmp_path, values))
