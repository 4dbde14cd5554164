"""What tests of data and extraction start from: real H.264 clips, tiny random encoders, the files of a run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from diffusers import AutoencoderKLWan
from transformers import CLIPVisionConfig, CLIPVisionModel, T5TokenizerFast, UMT5Config, UMT5EncoderModel

WORDS = ("a", "red", "blue", "circle", "square", "moving", "left", "right", "&", "<b>")
TEXT_DIM = 32


def moving_square(num_frames: int, height: int, width: int) -> np.ndarray:
    """Frames uint8 [F, H, W, 3], no two alike: a bright square crosses a gradient."""
    rows, columns = np.mgrid[:height, :width]
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    frames[..., 0] = rows * 255 // height
    frames[..., 1] = columns * 255 // width
    for index in range(num_frames):
        left = (3 * index) % max(1, width - 8)
        frames[index, height // 4 : height // 4 + 8, left : left + 8] = (255, 255, 40)
        frames[index, -4:, :, 2] = (index * 37) % 256
    return frames


def write_clip(
    path: Path,
    num_frames: int = 9,
    height: int = 48,
    width: int = 64,
    pixel_format: str = "yuv420p",
    gop: int = 5,
    faststart: bool = False,
) -> Path:
    """Encode `moving_square` as H.264 with B frames, so that decoding order is not display order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"movflags": "faststart"} if faststart else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = height, width, pixel_format
        stream.options = {"g": str(gop), "bf": "2", "crf": "18"}
        for pixels in moving_square(num_frames, height, width):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())
    return path


def write_sound(path: Path) -> Path:
    """An mp4 with sound and no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_data_set(folder: Path, rows: Sequence[dict[str, Any]], **clip: Any) -> Path:
    """A data set folder with data.json and a clip for each row; returns data.json."""
    for row in rows:
        write_clip(folder / row["path"], **clip)
    (folder / "data.json").write_text(json.dumps(list(rows)))
    return folder / "data.json"


def make_vae() -> AutoencoderKLWan:
    torch.manual_seed(1)
    return AutoencoderKLWan(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()


def make_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    torch.manual_seed(2)
    config = UMT5Config(vocab_size=vocab_size, d_model=TEXT_DIM, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    return UMT5EncoderModel(config).eval()


def make_tokenizer() -> T5TokenizerFast:
    letters = [chr(code) for code in range(33, 127) if chr(code) not in WORDS]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    vocabulary += [(f"▁{word}", -2.0) for word in WORDS] + [(letter, -8.0) for letter in letters]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512)


def make_image_encoder(patch_size: int = 14) -> CLIPVisionModel:
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    return CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=224, patch_size=patch_size)).eval()


def write_encoders(folder: Path) -> Path:
    """vae/, text_encoder/, tokenizer/ and image_encoder/ below `folder`, random weights."""
    tokenizer = make_tokenizer()
    make_vae().save_pretrained(folder / "vae")
    make_text_encoder(len(tokenizer)).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    make_image_encoder().save_pretrained(folder / "image_encoder")
    return folder


def write_extraction_files(
    folder: Path,
    weights: Path,
    data_path: Path,
    data_folder: Path | None,
    save_path: Path,
    task: str | None = None,
    **preprocess: Any,
) -> dict[str, Path]:
    """The three JSON files of a tiny extraction; returns them by flag name."""
    clip = {"num_frames": 9, "max_height": 32, "max_width": 48, **preprocess}
    basic = {"data_path": str(data_path)} | ({"data_folder": str(data_folder)} if data_folder else {})
    contents = {
        "mm_data": {
            "dataset_param": {
                "dataset_type": "t2v",
                "basic_parameters": basic,
                "preprocess_parameters": clip,
                "tokenizer_config": {"from_pretrained": str(weights / "tokenizer")},
            }
        },
        "mm_model": {
            "ae": {"from_pretrained": str(weights / "vae"), "dtype": "fp32"},
            "text_encoder": {"from_pretrained": str(weights / "text_encoder"), "dtype": "fp32"},
        },
        "mm_tool": {"sorafeature": {"save_path": str(save_path)}},
    }
    if task is not None:
        contents["mm_model"]["task"] = contents["mm_tool"]["task"] = task
        contents["mm_model"]["ae"]["i2v_processor"] = {"image_encoder": str(weights / "image_encoder")}
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.json" for name in contents}
    for name, content in contents.items():
        files[name].write_text(json.dumps(content))
    return files
