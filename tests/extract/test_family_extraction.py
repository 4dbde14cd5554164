"""Extraction of VideoX-Fun's and Wan2.2's tasks, against the condition functions on pixels that PyAV decodes."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import yaml
from feature_samples import make_image_encoder, make_vae, write_clip
from PIL import Image
from store_content import listed, stored
from torch import Tensor

from mm.canvas import white_canvas
from mm.cli import run as run_command
from mm.cli.doctor_data import main as doctor_data
from mm.config.model import WAN_1_3B, of_task
from mm.config.tasks.vace import VACE
from mm.data.image import read_image
from mm.data.transforms import resize_and_crop
from mm.drops import draw_reference_frame
from mm.errors import DataError
from mm.generate.media_inputs import load_picture
from mm.generate.sources import Given, LateFeatures
from mm.poses import parse_poses, rows_of_frames
from mm.wan.conditions.camera import View, camera_channels, channels_of_path
from mm.wan.conditions.control import control_condition, reference_latents, start_condition
from mm.wan.conditions.inpaint import inpaint_condition
from mm.wan.conditions.known_frames import condition_latents
from mm.wan.conditions.pixels import ClipSize
from mm.wan.conditions.random_masks import draw_zeroing, random_mask
from mm.wan.conditions.vace import blanked, vace_context
from mm.wan.encoders import VideoEncoder
from mm.wan.image_encoder import ImageEncoder

SEED = 3
SIZE = ClipSize(9, 32, 48)


def pixels(file: Path, start: int, size: tuple[int, int] = (SIZE.height, SIZE.width)) -> Tensor:
    """Nine frames from `start` on as PyAV decodes them, covered and cropped: [3, 9, 32, 48] or of another size."""
    with av.open(str(file)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    chosen = torch.from_numpy(np.stack(frames[start : start + 9]))
    return resize_and_crop(chosen.permute(0, 3, 1, 2), *size).transpose(0, 1)


class Place:
    """Two videos with longer control videos at half their size, an image with its control image, and loose pictures."""

    def __init__(self, home: Path, weights: Path) -> None:
        self.home, self.weights = home, weights
        self.rows: list[dict[str, Any]] = [
            {"path": f"videos/{name}.mp4", "cap": name, "control": f"control/{name}.mp4"} for name in "ab"
        ]
        for number, name in enumerate("ab"):
            write_clip(home / f"set/videos/{name}.mp4", num_frames=14 + number)
            write_clip(home / f"set/control/{name}.mp4", num_frames=20 - number, height=24, width=32, gop=3)
        for name, shape in {"look": (40, 40), "tall": (90, 30)}.items():
            colours = np.random.default_rng(len(name)).integers(0, 256, (*shape, 3), np.uint8)
            Image.fromarray(colours).save(home / "set" / f"{name}.png")

    def run_file(self, task: str, **data: Any) -> Path:
        encoders: dict[str, Any] = {
            "vae": {"from_pretrained": str(self.weights / "vae"), "precision": "fp32"},
            "text": {"from_pretrained": str(self.weights / "text_encoder"), "precision": "fp32"},
            "tokenizer": {"from_pretrained": str(self.weights / "tokenizer")},
        }
        if task.startswith("fun_"):
            encoders["image"] = {"from_pretrained": str(self.weights / "image_encoder")}
        if "path" not in data:
            (self.home / "rows.json").write_text(json.dumps(self.rows))
            data["path"] = str(self.home / "rows.json")
        values = {
            "extraction": {"task": task, "seed": SEED, "device": "cpu"},
            "data": {
                "folder": str(self.home / "set"),
                "clip": {"num_frames": 9, "height": 32, "width": 48},
                "workers": 1,
                **data,
            },
            "encoders": encoders,
            "output": {"path": str(self.home / "store")},
        }
        (self.home / "run.yaml").write_text(yaml.safe_dump(values))
        return self.home / "run.yaml"

    def extract(self, task: str, **data: Any) -> dict[str, tuple[dict[str, Tensor], int]]:
        """Tensors and first frame of each sample by its caption."""
        run_command.main([str(self.run_file(task, **data))])
        found = stored(self.home / "store")
        return {row["cap"]: (found[row["sample"]], row["start_frame_idx"]) for row in listed(self.home / "store")}


@pytest.fixture
def place(tmp_path: Path, weights: Path) -> Place:
    return Place(tmp_path, weights)


@pytest.fixture(scope="module")
def vae() -> VideoEncoder:
    return VideoEncoder(make_vae())


@pytest.fixture(scope="module")
def image_encoder() -> ImageEncoder:
    return ImageEncoder(make_image_encoder())


def test_control_video_and_start_image(place: Place, vae: VideoEncoder, image_encoder: ImageEncoder) -> None:
    """The control video has the clip's own frames, wherever the clip begins; the start image is its first."""
    starts = set()
    for name, (tensors, start) in place.extract("fun_control").items():
        clip, control = (pixels(place.home / "set" / kind / f"{name}.mp4", start) for kind in ("videos", "control"))
        assert torch.equal(tensors["latents"], vae.encode(clip[None])[0])
        assert torch.equal(tensors["condition"], control_condition(vae.encode, SIZE, control, clip[:, 0]))
        assert torch.equal(tensors["image_features"], image_encoder.encode(clip[None, :, 0])[0])
        assert "reference_latents" not in tensors
        starts.add(start)
    assert starts - {0}, "a clip that begins at 0 proves nothing of its frames"


