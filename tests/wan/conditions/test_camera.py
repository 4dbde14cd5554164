"""Camera paths and rays against VideoX-Fun's and DiffSynth-Studio's numbers, and what geometry says of them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mm.errors import ConfigError, DataError
from mm.poses import ORIGIN, SPEED, direction_rows, parse_poses, read_poses, rows_of_frames
from mm.wan.conditions.camera import View, camera_channels, plucker_rays

PATHS = ("pan", "zoom", "turn")
SIZES = ((12, 20), (8, 24))
DIRECTIONS = ("Left", "RightUp", "Down", "In")
Numbers = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def rays(oracles: Path) -> Numbers:
    return load_file(oracles / "camera.safetensors")


@pytest.fixture(scope="module")
def about(oracles: Path) -> dict[str, dict[str, object]]:
    return json.loads((oracles / "camera.json").read_text())["directions"]


def assert_is(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_rays(oracles: Path, rays: Numbers, path: str, size: tuple[int, int]) -> None:
    rows = read_poses(oracles / f"camera_pose_{path}.txt")
    name = f"pose.{path}.{size[0]}x{size[1]}"
    assert_is(plucker_rays(rows, View(*size)), rays[f"{name}.pluecker"])
    channels = camera_channels(rows, View(*size))
    assert channels.shape == (24, 2, *size) and channels.dtype == torch.float32
    if path == "pan":
        assert_is(channels, rays[f"{name}.packed"])
    else:
        of_a_pixel = rays[f"{name}.packed_sum_over_space"].double() / (size[0] * size[1])
        assert_is(channels.double().mean((2, 3)), of_a_pixel)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_directions(rays: Numbers, about: dict[str, dict[str, object]], direction: str) -> None:
    told = about[f"direction.{direction}"]
    rows = direction_rows(direction, 5, told["speed"])
    assert rows[0].tolist() == list(ORIGIN)
    torch.testing.assert_close(rows[-1], torch.tensor(told["last_row"], dtype=torch.float64), rtol=0, atol=1e-15)
    assert_is(plucker_rays(rows, View(*told["size"])), rays[f"direction.{direction}.pluecker"])


def test_no_direction_is_left_out(about: dict[str, dict[str, object]]) -> None:
    assert {name.removeprefix("direction.") for name in about if "." in name} == set(DIRECTIONS)
    assert about["direction.Left"]["speed"] == SPEED


def test_a_path_is_stretched_over_a_video(oracles: Path, rays: Numbers, about: dict[str, dict[str, object]]) -> None:
    rows = read_poses(oracles / "camera_pose_turn.txt")
    found = rows_of_frames(rows, 9, about["rows_of_a_9_frame_video"]["frame_indices"])
    torch.testing.assert_close(found, rays["pose.turn.rows_of_a_9_frame_video"], rtol=1e-15, atol=1e-15)


def test_a_path_over_as_many_frames_stays() -> None:
    rows = direction_rows("LeftIn", 5)
    assert torch.equal(rows_of_frames(rows, 5, range(5)), rows)
    assert torch.equal(rows_of_frames(rows, 1, [0]), rows[:1])
    assert torch.equal(rows_of_frames(rows[:1], 4, [0, 3]), rows[[0, 0]])
    assert torch.equal(rows_of_frames(rows, 3, [2, 0]), rows[[4, 0]])  # ends on ends, in the order that is asked for


def test_three_frames_are_like_any_others() -> None:
    """A cross product over the first axis of size 3 would take the frames."""
    rows = direction_rows("RightUpOut", 5, speed=0.3)
    all_five = plucker_rays(rows, View(8, 12))
    assert torch.equal(plucker_rays(rows[:3], View(8, 12)), all_five[:3])
    moments, directions = all_five[:, :3], all_five[:, 3:]
    assert moments.abs().max() > 0.5
    torch.testing.assert_close((moments * directions).sum(1), torch.zeros(5, 8, 12), rtol=0, atol=1e-6)
    torch.testing.assert_close(directions[0].norm(dim=0), torch.ones(8, 12))


def test_the_middle_ray_of_a_camera_that_goes_ahead() -> None:
    """World to camera has the depth of the origin in its last column: 0.5 nearer a frame is 0.5 further along z."""
    rows = direction_rows("In", 2, speed=0.5)
    found = plucker_rays(rows, View(9, 9, aspect=1.0))
    assert found[1, 3:, 4, 4].tolist() == [0, 0, 1] and not found[1, :3, 4, 4].any()
    x, y, z = found[1, 3:, 8, 2]
    assert x < 0 < y < z  # left of the middle and below it
    torch.testing.assert_close(found[1, :3, 8, 2], 0.5 * torch.stack((-y, x, torch.tensor(0.0))))


@pytest.mark.parametrize("aspect", [16 / 9, 1.0])
def test_a_clip_cut_out_of_the_picture_has_its_rays(aspect: float) -> None:
    rows = direction_rows("LeftUp", 5, origin=(*ORIGIN[:3], 0.45, 0.55, *ORIGIN[5:]))
    whole = plucker_rays(rows, View(24, 40, aspect=aspect))
    cut = plucker_rays(rows, View(16, 32, cover=(24, 40), corner=(3, 5), aspect=aspect))
    assert torch.equal(cut, whole[:, :, 3:19, 5:37])


def test_a_finer_picture_has_the_same_rays_between() -> None:
    """The ray through the middle of 3x3 pixels is that of one three times as large."""
    rows = direction_rows("RightIn", 5)
    coarse, fine = plucker_rays(rows, View(8, 20)), plucker_rays(rows, View(24, 60))
    assert_is(fine[:, :, 1::3, 1::3], coarse)


def test_channels_count_by_component_then_by_frame() -> None:
    rays = plucker_rays(direction_rows("RightDownIn", 9), View(8, 8))
    channels = camera_channels(direction_rows("RightDownIn", 9), View(8, 8)).unflatten(0, (6, 4))
    for component in range(6):
        for frame in range(4):
            assert torch.equal(channels[component, frame, 0], rays[0, component])
            assert torch.equal(channels[component, frame, 2], rays[5 + frame, component])


@pytest.mark.parametrize("direction", ["Left", "RightDown", "UpRight", "LeftUpIn", "OutDownRight", "In"])
def test_directions_that_go_together(direction: str) -> None:
    rows = direction_rows(direction, 3, speed=0.1)
    moved = {
        "Left": (9, 0.2),
        "Right": (9, -0.2),
        "Up": (13, 0.2),
        "Down": (13, -0.2),
        "In": (18, -0.2),
        "Out": (18, 0.2),
    }
    expected = dict(moved[word] for word in moved if word in direction)
    found = {
        entry: round(float(rows[2, entry] - rows[0, entry]), 12)
        for entry in range(19)
        if rows[2, entry] != rows[0, entry]
    }
    assert found == expected


@pytest.mark.parametrize(
    "direction", ["", "left", "LeftRight", "UpDown", "InOut", "LeftLeft", "Left Up", "Forward", "LeftX"]
)
def test_directions_that_are_none(direction: str) -> None:
    with pytest.raises(ConfigError, match="CFG-251") as caught:
        direction_rows(direction, 5)
    assert repr(direction) in caught.value.problems[0].message


@pytest.mark.parametrize(
    ("speed", "origin", "told"),
    [
        (float("nan"), ORIGIN, "speed is nan"),
        (0.1, ORIGIN[:18], "has 18 numbers, expected 19"),
        (0.1, (*ORIGIN[:1], 0, *ORIGIN[2:]), "focal lengths 0 and"),
    ],
)
def test_speeds_and_origins_that_are_none(speed: float, origin: tuple[float, ...], told: str) -> None:
    with pytest.raises(ConfigError, match="CFG-257") as caught:
        direction_rows("Left", 5, speed, origin)
    assert told in caught.value.problems[0].message


GOOD = "0 0.53 0.95 0.5 0.5 0 0 1 0 0 0.1 0 1 0 0.2 0 0 1 0.3"


@pytest.mark.parametrize("first", ["https://example.org/clip", "", "1 2 3"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n  \n"])
def test_a_pose_file(first: str, end: str) -> None:
    rows = parse_poses(f"{first}\n{GOOD}\r\n{GOOD.replace(' ', '  ')}{end}", "path.txt")
    assert rows.dtype == torch.float64 and rows.tolist() == [list(map(float, GOOD.split()))] * 2


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (GOOD[:-4], "line 3 has 18 words, expected 19 numbers"),
        (GOOD + " 1", "line 3 has 20 words, expected 19 numbers"),
        ("", "line 3 has 0 words"),
        (GOOD.replace("0.95", "wide"), "line 3 has 'wide' among its numbers"),
        (GOOD.replace("0.95", "1_0"), "line 3 has '1_0' among its numbers"),
        (GOOD.replace("0.95", "nan"), "line 3 holds a number that is not finite"),
        (GOOD.replace("0.3", "inf"), "line 3 holds a number that is not finite"),
        (GOOD.replace("0.95", "-1"), "line 3 has focal lengths 0.53 and -1"),
        (GOOD.replace("0.5 0.5 0 0", "0.5 0.5 0 0.1"), "line 3 has 0 and 0.1 behind the centre"),
        (GOOD.replace("0 0 1 0.3", "0 0 0 0.3"), "line 3 has a matrix of determinant 0"),
        (GOOD.replace("0 0 1 0.3", "0 0 -1 0.3"), "line 3 has a matrix of determinant -1"),
    ],
)
def test_lines_that_are_no_poses(line: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_poses("\n".join(("", GOOD, line, GOOD)), "path.txt")
    (problem,) = caught.value.problems
    assert problem.id == "CFG-250" and problem.message.startswith(f"path.txt {told}")


def test_every_bad_line_is_told_up_to_a_limit() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_poses("\n".join((GOOD, GOOD, *(["bad"] * 30))), "path.txt")
    problems = caught.value.problems
    assert "line 1 is a pose" in problems[0].message and "line 3 has 1 words" in problems[1].message
    assert len(problems) == 21 and "11 more such lines" in problems[-1].message


@pytest.mark.parametrize("text", ["", "\n", "https://example.org/clip", "https://example.org/clip\n\n"])
def test_a_file_without_poses(text: str, tmp_path: Path) -> None:
    (tmp_path / "path.txt").write_text(text)
    with pytest.raises(ConfigError, match=r"CFG-250: .*path\.txt has no poses"):
        read_poses(tmp_path / "path.txt")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"\xff\xfe\x00")
    for name in ("clip.mp4", "nothing.txt", "."):
        with pytest.raises(DataError, match="DATA-001"):
            read_poses(tmp_path / name)


def test_rows_and_frames_that_are_none() -> None:
    for rows in (torch.zeros(5, 18), torch.zeros(19), torch.zeros(0, 19)):
        with pytest.raises(ConfigError, match="CFG-258: Camera poses are"):
            plucker_rays(rows, View(8, 8))
    for index in (-1, 9):
        with pytest.raises(ConfigError, match=f"CFG-258: Poses are asked for frame {index} of a video of 9"):
            rows_of_frames(direction_rows("Left", 5), 9, [0, index])
    with pytest.raises(ConfigError, match="CFG-255"):
        camera_channels(direction_rows("Left", 4), View(8, 8))
