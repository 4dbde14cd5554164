"""Each format of metadata through `mm doctor data` and `mm run`, on one video and one image: the same features."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKLWan
from feature_samples import write_clip
from PIL import Image
from store_content import listed, stored

from mm.cli import run as run_command
from mm.cli.doctor_data import main as doctor_data
from mm.data.transforms import resize_and_crop
from mm.errors import ConfigError, DataError

CAPTIONS = {"videos/one.mp4": "a red circle", "pictures/two.png": "a blue square"}
VIDEO, IMAGE = CAPTIONS
BACKEND = [
    {"id": "v", "dataset_type": "video", "instance_data_dir": "set/videos", "caption_strategy": "textfile"},
    {"id": "p", "dataset_type": "image", "instance_data_dir": "set/pictures", "caption_strategy": "textfile"},
]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A data set of a video and an image, which every table below lists."""
    folder = tmp_path / "set"
    write_clip(folder / VIDEO, num_frames=14)
    (folder / IMAGE).parent.mkdir()
    colours = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
    Image.fromarray(colours).save(folder / IMAGE)
    for path, caption in CAPTIONS.items():
        (folder / path).with_suffix(".txt").write_text(caption + "\n")
    rows = list(CAPTIONS.items())
    tables: dict[str, Any] = {
        "videox.json": [{"file_path": p, "text": c, "type": "video" if p == VIDEO else "image"} for p, c in rows],
        "data.json": [{"path": VIDEO, "cap": CAPTIONS[VIDEO]}],
        "metadata.jsonl": [{"file_name": p, "text": c} for p, c in rows],
    }
    for name, content in tables.items():
        lines = [json.dumps(row) for row in content]
        (folder / name).write_text("\n".join(lines) if name.endswith("jsonl") else f"[{','.join(lines)}]")
    (folder / "videox.csv").write_text("file_path,text\r\n" + "".join(f'{p},"{c}"\r\n' for p, c in rows))
    (folder / "diffsynth.csv").write_text("video,prompt\n" + "".join(f"{p},{c}\n" for p, c in rows))
    (tmp_path / "backend.json").write_text(json.dumps(BACKEND))
    (tmp_path / "list.txt").write_text(f"{folder},videox.csv\n")
    return tmp_path


def run_file(home: Path, weights: Path, task: str = "t2v", **data: Any) -> Path:
    encoders: dict[str, Any] = {
        "vae": {"from_pretrained": str(weights / "vae"), "precision": "fp32"},
        "text": {"from_pretrained": str(weights / "text_encoder"), "precision": "fp32"},
        "tokenizer": {"from_pretrained": str(weights / "tokenizer")},
    }
    if task != "t2v":
        encoders["image"] = {"from_pretrained": str(weights / "image_encoder")}
    values = {
        "extraction": {"task": task, "seed": 3, "device": "cpu"},
        "data": {"clip": {"num_frames": 9, "height": 32, "width": 48}, "workers": 1, **data},
        "encoders": encoders,
        "output": {"path": str(home / "store")},
    }
    (home / "run.yaml").write_text(yaml.safe_dump(values))
    return home / "run.yaml"


