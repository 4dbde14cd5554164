"""What extraction refuses: stores of another recipe, bad videos, annotations and encoders; by id, before it writes."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from extraction_runs import ROWS, edit, run, times, words
from feature_samples import make_vae, write_clip, write_data_set, write_encoders, write_sound
from store_content import is_finished, listed

from mm.cli.extract import main
from mm.errors import ConfigError, DataError
from mm.extract.run import ExtractReport


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "1/", "/2", "a/b", "1/0", "1/2/3", "1.0/2"])
def test_parts_that_cannot_be(part: str, files: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=rf"CFG-225: --shard-of is '{part}'"):
        run(files, shard_of=part)


@pytest.mark.parametrize(
    ("name", "keys", "value", "said"),
    [
        ("mm_data", ("dataset_param", "preprocess_parameters", "num_frames"), 5, "num_frames is 9, expected 5"),
        ("mm_data", ("dataset_param", "preprocess_parameters", "max_width"), 64, "width is 48, expected 64"),
        ("mm_model", ("ae", "dtype"), "bf16", "vae_dtype is fp32, expected bf16"),
        ("mm_model", ("ae", "enable_tiling"), True, "tile_size is None, expected (34, 34)"),
    ],
)
def test_a_store_of_another_recipe(
    name: str, keys: tuple[str, ...], value: Any, said: str, files: dict[str, Path], tmp_path: Path
) -> None:
    run(files)
    before = times(tmp_path / "store")
    edit(files[name], *keys, value=value)
    with pytest.raises(DataError) as caught:
        run(files)
    assert caught.value.id == "DATA-014" and said in str(caught.value)
    assert times(tmp_path / "store") == before and len(listed(tmp_path / "store")) == 5
    assert run(files, overwrite=True) == ExtractReport(listed=5, encoded=5, reused=0)


def test_other_weights_or_seed_are_another_recipe(files: dict[str, Path], tmp_path: Path) -> None:
    run(files)
    with pytest.raises(DataError, match=r"DATA-014.*seed is 3, expected 4"):
        run(files, seed=4)
    write_encoders(tmp_path / "other")
    vae = make_vae()
    with torch.no_grad():
        vae.encoder.conv_in.bias[0] += 0.5
    vae.save_pretrained(tmp_path / "other" / "vae")
    edit(files["mm_model"], "ae", "from_pretrained", value=str(tmp_path / "other" / "vae"))
    with pytest.raises(DataError, match=r"DATA-014.*vae is"):
        run(files)
    edit(files["mm_model"], "text_encoder", "from_pretrained", value=str(tmp_path / "other" / "text_encoder"))
    with pytest.raises(DataError) as caught:  # a copy of the same text encoder is the same
        run(files)
    assert "text_encoder" not in str(caught.value)


def broken_video(kind: str, path: Path) -> None:
    path.unlink()
    if kind == "zero bytes":
        path.touch()
    elif kind == "truncated":
        write_clip(path, num_frames=40)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "audio only":
        write_sound(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "one frame":
        write_clip(path, num_frames=1)
    elif kind == "one frame short":
        write_clip(path, num_frames=8)


@pytest.mark.parametrize(
    ("kind", "id"),
    [
        ("zero bytes", "DATA-002"),
        ("truncated", "DATA-002"),
        ("audio only", "DATA-003"),
        ("missing", "DATA-001"),
        ("folder", "DATA-001"),
        ("fifo", "DATA-001"),
        ("one frame", "DATA-004"),
        ("one frame short", "DATA-004"),
    ],
)
def test_one_bad_video_stops_with_its_name(kind: str, id: str, files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "set" / "more" / "3.mp4"
    broken_video(kind, path)
    with pytest.raises(DataError) as caught:
        run(files)
    assert caught.value.id == id and "more/3.mp4" in str(caught.value)
    assert not is_finished(tmp_path / "store")
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    write_clip(tmp_path / "set" / "more" / "3.mp4", num_frames=14)
    assert run(files).listed == 5


def test_a_clip_that_takes_too_long_stops_with_its_name(files: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"path": row["path"], "cap": row["cap"]} for row in ROWS]
    # they take longer to read than to encode, so that none is waiting when it is asked for
    write_data_set(tmp_path / "set", rows, num_frames=14, height=576, width=768)
    with pytest.raises(DataError, match=r"DATA-070: .*[0-9]\.mp4: its reader gave nothing in 1e-06 s"):
        run(files, decode_timeout=1e-6)
    assert not is_finished(tmp_path / "store")
    assert run(files).encoded == 5


def test_nothing_is_written_before_the_annotations_are_checked(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "set" / "data.json").write_text(json.dumps([{"path": "none.mp4"}, {"path": "../x", "cap": "x"}]))
    with pytest.raises(DataError) as caught:
        run(files)
    assert [p.id for p in caught.value.problems] == ["DATA-062", "DATA-001", "DATA-063"]
    assert not (tmp_path / "store").exists()


def test_videos_too_short_by_their_annotation_are_told_before_any_work(files: dict[str, Path], tmp_path: Path) -> None:
    rows = [{**row, "num_frames": 14 if index % 2 else 8} for index, row in enumerate(ROWS)]
    (tmp_path / "set" / "data.json").write_text(json.dumps(rows))
    with pytest.raises(DataError) as caught:
        run(files)
    assert [p.id for p in caught.value.problems] == ["DATA-004"] * 3
    assert not (tmp_path / "store").exists()


def test_the_command_reports_all_files_at_once(files: dict[str, Path]) -> None:
    edit(files["mm_data"], "dataset_param", "preprocess_parameters", "num_frames", value=80)
    edit(files["mm_model"], "ae", "do_sample", value=True)
    edit(files["mm_tool"], "sorafeature", "save_pth", value="x")
    with pytest.raises(ConfigError) as caught:
        main(words(files))
    assert [p.id for p in caught.value.problems] == ["CFG-005", "CFG-003", "CFG-050"]


def test_encoders_that_give_nan_are_not_written(files: dict[str, Path], tmp_path: Path) -> None:
    vae = make_vae()
    with torch.no_grad():
        vae.quant_conv.bias.fill_(float("nan"))
    vae.save_pretrained(tmp_path / "nan")
    edit(files["mm_model"], "ae", "from_pretrained", value=str(tmp_path / "nan"))
    with pytest.raises(DataError, match="DATA-013"):
        run(files)
    assert os.listdir(tmp_path / "store" / "shards") == [] and not is_finished(tmp_path / "store")
