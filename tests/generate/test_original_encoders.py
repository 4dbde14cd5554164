"""`mm generate` with the encoders' original files, where they lie: the clips of the folders that they were made of."""

import json
from pathlib import Path

import numpy as np
import pytest
from family import inference_json, noise
from generation_runs import failure
from kept_frames import keeping_frames
from PIL import Image
from released import COMMON, COMMON_OF_IMAGES, released_config, write_common_files, write_encoders, write_release

import mm.generate.run
from mm.cli.generate import main

T5_FILE, VAE_FILE = "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"
CLIP_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
WORDS = ["--mm-model", "model.json", "--device", "cpu", "--no-progress-bar"]


def test_clips_are_those_of_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing is written beside the files; one of another kind is refused."""
    monkeypatch.chdir(tmp_path)
    folders, models = tmp_path / "folders", tmp_path / "models"
    write_encoders(folders)
    write_common_files(models, folders)
    weights = write_release(models, COMMON_OF_IMAGES, "i2v")
    common, images = models / COMMON, models / COMMON_OF_IMAGES
    Path("prompts.txt").write_text("a red disc moves left")
    Image.fromarray(noise(1, 32, 32)).save("first.png")
    Path("images.txt").write_text("first.png")

    def write(vae: Path, text: Path, clip: Path) -> None:
        named = inference_json(folders, released_config("i2v"))
        for name, path in (("ae", vae), ("text_encoder", text), ("image_encoder", clip)):
            named[name]["from_pretrained"] = str(path)
        named["tokenizer"]["from_pretrained"] = str(common / "google" / "umt5-xxl")
        Path("model.json").write_text(json.dumps(named))

    before = sorted(models.rglob("*"))
    of = [*WORDS, "--load", str(weights), "--image", "images.txt", "--save-path"]
    with keeping_frames(mm.generate.run):
        write(folders / "vae", folders / "t5", folders / "clip")
        main([*of, "folders_clips"])
        write(common / VAE_FILE, common / T5_FILE, images / CLIP_FILE)
        main([*of, "files_clips"])
    frames = [np.load(f"{name}_clips/video_0000.npy") for name in ("folders", "files")]
    assert frames[0].std() > 1 and np.array_equal(*frames)
    assert sorted(models.rglob("*")) == before
    write(common / T5_FILE, common / T5_FILE, images / CLIP_FILE)
    assert failure(capfd, *of[5:], "other_clips") == (65, ["DATA-045"])