def extracted(home: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors by caption."""
    tensors = stored(home / "store")
    return {row["cap"]: tensors[row["sample"]] for row in listed(home / "store")}


FORMATS = {
    "VideoX-Fun": {"path": "set/videox.json", "folder": "set"},
    "VideoX-Fun, CSV in a list": {"path": "list.txt"},
    "DiffSynth": {"path": "set/diffsynth.csv", "folder": "set", "format": "diffsynth"},
    "Hugging Face": {"path": "set/metadata.jsonl", "format": "hf-folder"},
    "SimpleTuner": {"path": "backend.json", "format": "simpletuner", "folder": "."},
}


@pytest.mark.parametrize("name", FORMATS)
def test_features_of_every_format(
    name: str, home: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the video those of MindSpeed-MM's data.json, of the image what diffusers' VAE makes of one frame."""
    monkeypatch.chdir(home)
    file = run_file(home, weights, **FORMATS[name])
    doctor_data([str(file), "--output", "report"])
    assert "2 samples, all of them can be used" in capsys.readouterr().out
    run_command.main([str(file)])
    found = extracted(home)
    assert set(found) == set(CAPTIONS.values())
    pixels = torch.from_numpy(np.array(Image.open(home / "set" / IMAGE))).permute(2, 0, 1)[None]
    vae = AutoencoderKLWan.from_pretrained(weights / "vae")
    with torch.no_grad():
        mode = vae.encode(resize_and_crop(pixels, 32, 48).transpose(0, 1)[None]).latent_dist.mode()
    mean, deviation = (
        torch.tensor(numbers).view(-1, 1, 1, 1) for numbers in (vae.config.latents_mean, vae.config.latents_std)
    )
    latents = found[CAPTIONS[IMAGE]]["latents"]
    assert latents.shape == (16, 1, 4, 6) and torch.allclose(latents, (mode[0] - mean) / deviation, atol=1e-5)
    if name == "SimpleTuner":  # whose samples have ids of their own, and so other starts
        assert found[CAPTIONS[VIDEO]]["latents"].shape == (16, 3, 4, 6)
        return
    (home / "store").rename(home / "theirs")
    run_command.main([str(run_file(home, weights, path="set/data.json", folder="set"))])
    ours = extracted(home)[CAPTIONS[VIDEO]]
    assert all(torch.equal(ours[name], tensor) for name, tensor in found[CAPTIONS[VIDEO]].items())


def test_the_doctor_writes_a_csv_without_the_bad_rows(
    home: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    table = home / "set" / "videox.csv"
    good = table.read_bytes()
    (home / "set" / "broken.png").write_bytes((home / "set" / IMAGE).read_bytes()[:500])
    table.write_bytes(good + b'broken.png,"two\r\nlines"\r\n../x.mp4,x\r\nx.mp4\r\n')
    file = run_file(home, weights, path="list.txt")
    with pytest.raises(DataError, match="3 of 5 samples cannot be used: 1 DATA-061, 1 DATA-063, 1 DATA-086"):
        doctor_data([str(file), "--output", "report"])
    assert (home / "report" / "videox.clean.csv").read_bytes() == good


def test_the_doctor_has_no_list_of_a_folder(
    home: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    (home / "set" / IMAGE).write_bytes(b"")
    with pytest.raises(DataError) as caught:
        doctor_data([str(run_file(home, weights, **FORMATS["SimpleTuner"])), "--output", "report"])
    report = json.loads((home / "report" / "report.json").read_text())
    assert report["clean"] == [] and [row["sample"] for row in report["bad_samples"]] == ["p:two.png"]
    assert str(caught.value).endswith("Fix: See report/report.json.")


def test_a_bad_image_may_be_left_out(home: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    (home / "set" / IMAGE).write_bytes((home / "set" / IMAGE).read_bytes()[:500])
    table = FORMATS["VideoX-Fun"]
    with pytest.raises(DataError, match="DATA-086"):
        run_command.main([str(run_file(home, weights, **table))])
    run_command.main([str(run_file(home, weights, **table, on_bad_sample="skip:max=50%"))])
    assert list(extracted(home)) == [CAPTIONS[VIDEO]]
    assert json.loads((home / "store" / "skipped.jsonl").read_text())["error"] == "DATA-086"


def test_a_task_with_given_frames_takes_no_image(home: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    with pytest.raises(DataError, match=r"DATA-047: .*videox.json row 2"):
        run_command.main([str(run_file(home, weights, "i2v", **FORMATS["VideoX-Fun"]))])
    assert not (home / "store").exists()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"path": "set/videox.parquet", "folder": "set"}, "CFG-053"),
        ({"path": "set/videox.json"}, "CFG-053"),
        ({"path": "set/videox.json", "folder": "set", "format": "videoxfun"}, "CFG-005"),
        ({"path": "set/videox.json", "folder": "set", "file_keys": ["depth"]}, "CFG-170"),
    ],
)
def test_what_cannot_be(data: dict[str, Any], expected: str, home: Path, weights: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run_command.main([str(run_file(home, weights, **data))])
    assert [problem.id for problem in caught.value.problems] == [expected]


@pytest.mark.parametrize("form", ["videox.csv", "metadata.jsonl", "diffsynth.csv"])
def test_real_clips_in_other_formats(form: str, real_clips: Path, home: Path, weights: Path) -> None:
    """Real clips as a data set of MindSpeed-MM and as one of another system."""
    rows = json.loads((real_clips / "data.json").read_text())[:2]
    names = {"videox.csv": ("file_path", "text"), "metadata.jsonl": ("file_name", "text")}
    path, caption = names.get(form, ("video", "prompt"))
    table = home / form
    if form.endswith("jsonl"):
        table.write_text("\n".join(json.dumps({path: row["path"], caption: row["cap"]}) for row in rows))
    else:
        lines = ['{},"{}"'.format(row["path"], row["cap"].replace('"', '""')) for row in rows]
        table.write_text("\n".join([f"{path},{caption}", *lines]))
    (home / "data.json").write_text(json.dumps(rows))
    stores = []
    for annotation in (table, home / "data.json"):
        run_command.main([str(run_file(home, weights, path=str(annotation), folder=str(real_clips)))])
        stores.append(extracted(home))
        (home / "store").rename(home / f"store of {annotation.name}")
    first, second = stores
    assert first.keys() == second.keys() and len(first) == 2
    for cap, tensors in first.items():
        assert all(torch.equal(tensor, second[cap][name]) for name, tensor in tensors.items())
