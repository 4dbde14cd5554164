"""The prompts that are read and the clips that are written."""

import json
import logging
import subprocess
import sys

import av
import pytest
import torch

from mm.errors import DataError
from mm.generate.rows import read_prompts
from mm.generate.video import clip_path, prepare_folder, write_clip

COLOURS = torch.tensor([[220, 40, 30], [20, 200, 60], [40, 60, 230], [250, 250, 250], [10, 10, 10]], dtype=torch.uint8)


def frames_of_colours():
    """Five frames of 48x64, each of one colour."""
    return COLOURS.view(5, 1, 1, 3).expand(5, 48, 64, 3).contiguous()


def test_prompts_of_any_line_end_and_blank_lines(tmp_path, caplog):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red disc\r\n\r\n  \t\r\n一只猫\x0c、\u2028狗 \r\nthe last".encode())
    with caplog.at_level(logging.INFO):
        assert read_prompts(path) == ["a red disc", "一只猫\x0c、\u2028狗", "the last"]
    assert "3 prompts, 2 blank lines left out" in caplog.text


def test_a_final_line_end_is_no_blank_line(tmp_path, caplog):
    path = tmp_path / "prompts.txt"
    path.write_text("one\ntwo\n")
    with caplog.at_level(logging.INFO):
        assert read_prompts(path) == ["one", "two"]
    assert "blank" not in caplog.text


@pytest.mark.parametrize(
    ("content", "id"), [(b"", "DATA-054"), (b"\n \r\n", "DATA-054"), (b"\xff\xfe\x00", "DATA-053")]
)
def test_bad_prompt_files(tmp_path, content, id):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_prompts(path)
    assert caught.value.id == id


@pytest.mark.parametrize("name", ["missing.txt", "."])
def test_prompts_that_are_no_file(tmp_path, name):
    with pytest.raises(DataError) as caught:
        read_prompts(tmp_path / name)
    assert caught.value.id == "DATA-053"


def test_a_clip_is_read_back(tmp_path):
    path = clip_path(tmp_path, 3)
    write_clip(path, frames_of_colours(), 12, {"prompt": "一只猫"})
    assert path.name == "video_0003.mp4"
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        decoded = list(container.decode(stream))
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 12)
    assert [(frame.width, frame.height) for frame in decoded] == [(64, 48)] * 5
    assert {(frame.colorspace, frame.color_primaries, frame.color_trc) for frame in decoded} == {(1, 1, 1)}
    for frame, colour in zip(decoded, COLOURS, strict=True):
        seen = torch.from_numpy(frame.to_ndarray(format="rgb24")).float().mean(dim=(0, 1))
        assert (seen - colour).abs().max() < 3
    assert json.loads(path.with_suffix(".json").read_text(encoding="utf-8")) == {"prompt": "一只猫"}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["video_0003.json", "video_0003.mp4"]


def test_the_same_frames_give_the_same_bytes(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_clip(tmp_path / name, frames_of_colours(), 16, {})
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_a_folder_that_cannot_be_made(tmp_path):
    prepare_folder(tmp_path / "new" / "clips")
    prepare_folder(tmp_path / "new" / "clips")
    assert not list((tmp_path / "new" / "clips").iterdir())
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DataError) as caught:
            prepare_folder(folder)
        assert caught.value.id == "DATA-051"


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from mm.errors import DataError
from mm.generate.video import write_clip
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
frames = torch.randint(256, (9, 64, 64, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
try:
    write_clip(Path(sys.argv[1]), frames, 16, {"new": 1})
except DataError as error:
    sys.exit(error.id)
"""


def test_a_full_disk_leaves_the_old_clip(tmp_path):
    """The operating system's limit on a file's size stands for the full disk: writing fails halfway through."""
    path = tmp_path / "video_0000.mp4"
    write_clip(path, frames_of_colours(), 16, {"old": 1})
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    result = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True)
    assert result.stderr.strip().splitlines()[-1] == "DATA-052", result.stderr
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before