def test_one_frame_of_the_clip_is_start_or_reference(
    place: Place, vae: VideoEncoder, image_encoder: ImageEncoder
) -> None:
    place.rows = [{**row, "cut": [begin]} for begin in range(4) for row in place.rows]
    for row in place.rows:
        row["cap"] = f"{row['cap']}{row['cut'][0]}"
    drawn = set()
    for name, (tensors, start) in place.extract("fun_control_ref").items():
        sample = f"videos/{name[0]}.mp4" + ("" if name[1] == "0" else f"//{name[1]}-")
        index = draw_reference_frame(9, 0.4, SEED, sample, 0)
        clip, control = (pixels(place.home / "set" / kind / f"{name[0]}.mp4", start) for kind in ("videos", "control"))
        first, other = (clip[:, 0], None) if index == 0 else (None, clip[:, index])
        assert torch.equal(tensors["condition"], control_condition(vae.encode, SIZE, control, first))
        assert torch.equal(tensors["reference_latents"], reference_latents(vae.encode, SIZE, other))
        assert bool(tensors["reference_latents"].any()) == (index > 0) == (not bool(tensors["condition"][16:].any()))
        assert torch.equal(tensors["image_features"], image_encoder.encode(clip[None, :, index])[0])
        drawn.add(index > 0)
    assert drawn == {False, True}


def test_listed_images_take_the_place_of_the_clips_own(
    place: Place, vae: VideoEncoder, image_encoder: ImageEncoder
) -> None:
    """Images of any size are covered and cropped."""
    place.rows[0]["reference"] = "tall.png"
    place.rows[1]["first_frame"] = ["look.png"]
    found = place.extract("fun_control_ref")
    looks = {}
    for name in ("tall", "look"):
        picture = torch.from_numpy(np.array(Image.open(place.home / "set" / f"{name}.png"))).permute(2, 0, 1)[None]
        looks[name] = resize_and_crop(picture, SIZE.height, SIZE.width)[0]
    (first, start), (second, begin) = found["a"], found["b"]
    controls = [pixels(place.home / f"set/control/{name}.mp4", at) for name, at in (("a", start), ("b", begin))]
    assert torch.equal(first["reference_latents"], reference_latents(vae.encode, SIZE, looks["tall"]))
    assert torch.equal(first["condition"], control_condition(vae.encode, SIZE, controls[0], None))
    assert torch.equal(first["image_features"], image_encoder.encode(looks["tall"][None])[0])
    assert not second["reference_latents"].any()
    assert torch.equal(second["condition"], control_condition(vae.encode, SIZE, controls[1], looks["look"]))
    assert torch.equal(second["image_features"], image_encoder.encode(looks["look"][None])[0])


