"""The script that adds sizes to VideoX-Fun's metadata."""

import json
from pathlib import Path

import pytest
from PIL import Image

from mm.cli.videox_fun_sizes import main
from mm.demo.video import write_video
from mm.errors import DataError


def test_every_row_gets_the_size_of_its_file(tmp_path: Path) -> None:
    import numpy as np

    Image.new("RGB", (48, 32)).save(tmp_path / "a.png")
    write_video(tmp_path / "b.mp4", np.zeros((5, 32, 64, 3), np.uint8), 8)
    rows = [
        {"file_path": "a.png", "text": "ä", "type": "image"},
        {"file_path": "b.mp4", "text": "b", "type": "video"},
        {"file_path": "gone.mp4", "text": "c", "type": "video", "width": 7, "height": 9},
    ]
    given, written = tmp_path / "in.json", tmp_path / "out.json"
    for content in (rows, {"samples": rows}):
        given.write_text(json.dumps(content))
        main(
            [
                "--input_file",
                str(given),
                "--output_file",
                str(written),
                "--base_dir",
                str(tmp_path),
                "--num_processes=2",
            ]
        )
        found = json.loads(written.read_text())
        sized = found["samples"] if isinstance(content, dict) else found
        assert [(row["width"], row["height"]) for row in sized] == [(48, 32), (64, 32), (7, 9)]
        assert [row["text"] for row in sized] == ["ä", "b", "c"]


def test_files_that_cannot_be_read_are_told_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    rows = [{"file_path": name, "text": "", "type": kind} for name, kind in (("x.mp4", "video"), ("bad.png", "image"))]
    (tmp_path / "in.json").write_text(json.dumps(rows))
    with pytest.raises(DataError) as caught:
        main([f"--input_file={tmp_path}/in.json", f"--output_file={tmp_path}/out.json", f"--base_dir={tmp_path}"])
    assert len(caught.value.problems) == 2
    assert not (tmp_path / "out.json").exists()
