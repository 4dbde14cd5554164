"""Tiny models of the Wan family with random weights that move the latents, and files for their rows without loss."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from kept_frames import keeping_frames
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import mm.generate.run
from mm.cli.generate import main
from mm.config.model import WanConfig
from mm.config.tasks.registry import TASKS
from mm.config.tasks.task import Sizes, Source
from mm.demo.components import IMAGE_DIM, TEXT_DIM
from mm.wan.config_json import wan_config_to_original
from mm.wan.inputs import ModelInputs
from mm.wan.model import WanModel

FRAMES, SIDE = 9, 32
SIZE = (FRAMES, SIDE, SIDE)
CLIP_TOKENS = 257


def config(task: str) -> WanConfig:
    declared = TASKS[task]
    images = {"img_dim": IMAGE_DIM, "clip_token_len": CLIP_TOKENS} if declared.made_by(Source.IMAGE_ENCODER) else {}
    side = {"vace_layers": (0, 1)} if "vace_layers" in declared.sizes else {}
    of_latents = declared.latent_channels or 16
    channels = declared.channels(Sizes(of_latents, (1, 1, 1), IMAGE_DIM, CLIP_TOKENS))
    return WanConfig(
        model_type=task, text_len=32, text_dim=TEXT_DIM, in_dim=of_latents + channels, out_dim=of_latents,
        hidden_size=32, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=32, **images, **side,
    )  # fmt: skip


def write_transformer(folder: Path, task: str) -> WanConfig:
    """A transformer in native names."""
    wan = config(task)
    torch.manual_seed(0)
    weights = {
        name: torch.randn(parameter.shape) * (0.2 if parameter.dim() > 1 else 0.05)
        for name, parameter in WanModel(wan).named_parameters()
    }
    folder.mkdir(parents=True)
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(wan_config_to_original(wan)))
    return wan


def inference_json(parts: Path, wan: WanConfig, **more: Any) -> dict[str, Any]:
    """inference_model.json of a model beside the embedded default's encoders."""
    image = {"image_encoder": {"from_pretrained": str(parts / "image_encoder"), "dtype": "fp32"}}
    predictor = {name: value for name, value in wan.model_dump(mode="json").items() if value is not None}
    return {
        "prompt": "prompts.txt", "negative_prompt": "a green disc", "save_path": "clips", "seed": 7,
        "pipeline_config": {"input_size": list(SIZE)},
        "ae": {"from_pretrained": str(parts / "vae"), "dtype": "fp32"},
        "tokenizer": {"from_pretrained": str(parts / "tokenizer"), "model_max_length": wan.text_len},
        "text_encoder": {"from_pretrained": str(parts / "text_encoder"), "dtype": "fp32"},
        "predictor": {"dtype": "fp32", **predictor},
        "diffusion": {"num_inference_steps": 2, "flow_shift": 3.0, "guidance_scale": 4.0},
        **(image if wan.task.made_by(Source.IMAGE_ENCODER) else {}),
        **more,
    }  # fmt: skip


def noise(seed: int, *shape: int) -> np.ndarray:
    """Smooth pictures, uint8 [..., 3]."""
    *lead, height, width = shape
    source = torch.Generator().manual_seed(seed)
    small = torch.rand(int(np.prod(lead, dtype=int)), 3, 4, 4, generator=source)
    large = torch.nn.functional.interpolate(small, size=(height, width), mode="bilinear")
    return large.mul(255).round().byte().permute(0, 2, 3, 1).reshape(*lead, height, width, 3).numpy()


def write_video(path: Path, frames: np.ndarray) -> Path:
    """Frames uint8 [F, H, W, 3], without loss."""
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "bgr0"
        for array in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24").reformat(format="bgr0")))
        container.mux(stream.encode())
    return path


def write_image(path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels).save(path)
    return path


def pixels(array: np.ndarray) -> Tensor:
    """Frames [F, H, W, 3] as [3, F, H, W], or an image [H, W, 3] as [3, H, W], in [-1, 1]."""
    return torch.from_numpy(array).float().movedim(-1, 0) / 127.5 - 1


def write_lines(path: Path, lines: Sequence[object]) -> str:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path.name


def by_command(parts: Path, task: str, *words: str, **more: Any) -> list[np.ndarray]:
    """Frames as they were before the codec."""
    folder = Path("weights", task)
    wan = write_transformer(folder, task) if not folder.exists() else mm.load_model(folder, task=task).config
    wan = wan.model_copy(update={"text_len": 32})
    Path("model.json").write_text(json.dumps(inference_json(parts, wan, **more)))
    with keeping_frames(mm.generate.run):
        main(["--mm-model", "model.json", "--load", str(folder), "--device", "cpu", "--no-progress-bar", *words])
    return [np.load(path) for path in sorted(Path("clips").glob("*.npy"))]


@contextmanager
def seen(model: WanModel) -> Iterator[list[ModelInputs]]:
    """What the model is given, call by call."""
    calls: list[ModelInputs] = []
    handle = model.register_forward_pre_hook(lambda module, given: calls.append(given[0]))
    yield calls
    handle.remove()