def test_wan22_has_no_image_encoder(place: Place, vae: VideoEncoder) -> None:
    found = place.extract("wan22_i2v")
    assert found.keys() == {"a", "b"}
    for name, (tensors, start) in found.items():
        clip = pixels(place.home / f"set/videos/{name}.mp4", start)
        expected = condition_latents(vae.encode, {0: clip[None, :, 0]}, 9)[0]
        assert torch.equal(tensors["condition"], expected) and "image_features" not in tensors


def test_vace_sees_what_the_mask_keeps_of_the_clip_or_a_video_of_its_own(place: Place, vae: VideoEncoder) -> None:
    """A mask for each frame, one for all, none; with the clip itself, and with another video."""
    block = np.zeros((48, 64, 3), np.uint8)
    block[10:30, 20:50] = 255
    Image.fromarray(block).save(place.home / "set/block.png")
    del place.rows[0]["control"], place.rows[1]["control"]
    first, second = place.rows
    place.rows = [
        {**first, "cap": "nothing"},
        {**first, "cap": "mask of all frames", "mask": "block.png"},
        {**first, "cap": "mask of each frame", "mask": "control/a.mp4"},
        {**second, "cap": "another video", "vace_video": "control/b.mp4"},
        {**second, "cap": "another video and a mask", "vace_video": "control/b.mp4", "mask": "block.png"},
    ]
    of_all = resize_and_crop(torch.from_numpy(block).permute(2, 0, 1)[None], 32, 48)[0].mean(0) / 2 + 0.5
    of_all = of_all.expand(9, -1, -1)
    for name, (tensors, start) in place.extract("vace").items():
        own, beside = ("a", None) if "another" not in name else ("b", pixels(place.home / "set/control/b.mp4", start))
        clip = pixels(place.home / f"set/videos/{own}.mp4", start)
        mask = of_all if name in ("mask of all frames", "another video and a mask") else None
        if name == "mask of each frame":
            mask = (pixels(place.home / "set/control/a.mp4", start).mean(0) / 2 + 0.5).clamp(0, 1)
        video = blanked(clip, mask) if beside is None and mask is not None else beside
        assert torch.equal(tensors["vace_context"], vace_context(vae.encode, SIZE, video, mask)), name
        assert torch.equal(tensors["latents"], vae.encode(clip[None])[0]) and "vace_scale" not in tensors


POSES = ["", *(f"{n} 0.5 0.9 0.5 0.5 0 0 1 0 {n / 50} 0 0 1 0 {n / 9} 0 0 1 {-n / 4}" for n in range(5))]


def test_a_cameras_path_is_stretched_over_the_video(
    place: Place, vae: VideoEncoder, image_encoder: ImageEncoder
) -> None:
    """Rows of the clip's own frames, and the part of the picture: the middle of 36x48, to which 48x64 was resized."""
    (place.home / "set/path.txt").write_text("\n".join(POSES) + "\n")
    for row in place.rows:
        row["camera"] = "path.txt"
    for number, (name, (tensors, start)) in enumerate(place.extract("fun_camera").items()):
        clip = pixels(place.home / f"set/videos/{name}.mp4", start)
        assert torch.equal(tensors["condition"], start_condition(vae.encode, SIZE, clip[:, 0]))
        assert torch.equal(tensors["image_features"], image_encoder.encode(clip[None, :, 0])[0])
        assert tensors["camera"].dtype == torch.float64
        rows = rows_of_frames(parse_poses("\n".join(POSES), "path"), 14 + number, range(start, start + 9))
        assert torch.equal(tensors["camera"][1:], rows)
        expected = camera_channels(rows, View(32, 48, (36, 48), (2, 0)))
        assert torch.equal(channels_of_path(tensors["camera"]), expected) and expected.shape == (24, 3, 32, 48)


