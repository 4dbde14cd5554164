"""From videos of several sizes to a training step: `mm run` extracts by a shape rule and trains on what it gave."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import AutoencoderKLWan
from feature_samples import write_clip
from store_content import content, is_finished, stored
from store_content import listed as rows_of
from training_runs import WEIGHTS, metrics

from mm.cli import doctor as doctor_command
from mm.cli import run as run_command
from mm.data.video import probe, read_frames
from mm.errors import ConfigError, DataError, MMError

ROOT = Path(__file__).parents[2]
SIZES = {"a.mp4": (14, 64, 112), "b.mp4": (9, 112, 64), "c.mp4": (14, 80, 80), "d.mp4": (30, 64, 112)}
RULE = {"rule": "pixel_area", "resolution": 64, "alignment": 16, "crop_style": "center"}


@pytest.fixture
def extraction(demo: Path, tmp_path: Path) -> dict[str, Any]:
    """A run of the example over four videos, by a rule."""
    for name, (num_frames, height, width) in SIZES.items():
        write_clip(tmp_path / "set" / name, num_frames, height, width)
    rows = [{"path": name, "cap": "a red circle"} for name in SIZES]
    (tmp_path / "set" / "data.json").write_text(json.dumps(rows))
    values: dict[str, Any] = yaml.safe_load((ROOT / "examples" / "run_extraction.yaml").read_text())
    for section in ("vae", "text", "tokenizer"):
        named = values["encoders"][section]
        named["from_pretrained"] = named["from_pretrained"].replace("demo", str(demo), 1)
    values["data"] |= {"path": str(tmp_path / "set" / "data.json"), "folder": str(tmp_path / "set"), "workers": 1}
    values["data"]["clip"] = {"num_frames": 13, "min_num_frames": 5, "shape": RULE, "frames": {"start": "first"}}
    values["output"]["path"] = str(tmp_path / "store")
    return values


def training(demo: Path, folder: Path, **clip: Any) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((ROOT / "examples" / "run.yaml").read_text())
    (folder / "features.txt").write_text(f"{folder / 'store'}\n")
    values["training"]["steps"] = 2
    values["data"] |= {"features": {"path": str(folder / "features.txt"), **clip}, "micro_batch_size": 1}
    values["data"]["global_batch_size"] = 4
    values["checkpoint"] = {"load": str(demo / WEIGHTS), "save": str(folder / "run"), "save_interval": 2}
    return values


def go(values: dict[str, Any], file: Path) -> None:
    file.write_text(yaml.safe_dump(values))
    run_command.main([str(file)])


def listed(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["sample"]: row for row in rows_of(folder / "store")}


def test_several_sizes_are_extracted_and_trained(demo: Path, tmp_path: Path, extraction: dict[str, Any]) -> None:
    go(extraction, tmp_path / "extract.yaml")
    rows = listed(tmp_path)
    # edge 64: 64 x sqrt(1.75) is 84.7 and 48.4, so 80 x 48; a square stays one
    assert {name: row["sample_size"] for name, row in rows.items()} == {
        "a.mp4": "13x48x80", "b.mp4": "9x80x48", "c.mp4": "13x64x64", "d.mp4": "13x48x80",
    }  # fmt: skip
    assert rows["a.mp4"]["latent_shape"] == [16, 4, 6, 10] and rows["b.mp4"]["latent_shape"] == [16, 3, 10, 6]
    assert rows["b.mp4"]["taken"] == {"frames": list(range(9)), "resized": [84, 48], "corner": [2, 0]}

    vae = AutoencoderKLWan.from_pretrained(extraction["encoders"]["vae"]["from_pretrained"])
    mean, std = (torch.tensor(getattr(vae.config, f"latents_{name}")).view(1, 16, 1, 1, 1) for name in ("mean", "std"))
    file = tmp_path / "set" / "b.mp4"
    frames = torch.cat(list(read_frames(file, probe(file), range(9))))
    shrunk = torch.nn.functional.interpolate(frames.float(), (84, 48), mode="bilinear", antialias=True)
    pixels = (shrunk[:, :, 2:82] / 127.5 - 1).transpose(0, 1)[None]
    with torch.no_grad():
        expected = (vae.encode(pixels).latent_dist.mode() - mean) / std
    found = stored(tmp_path / "store")["b.mp4"]["latents"]
    assert torch.allclose(found, expected[0], rtol=1e-5, atol=1e-5)

    before = content(tmp_path / "store")
    go(extraction, tmp_path / "extract.yaml")
    assert content(tmp_path / "store") == before, "complete, and not made again"
    go(training(demo, tmp_path), tmp_path / "train.yaml")
    assert len(metrics(tmp_path / "run")) == 2, "the store as it is"


def test_training_compares_the_rule(demo: Path, tmp_path: Path, extraction: dict[str, Any]) -> None:
    go(extraction, tmp_path / "extract.yaml")
    go(training(demo, tmp_path, clip={"num_frames": 13, "shape": RULE}), tmp_path / "train.yaml")
    assert len(metrics(tmp_path / "run")) == 2
    for clip, told in (
        ({"num_frames": 13, "height": 48, "width": 80}, "height is None, expected 48"),
        ({"num_frames": 13, "shape": {**RULE, "resolution": 80}}, "'resolution': 80"),
        ({"num_frames": 9, "shape": RULE}, "num_frames is 13, expected 9"),
    ):
        with pytest.raises(DataError, match="DATA-014") as caught:
            go(training(demo, tmp_path, clip=clip), tmp_path / "train.yaml")
        assert told in str(caught.value)
    values = training(demo, tmp_path)
    values["data"]["micro_batch_size"] = 2
    values["checkpoint"]["save"] = str(tmp_path / "other")
    with pytest.raises(MMError, match="DATA-015"):
        go(values, tmp_path / "train.yaml")
    extraction["data"]["clip"]["shape"] = {**RULE, "rounding": 1}
    with pytest.raises(DataError, match=r"DATA-014: The features in .* shape is"):
        go(extraction, tmp_path / "extract.yaml")


def test_a_dry_run_asks_for_one_size(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "train.yaml"
    for clip in ({}, {"clip": {"num_frames": 13, "shape": RULE}}):
        file.write_text(yaml.safe_dump(training(demo, tmp_path, **clip)))
        with pytest.raises(ConfigError, match=f"CFG-047: data.features.clip in {file} says no size"):
            doctor_command.main([str(file), "--dry-run"])
    doctor_command.main([str(file), "--dry-run", "--latent-size", "4", "6", "10"])
    assert "60 a sample" in capsys.readouterr().out  # 4 x 3 x 5 tokens


def test_samples_that_a_rule_leaves_out_are_told_or_skipped(tmp_path: Path, extraction: dict[str, Any]) -> None:
    extraction["data"]["clip"]["shape"] = {**RULE, "minimum_aspect_ratio": 0.8}
    with pytest.raises(DataError, match=r"DATA-160: .*b\.mp4: a picture of 112 x 64 has the aspect 0\.571; 0\.8 to 4"):
        go(extraction, tmp_path / "extract.yaml")
    assert not is_finished(tmp_path / "store")
    extraction["data"]["on_bad_sample"] = "skip:max=50%"
    go(extraction, tmp_path / "extract.yaml")
    assert sorted(listed(tmp_path)) == ["a.mp4", "c.mp4", "d.mp4"]
    (skipped,) = (tmp_path / "store" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(skipped)["error"] == "DATA-160"


def test_rates_are_extracted(tmp_path: Path, extraction: dict[str, Any]) -> None:
    """Clips of 8 frames a second at 4: every second frame."""
    extraction["data"]["clip"] = {
        "num_frames": 13, "min_num_frames": 5, "frames": {"fps": 4.0, "start": "first"},
        "shape": {"rule": "ratio_buckets", "side": 64},
    }  # fmt: skip
    go(extraction, tmp_path / "extract.yaml")
    taken = {name: row["taken"]["frames"] for name, row in listed(tmp_path).items()}
    assert taken == {
        "a.mp4": [0, 2, 4, 6, 8], "b.mp4": [0, 2, 4, 6, 8], "c.mp4": [0, 2, 4, 6, 8], "d.mp4": list(range(0, 26, 2)),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("clip", "told"),
    [
        ({"width": 64}, ['CFG-004: FILE lacks the key "data.clip.height"']),
        ({}, ['CFG-004: FILE lacks the key "data.clip.height"', 'CFG-004: FILE lacks the key "data.clip.width"']),
        ({"shape": RULE, "height": 64}, ["CFG-210: FILE: data.clip.height has no effect beside data.clip.shape"]),
        ({"shape": {"side": 64}}, ['CFG-004: FILE lacks the key "data.clip.shape.rule"']),
        ({"shape": {"rule": "pixels", "side": 64}}, ['CFG-005: FILE: "data.clip.shape.rule" is "pixels"; exp']),
        ({"shape": {"rule": "ratio_buckets"}}, ['CFG-004: FILE lacks the key "data.clip.shape.side"']),
        ({"shape": {**RULE, "aligment": 16}}, ['unknown key "data.clip.shape.aligment". Did you mean "align']),
        ({"shape": {**RULE, "alignment": 24}}, ["CFG-211: FILE: data.clip.shape.alignment is 24, not"]),
        ({"shape": {**RULE, "resolution": 12}}, ["CFG-211: FILE: data.clip.shape.resolution is 12 pixels"]),
        ({"shape": {**RULE, "rule": "area"}, "num_frames": 8}, ["CFG-050"]),
        ({"height": 10**9, "width": 64}, ["CFG-051: FILE: data.clip.height is 1000000000, and pictures have at most"]),
        ({"shape": RULE, "num_frames": 10**9 + 1}, ["CFG-050: FILE: data.clip.num_frames is 1000000001; clips have"]),
        ({"shape": {**RULE, "resolution": 1e300}}, ['CFG-005: FILE: "data.clip.shape.resolution" is 1e+300']),
        ({"shape": {**RULE, "minimum_image_size": 1e300}}, ["CFG-005"]),
        ({"shape": {"rule": "max_pixels", "max_pixels": 10**30}}, ["CFG-005"]),
        ({"shape": {"rule": "ratio_buckets", "side": 10**9}}, ["CFG-005"]),
        ({"shape": {**RULE, "minimum_aspect_ratio": 0.004}}, ["CFG-211: FILE: data.clip.shape.minimum_aspect_ratio"]),
        ({"shape": {**RULE, "rule": "area", "resolution": 480}}, ["resolution is 480 megapixels, more than 64"]),
        ({"shape": {**RULE, "minimum_aspect_ratio": 5}}, ["minimum_aspect_ratio is 5, more than"]),
        ({"shape": {**RULE, "maximum_image_size": 99}}, ["without target_downs", "effect without crop"]),
        ({"shape": {**RULE, "crop": True, "crop_aspect": "closest"}}, ["crop_aspect_buckets is missing"]),
        ({"shape": {**RULE, "crop": True, "crop_aspect_buckets": [1.0]}}, ["has no effect with crop_aspect square"]),
        (
            {"shape": {**RULE, "crop": True, "crop_aspect": "random",
                       "crop_aspect_buckets": [{"aspect": 1.0, "weight": 0.5}, {"aspect": 2.0, "weight": 0.4}]}},
            ["has weights of 0.9 together"],
        ),
        ({"shape": {"rule": "token_length", "min_side": 99, "max_side": 64, "token_side": 64}}, ["min_side is 99"]),
        ({"shape": {"rule": "token_length", "min_side": 64, "max_side": 64, "token_side": 99}}, ["token_side is 99"]),
        ({"shape": {"rule": "max_pixels", "max_pixels": 4096, "multiple": 20}}, ["multiple is 20, not a"]),
        ({"shape": {"rule": "ratio_buckets", "side": 64, "full_share": 0.5}}, ["full_share has no effect"]),
        ({"shape": RULE, "frames": {"fps": 8}, "frame_interval": 2}, ["CFG-212: FILE: data.clip.frames.fps is 8"]),
        ({"shape": RULE, "frames": {"length_multiple": 8}}, ["CFG-212: FILE: data.clip.frames.length_multiple"]),
        ({"shape": RULE, "frames": {"max_frames": 12}}, ["CFG-212: FILE: data.clip.frames.max_frames is 12"]),
        ({"shape": RULE, "frames": {"shorter_share": 0.1}, "num_frames": 5}, ["CFG-212: FILE: data.clip.frames.s"]),
    ],
)  # fmt: skip
def test_rules_that_make_no_sense(
    tmp_path: Path, extraction: dict[str, Any], clip: dict[str, Any], told: list[str]
) -> None:
    extraction["data"]["clip"] = {"num_frames": 13, **clip}
    with pytest.raises(ConfigError) as caught:
        go(extraction, tmp_path / "extract.yaml")
    found = [str(problem) for problem in caught.value.problems]
    assert len(found) == len(told), found
    assert all(any(text.replace("FILE", str(tmp_path / "extract.yaml")) in one for one in found) for text in told), (
        found
    )
    assert not (tmp_path / "store").exists()
