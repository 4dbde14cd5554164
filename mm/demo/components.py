"""The tiny Wan models of the embedded default: classes and folder layout of the real ones, small configurations.

transformer/    WanTransformer3DModel, 4 layers of width 128, random weights: it is what the quickstart trains
vae/            AutoencoderKLWan, 16 latent channels, trained by tools/train_demo_vae.py; of Wan2.2's TI2V its kind, 48
text_encoder/   UMT5EncoderModel, 2 layers of width 64, random weights: its embeddings tell the words apart, no more
tokenizer/      T5 tokenizer whose vocabulary is the captions' words and single characters
scheduler/      UniPCMultistepScheduler on flow sigmas
model_index.json, with which diffusers.WanPipeline loads the folder

Those of images (I2V, FLF2V) have another transformer and, in addition,
image_encoder/    CLIPVisionModel, 3 layers of width 32 on 224 pixels, which gives the 257 tokens of the real one
image_processor/  CLIP's, unchanged
and diffusers.WanImageToVideoPipeline loads them. The transformer of speed control has the motion controller besides,
which diffusers leaves out.

Models that no pipeline of diffusers has, those of VideoX-Fun and Wan2.2, are a transformer/ alone, with native names:
the blocks of the model of text, or of images, that has the encoders they go with (`encoders_of`).
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.utils import logging as transformers_logging

from mm.checkpoint.weights import open_weights
from mm.config.model import of_task
from mm.config.tasks.frames import CLIP_TOKEN_LEN
from mm.config.tasks.registry import DEFAULT, FEATURE_TASKS
from mm.config.tasks.task import Sizes, Source, Task
from mm.demo.clips import all_captions
from mm.rng import key
from mm.wan.config_json import read_config, wan_config_to_diffusers, wan_config_to_original
from mm.wan.initial import initial_value
from mm.wan.model import WanModel


def sees_images(task: Task) -> bool:
    """Tell whether a task has features of an image encoder."""
    return bool(task.made_by(Source.IMAGE_ENCODER))


def is_whole(task: Task) -> bool:
    """Tell whether a task's tiny model is a whole folder: pipelines of diffusers take captions, or captions with frames
    of the clip that the image encoder sees; media beside the clip are nothing that its features are made of.
    """
    return not any(media.is_trained for media in task.media) and bool(task.frames) == sees_images(task)


def encoders_of(task: Task) -> Task:
    """The task whose tiny model has the encoders that a task's features are made with."""
    if is_whole(task):
        return task
    needed = sees_images(task), task.latent_pixels
    whole = filter(is_whole, FEATURE_TASKS.values())
    return next(other for other in whole if (sees_images(other), other.latent_pixels) == needed)


def _model_name(task: Task) -> str:
    title = task.title.replace(" ", "-")
    release = "" if title.startswith("Wan") else "Wan2.1-"
    return f"{release}{title}-Tiny{'-Diffusers' if is_whole(task) else ''}"


MODEL_NAMES = {task.name: _model_name(FEATURE_TASKS[task.trains]) for task in FEATURE_TASKS.values()}
SEED = 0
TEXT_DIM = 64
IMAGE_DIM = 32
FLOW_SHIFT = 3.0
VAE_ASSETS = {8: "tiny_vae", 16: "tiny_vae_16"}
"""Names of the trained VAEs in the package's assets, by the pixels of a latent pixel."""

TRANSFORMER: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": TEXT_DIM,
    "freq_dim": 256,
    "ffn_dim": 512,
    "num_layers": 4,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 1024,
}


def latent_channels(task: Task) -> int:
    """Channels of the latents of a task's tiny model."""
    return task.latent_channels or int(TRANSFORMER["out_channels"])


def tiny_sizes(task: Task) -> dict[str, Any]:
    """Sizes that the tiny models of a task have where its released ones have others."""
    known = {"img_dim": IMAGE_DIM, "clip_token_len": CLIP_TOKEN_LEN, "vace_layers": (0, 2)}
    return {name: known[name] for name in task.sizes}