def test_pose_files_that_are_malformed(place: Place) -> None:
    (place.home / "set/short.txt").write_text("\n".join([*POSES, "1 2 3"]) + "\n")
    (place.home / "set/flat.txt").write_text("\n".join(POSES).replace(" 0.9 ", " 0 ") + "\n")
    (place.home / "set/path.mp4").write_text("\n")
    for row, name in zip(place.rows, ("short.txt", "flat.txt"), strict=True):
        row["camera"] = name
    place.rows += [{"path": "videos/a.mp4", "cap": "x"}, {"path": "videos/b.mp4", "cap": "x", "camera": "look.png"}]
    with pytest.raises(DataError) as caught:
        place.extract("fun_camera")
    told = [problem.id for problem in caught.value.problems]
    assert told == ["DATA-251", *["DATA-251"] * 5, "DATA-245", "DATA-247"]
    assert "short.txt" in str(caught.value) and "flat.txt" in str(caught.value)


def given_to_generation(place: Place, names: Sequence[str], video: Tensor | None, mask: Tensor | None) -> Given:
    """A row of generation: its references are read as `mm generate` reads them."""
    references = tuple(load_picture(place.home / "set" / f"{name}.png") for name in names)
    return Given(video=video, mask=mask, references=references)


def test_references_stand_in_front_as_in_generation(place: Place, vae: VideoEncoder) -> None:
    """The context is that of generation bit by bit; the latents are those of each reference, then the clip's."""
    place.rows = [
        {"path": "videos/a.mp4", "cap": "alone", "vace_reference": "tall.png"},
        {"path": "videos/b.mp4", "cap": "two", "vace_reference": ["tall.png", "look.png"], "mask": "control/b.mp4"},
        {"path": "videos/b.mp4", "cap": "none", "mask": "control/b.mp4"},
    ]
    late = LateFeatures(of_task(WAN_1_3B, VACE), vae, SIZE, ())
    found, shapes = place.extract("vace"), dict[str, list[int]]()
    for name, pictures in {"alone": ["tall"], "two": ["tall", "look"], "none": []}.items():
        tensors, start = found[name]
        clip = pixels(place.home / f"set/videos/{'a' if name == 'alone' else 'b'}.mp4", start)
        mask = (pixels(place.home / "set/control/b.mp4", start).mean(0) / 2 + 0.5).clamp(0, 1)
        video, mask = (None, None) if name == "alone" else (blanked(clip, mask), mask)
        of_generation = late.of([given_to_generation(place, pictures, video, mask)])["vace_context"][0]
        assert torch.equal(tensors["vace_context"], of_generation)
        assert not tensors["vace_context"][16:, : len(pictures)].any(), "nothing changes in a reference, and no mask"
        looks = [read_image(place.home / "set" / f"{picture}.png") for picture in pictures]
        canvases = [white_canvas(look.permute(2, 0, 1) / 127.5 - 1, SIZE.height, SIZE.width) for look in looks]
        parts = [*(canvas[None, :, None] for canvas in canvases), clip[None]]
        assert torch.equal(tensors["latents"], torch.cat([vae.encode(part)[0] for part in parts], dim=1))
        shapes[name] = list(tensors["latents"].shape)
    assert shapes == {"alone": [16, 4, 4, 6], "two": [16, 5, 4, 6], "none": [16, 3, 4, 6]}
    rows = {row["cap"]: (row["latent_shape"], row["sample_size"]) for row in listed(place.home / "store")}
    assert rows["two"] == ([16, 5, 4, 6], "9x32x48") and rows["none"] == ([16, 3, 4, 6], "9x32x48")


