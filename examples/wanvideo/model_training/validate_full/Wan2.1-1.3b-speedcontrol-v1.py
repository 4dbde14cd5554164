"""A clip of Wan2.1-1.3b-speedcontrol-v1, trained whole."""

import torch

from mm import ModelConfig, WanVideoPipeline, save_video

pipe = WanVideoPipeline.from_pretrained(
    torch_dtype=torch.bfloat16,
    device="cuda",
    model_configs=[
        ModelConfig(model_id="Wan-AI/Wan2.1-T2V-1.3B", origin_file_pattern="diffusion_pytorch_model*.safetensors"),
        ModelConfig(model_id="Wan-AI/Wan2.1-T2V-1.3B", origin_file_pattern="models_t5_umt5-xxl-enc-bf16.pth"),
        ModelConfig(model_id="Wan-AI/Wan2.1-T2V-1.3B", origin_file_pattern="Wan2.1_VAE.pth"),
        ModelConfig(path="models/train/Wan2.1-1.3b-speedcontrol-v1_full/epoch-1.safetensors"),
    ],
)
clip = pipe(
    prompt="from sunset to night, a small town, light, house, river",
    negative_prompt="blurred, static, low quality, deformed, watermark, subtitles",
    motion_bucket_id=50,
    height=480,
    width=832,
    num_frames=81,
    num_inference_steps=50,
    sigma_shift=5,
    seed=0,
    tiled=True,
)
save_video(clip, "Wan2.1-1.3b-speedcontrol-v1_full.mp4", fps=15, quality=5)