def write_variant(folder: Path, task: Task, like: Path) -> None:
    """Write a transformer of a task that has no folder of its own: weights of `like`, the folder of another one's, and
    what that lacks. Channels that it does not have are zero at first, other parameters as at a start from nothing.
    """
    source = open_weights(like)
    config = source.config()
    assert config is not None  # noqa: S101  it is a folder
    wan = of_task(of_task(config, DEFAULT, img_dim=None, clip_token_len=None), task, **tiny_sizes(task))
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in WanModel(wan).named_parameters()}
    known = source.shapes()
    values = {name: initial_value(name, shape, SEED) for name, shape in shapes.items() if name not in known}
    for name in shapes.keys() & known.keys():
        value = source.read(name)
        if name == "patch_embedding.weight":
            value = torch.zeros(shapes[name]).index_copy_(1, torch.arange(16), value[:, :16].float())
        values[name] = value.contiguous()
    folder.mkdir(parents=True)
    save_file(values, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    content = json.dumps(wan_config_to_original(wan), indent=2) + "\n"
    (folder / "config.json").write_text(content, encoding="utf-8")
    _give_mode_of(folder / "config.json", folder)


def write_model(folder: Path, task: Task = DEFAULT) -> None:
    """Write a whole tiny model into `folder` in fp32; the same bytes every time for one version of the libraries."""
    tokenizer = make_tokenizer()
    parts = {
        "tokenizer": tokenizer,
        "text_encoder": make_text_encoder(len(tokenizer)),
        "transformer": make_transformer(task),
        "vae": load_vae(task.latent_pixels),
        "scheduler": make_scheduler(),
    }
    if task.frames:
        parts |= {"image_encoder": make_image_encoder(), "image_processor": CLIPImageProcessorPil()}
        pipeline = _image_to_video_class()(**parts)
        # its name in the released folders; transformers has it once for each backend
        pipeline.register_to_config(image_processor=("transformers", "CLIPImageProcessor"))
    else:
        pipeline = WanPipeline(**parts, expand_timesteps=bool(task.first_frame_share))
    pipeline.save_pretrained(folder)
    _add_modules(folder / "transformer", task)
    _give_mode_of(folder / "model_index.json", folder)


def _give_mode_of(file: Path, folder: Path) -> None:
    """Give weights the mode of another file: their writer lets nobody but the owner read them, whatever the umask."""
    mode = file.stat().st_mode & 0o777
    for weights in folder.rglob("*.safetensors"):
        weights.chmod(mode)


def _add_modules(folder: Path, task: Task) -> None:
    """Add what diffusers' transformer lacks of a task: its modules' parameters, and its name in config.json."""
    if task.frames or not task.modules:
        return
    config, weights = folder / "config.json", folder / "diffusion_pytorch_model.safetensors"
    wan = of_task(read_config(config), task)
    values = json.loads(config.read_text(encoding="utf-8")) | wan_config_to_diffusers(wan)
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in WanModel(wan).named_parameters()}
    added = [name for name in shapes if name.split(".")[0] in task.modules]
    save_file(load_file(weights) | {n: initial_value(n, shapes[n], SEED) for n in added}, weights, {"format": "pt"})


def transformer_config(task: Task) -> dict[str, Any]:
    """The arguments of diffusers' WanTransformer3DModel."""
    if not task.frames:
        channels = latent_channels(task)
        return {**TRANSFORMER, "in_channels": channels, "out_channels": channels}
    sizes = Sizes(TRANSFORMER["out_channels"], (1, 1, 1), IMAGE_DIM, CLIP_TOKEN_LEN)
    return {
        **TRANSFORMER,
        "in_channels": TRANSFORMER["out_channels"] + task.channels(sizes),
        "image_dim": IMAGE_DIM,
        "added_kv_proj_dim": TRANSFORMER["num_attention_heads"] * TRANSFORMER["attention_head_dim"],
        "pos_embed_seq_len": task.context_tokens(sizes) if task.positions else None,
    }


def make_transformer(task: Task = DEFAULT) -> nn.Module:
    """The untrained transformer (diffusers WanTransformer3DModel), seeded.

    The output projection starts small, so that training begins near the velocity's mean and not at random pictures.
    """
    with _seeded("transformer" if task is DEFAULT else f"{task.name} transformer"):
        transformer = WanTransformer3DModel(**transformer_config(task))
        nn.init.normal_(transformer.proj_out.weight, std=0.02)
        nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def make_text_encoder(vocab_size: int) -> nn.Module:
    """The random text encoder (transformers UMT5EncoderModel), seeded; its last norm makes every feature O(1)."""
    config = UMT5Config(
        vocab_size=vocab_size, d_model=TEXT_DIM, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    with _seeded("text_encoder"):
        return UMT5EncoderModel(config).eval()


def make_image_encoder() -> nn.Module:
    """The random image encoder (transformers CLIPVisionModel), seeded; 16 x 16 patches and one token more."""
    config = CLIPVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=224,
        patch_size=14,
    )
    with _seeded("image_encoder"):
        return CLIPVisionModel(config).eval()


def make_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer (pad 0, end 1, unknown 2) of the captions' words, and characters for everything else."""
    words = sorted({word for caption in all_captions() for word in caption.split()})
    characters = string.digits + string.ascii_letters + string.punctuation
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    # Scores are log probabilities: a known word (-2) must beat its spelling (-4 for the space, -8 for each character).
    vocabulary += [(f"▁{word}", -2.0) for word in words] + [(character, -8.0) for character in characters]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512)


def make_scheduler() -> UniPCMultistepScheduler:
    """The sampler of the Wan2.1 release with a shift that suits the few tokens of a tiny clip."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT, num_train_timesteps=1000
    )


def load_vae(latent_pixels: int = DEFAULT.latent_pixels) -> nn.Module:
    """The trained VAE (diffusers AutoencoderKLWan) from the package's assets, fp16 on disk, fp32 here.

    Args:
        latent_pixels: rows and columns of pixels that a latent pixel stands for.
    """
    assets, name = files("mm.demo") / "assets", VAE_ASSETS[latent_pixels]
    config = json.loads((assets / f"{name}.json").read_text(encoding="utf-8"))
    vae = AutoencoderKLWan(**config)
    with as_file(assets / f"{name}.safetensors") as path:
        vae.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return vae.eval()


def _image_to_video_class() -> Any:
    """diffusers.WanImageToVideoPipeline, without what transformers says to those who lack torchvision.

    diffusers imports an image processor by a name for which transformers then takes another backend: the one used here.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        from diffusers import WanImageToVideoPipeline
    finally:
        transformers_logging.set_verbosity(verbosity)
    return WanImageToVideoPipeline


@contextmanager
def _seeded(part: str) -> Iterator[None]:
    """Seed torch's default generator, which the libraries' constructors draw from, and give it back as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(SEED, "init_weights", part, 0))
        yield