def test_a_reader_has_room_for_all_that_may_be_beside_a_clip(place: Place) -> None:
    place.rows = place.rows[:1]
    place.rows[0] |= {"vace_video": "control/a.mp4", "mask": "control/a.mp4", "vace_reference": ["tall.png"] * 8}
    assert place.extract("vace")["a"][0]["latents"].shape == (16, 11, 4, 6)


def test_another_order_of_references_makes_a_sample_anew(place: Place) -> None:
    place.rows[1]["vace_reference"] = ["tall.png", "look.png"]
    before = place.extract("vace")
    place.rows[1]["vace_reference"] = ["look.png", "tall.png"]
    after = place.extract("vace")
    assert torch.equal(before["a"][0]["latents"], after["a"][0]["latents"])
    first, second, *clip = (frame for frame in before["b"][0]["latents"].split(1, dim=1))
    assert torch.equal(after["b"][0]["latents"], torch.cat((second, first, *clip), dim=1))


@pytest.mark.parametrize(
    ("form", "columns"),
    [
        ("diffsynth", ("video", "prompt", "vace_video", "vace_reference_image")),
        ("videox-fun", ("file_path", "text", "control_file_path", "object_file_path")),
        ("mindspeed", ("path", "cap", "vace_video", "reference")),
        ("hf-folder", ("file_name", "text", "vace_video_file_name", "reference_file_names")),
    ],
)
def test_references_of_other_formats(form: str, columns: tuple[str, ...], place: Place) -> None:
    """What each format calls them; the features are those of data.json. An image has them too."""
    names = ("path", "cap", "vace_video", "vace_reference")
    row = ("videos/a.mp4", "a", "control/a.mp4", ["look.png", "tall.png"])
    place.rows = [dict(zip(names, row, strict=True))]
    expected = place.extract("vace")["a"][0]
    (place.home / "store").rename(place.home / "first")
    table = place.home / "set" / "metadata.jsonl"
    rows = [row] if form == "mindspeed" else [row, ("look.png", "picture", None, "look.png")]
    table.write_text("\n".join(json.dumps(dict(zip(columns, one, strict=True))) for one in rows))
    found = place.extract("vace", path=str(table), format=form)
    assert found["a"][0]["latents"].shape == (16, 5, 4, 6)
    assert all(torch.equal(expected[name], value) for name, value in found["a"][0].items())
    if "picture" in found:
        assert found["picture"][0]["latents"].shape == (16, 2, 4, 6)
        assert listed(place.home / "store")[1]["sample_size"] == "1x32x48"


def test_references_that_cannot_be(place: Place) -> None:
    place.rows = [
        {"path": "videos/a.mp4", "cap": "many", "vace_reference": ["look.png"] * 9},
        {"path": "videos/a.mp4", "cap": "no image", "vace_reference": ["look.png", "control/a.mp4"]},
        {"path": "videos/b.mp4", "cap": "nowhere", "reference": ["nowhere.png"]},
    ]
    with pytest.raises(DataError) as caught:
        place.extract("vace")
    told = [(problem.id, problem.message) for problem in caught.value.problems]
    assert [id for id, _ in told] == ["DATA-246", "DATA-247", "DATA-001"]
    assert "9 files of the role vace_reference, and at most 8 are taken" in told[0][1]
    assert not (place.home / "store").exists()
    table, row = place.home / "set" / "metadata.jsonl", {"file_name": "videos/a.mp4", "text": "a"}
    both = {"reference_file_name": "tall.png", "object_file_name": "look.png"}
    table.write_text(json.dumps(row | both))
    with pytest.raises(DataError, match=r"DATA-252.*reference and object, which are one for vace: vace_reference"):
        place.extract("vace", path=str(table), format="hf-folder")


