"""A clip of Wan2.1-VACE-1.3B, trained whole."""

import av
import torch
from PIL import Image

from mm import ModelConfig, WanVideoPipeline, save_video


def frames_of(name: str) -> list[Image.Image]:
    """Frames of a video of the data set in data/example_video_dataset."""
    with av.open(f"data/example_video_dataset/{name}") as file:
        return [frame.to_image() for frame in file.decode(video=0)]


pipe = WanVideoPipeline.from_pretrained(
    torch_dtype=torch.bfloat16,
    device="cuda",
    model_configs=[
        ModelConfig(model_id="Wan-AI/Wan2.1-VACE-1.3B", origin_file_pattern="diffusion_pytorch_model*.safetensors"),
        ModelConfig(model_id="Wan-AI/Wan2.1-VACE-1.3B", origin_file_pattern="models_t5_umt5-xxl-enc-bf16.pth"),
        ModelConfig(model_id="Wan-AI/Wan2.1-VACE-1.3B", origin_file_pattern="Wan2.1_VAE.pth"),
        ModelConfig(path="models/train/Wan2.1-VACE-1.3B_full/epoch-1.safetensors"),
    ],
)
video = frames_of("video1.mp4")
clip = pipe(
    prompt="from sunset to night, a small town, light, house, river",
    negative_prompt="blurred, static, low quality, deformed, watermark, subtitles",
    vace_video=frames_of("video1_softedge.mp4"),
    vace_reference_image=video[0],
    height=480,
    width=832,
    num_frames=49,
    num_inference_steps=50,
    sigma_shift=16,
    seed=0,
    tiled=True,
)
save_video(clip, "Wan2.1-VACE-1.3B_full.mp4", fps=15, quality=5)