def test_a_tasks_own_role_goes_before_others(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """A table may be one of several tasks: what they call alike is left out, and the log says so."""
    place.rows = [{"path": "videos/a.mp4", "cap": "a", "vace_video": "control/a.mp4", "vace_reference": "tall.png"}]
    expected = place.extract("vace")["a"][0]
    (place.home / "store").rename(place.home / "first")
    place.rows[0] |= {"reference": "look.png", "control": "control/b.mp4"}
    caplog.clear()
    with caplog.at_level("INFO"):
        found = place.extract("vace")["a"][0]
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert "the task vace takes no files of the roles control, reference; they are left out" in caplog.text


@pytest.mark.parametrize("form", ["videox-fun", "diffsynth", "hf-folder"])
def test_control_of_other_formats(form: str, place: Place) -> None:
    """An image with a control image beside a video; of the video the features of data.json."""
    expected = place.extract("fun_control")["a"][0]
    (place.home / "store").rename(place.home / "first")
    columns = {
        "videox-fun": ("file_path", "text", "control_file_path"),
        "diffsynth": ("video", "prompt", "control_video"),
        "hf-folder": ("file_name", "text", "control_file_name"),
    }[form]
    rows = [("videos/a.mp4", "a", "control/a.mp4"), ("look.png", "picture", "look.png")]
    table = place.home / "set" / "metadata.jsonl"
    table.write_text("\n".join(json.dumps(dict(zip(columns, row, strict=True))) for row in rows))
    found = place.extract("fun_control", path=str(table), format=form)
    assert all(torch.equal(expected[name], value) for name, value in found["a"][0].items())
    picture = found["picture"][0]
    assert picture["condition"].shape == (32, 1, 4, 6)
    assert torch.equal(picture["condition"][:16], picture["latents"])  # it is its own control and start
    assert torch.equal(picture["condition"][16:], picture["latents"])


def test_another_control_file_makes_that_sample_anew(place: Place) -> None:
    place.extract("fun_control")
    bodies = sorted((place.home / "store/shards").glob("*/body.bin"))
    before = [body.stat().st_mtime_ns for body in bodies]
    write_clip(place.home / "set/control/b.mp4", num_frames=18, height=24, width=32)
    place.extract("fun_control")
    assert [body.stat().st_mtime_ns == time for body, time in zip(bodies, before, strict=True)] == [True, False]


def test_all_rows_are_told_at_once(place: Place) -> None:
    (place.home / "set/notes.txt").write_text("x")
    del place.rows[0]["control"]
    place.rows[1]["control"] = ["control/a.mp4", "control/b.mp4"]
    place.rows += [
        {"path": "videos/a.mp4", "cap": "x", "control": "look.png"},
        {"path": "videos/b.mp4", "cap": "x", "control": "control/nowhere.mp4"},
        {"path": "videos/a.mp4", "cap": "y", "control": "../b.mp4"},
        {"path": "videos/b.mp4", "cap": "y", "control": "control/b.mp4", "first_frame": "notes.txt"},
    ]
    with pytest.raises(DataError) as caught:
        place.extract("fun_control")
    told = [(problem.id, problem.message) for problem in caught.value.problems]
    assert [id for id, _ in told] == ["DATA-245", "DATA-246", "DATA-247", "DATA-001", "DATA-063", "DATA-247"]
    assert all(re.search(rf"row {number}\b", message) for number, (_, message) in enumerate(told, start=1)), told
    assert not (place.home / "store").exists()


@pytest.mark.parametrize(
    ("control", "id", "words"),
    [
        ({"num_frames": 8}, "DATA-248", "ends after 8 frames"),
        ({"num_frames": 20, "height": 48, "width": 48}, "DATA-249", "48x48"),
        ({"num_frames": 20, "height": 74, "width": 100}, None, ""),  # 48x64 scaled, each side rounded to even pixels
    ],
)
def test_control_videos_that_do_not_fit(control: dict[str, int], id: str | None, words: str, place: Place) -> None:
    write_clip(place.home / "set/control/b.mp4", **control)
    if id is None:
        assert place.extract("fun_control").keys() == {"a", "b"}
        return
    with pytest.raises(DataError, match=id) as caught:
        place.extract("fun_control")
    assert words in str(caught.value)
    with pytest.raises(DataError, match=f"1 of 2 samples cannot be used: 1 {id}"):
        doctor_data([str(place.run_file("fun_control")), "--output", str(place.home / "report")])
    assert place.extract("fun_control", on_bad_sample="skip:max=50%").keys() == {"a"}


def test_inpainting_by_drawn_masks_and_listed_ones(
    place: Place, vae: VideoEncoder, image_encoder: ImageEncoder
) -> None:
    """Masks of several kinds are drawn by key; of a listed one white is made anew."""
    place.rows = [
        {"path": f"videos/{name}.mp4", "cap": f"{name}{cut}", "cut": [cut]} for cut in range(5) for name in "ab"
    ]
    place.rows.append({"path": "videos/a.mp4", "cap": "listed", "mask": "control/a.mp4"})
    kinds = set()
    found = place.extract("fun_inp")
    assert len(found) == 11
    for name, (tensors, start) in found.items():
        path = f"videos/{name[0]}.mp4" if name != "listed" else "videos/a.mp4"
        sample = next(row["sample"] for row in listed(place.home / "store") if row["cap"] == name)
        clip = pixels(place.home / "set" / path, start)
        mask = random_mask(SIZE, SEED, sample, 0)
        if name == "listed":
            mask = (pixels(place.home / "set/control/a.mp4", start).mean(0) / 2 + 0.5).clamp(0, 1)
        is_zero = draw_zeroing(0.9, SEED, sample, 0)
        expected = inpaint_condition(vae.encode, SIZE, clip, mask, nothing_known_is_zero=is_zero)
        assert torch.equal(tensors["condition"], expected), name
        assert torch.equal(tensors["image_features"], image_encoder.encode(clip[None, :, 0])[0])
        kinds.add((bool(mask.all()), bool(mask[0].any()), bool(mask[-1].any())))
    assert len(kinds) > 2, "masks of one kind prove little"


def test_inpainting_of_images(place: Place, vae: VideoEncoder, image_encoder: ImageEncoder) -> None:
    """A single frame has masks of its own kinds: most leave all of it to make, others a block or a circle."""
    Image.fromarray(np.eye(40, dtype=np.uint8) * 255).save(place.home / "set" / "eye.png")
    rows = [f"{name}.png,{name} {number}," for number in range(10) for name in ("look", "tall")]
    (place.home / "rows.csv").write_text("\n".join(["video,prompt,mask", *rows, "look.png,listed,eye.png"]))
    table = {"path": str(place.home / "rows.csv"), "format": "diffsynth", "file_keys": ["mask"]}
    size, kinds = ClipSize(1, 32, 48), set()
    for name, (tensors, _) in place.extract("fun_inp", **table).items():
        file = "look" if name == "listed" else name.split()[0]
        with Image.open(place.home / f"set/{file}.png") as opened:
            image = torch.from_numpy(np.array(opened)).permute(2, 0, 1)[None]
        clip = resize_and_crop(image, 32, 48).transpose(0, 1)
        sample = next(row["sample"] for row in listed(place.home / "store") if row["cap"] == name)
        mask = random_mask(size, SEED, sample, 0)
        if name == "listed":
            with Image.open(place.home / "set/eye.png") as opened:
                grey = torch.from_numpy(np.array(opened)).expand(1, 3, 40, 40)
            mask = (resize_and_crop(grey, 32, 48)[:, 0] / 2 + 0.5).clamp(0, 1)
        is_zero = draw_zeroing(0.9, SEED, sample, 0)
        expected = inpaint_condition(vae.encode, size, clip, mask, nothing_known_is_zero=is_zero)
        assert torch.equal(tensors["condition"], expected) and tensors["condition"].shape[1] == 1, name
        assert torch.equal(tensors["image_features"], image_encoder.encode(clip[None, :, 0])[0])
        kinds.add((bool(mask.all()), bool(tensors["condition"].any())))
    assert {(True, False), (False, True)} <= kinds, "masks of one kind prove little"
