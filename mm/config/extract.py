"""Files of feature extraction beside data.json: `model_wan.json` (encoders) and `tools.json` (where features go)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from mm.config.base import Section
from mm.config.data import TEMPORAL_STRIDE, ExtractData
from mm.config.flags import Flags
from mm.config.model import Precision
from mm.config.tasks.registry import DEFAULT, TASKS, TaskName, named
from mm.errors import ConfigError, Problem, raise_all

LatentPixels = Annotated[int, Field(ge=1)]


class TilingParam(Section):
    """Encode large frames in overlapping tiles, blended linearly where they overlap. Saves memory, costs time.

    Attributes:
        tile_size: height and width of a tile in latent pixels (8 image pixels each).
        tile_stride: distance between the origins of neighbouring tiles, in latent pixels.
    """

    tile_size: tuple[LatentPixels, LatentPixels] = (34, 34)
    tile_stride: tuple[LatentPixels, LatentPixels] = (18, 16)


class AutoencoderConfig(Section):
    """The video VAE.

    Attributes:
        from_pretrained: its folder in the diffusers layout. dtype: precision of weights and latents.
        norm_latents, norm_mode: latents are shifted and scaled by the VAE's own per-channel mean and deviation.
        do_sample: false means the posterior's mode, so that the same video gives the same latents.
    """

    model_id: Literal["wan_video_vae"] = "wan_video_vae"
    from_pretrained: str = Field(min_length=1)
    dtype: Precision
    enable_tiling: bool = False
    tiling_param: TilingParam | None = None
    norm_latents: Literal[True] = True
    norm_mode: Literal["channel_specified_shift_scale"] = "channel_specified_shift_scale"
    do_sample: Literal[False] = False

    def tiling(self) -> TilingParam | None:
        """The tiles to encode in, or None for whole frames."""
        return (self.tiling_param or TilingParam()) if self.enable_tiling else None


class ImageProcessor(Section):
    """`ae.i2v_processor`: how known frames are encoded, in tasks that have some.

    Attributes:
        image_encoder: folder of CLIP's visual half in the transformers layout; it works in the VAE's precision.
        i2v_vae_encode_tiling: whether the VAE encodes the known frames in tiles; `auto` does it where it does the clip.
    """

    processor_id: Literal["wan_i2v_processor"] = "wan_i2v_processor"
    image_encoder: str = Field(min_length=1)
    i2v_vae_encode_tiling: bool | Literal["auto"] = "auto"


class ExtractAutoencoder(AutoencoderConfig):
    """The `ae` section of feature extraction.

    Attributes:
        i2v_processor: with images only.
    """

    i2v_processor: ImageProcessor | None = None

    def condition_tiling(self) -> TilingParam | None:
        """The tiles to encode the known frames in, or None for whole frames."""
        if self.i2v_processor is None or self.i2v_processor.i2v_vae_encode_tiling == "auto":
            return self.tiling()
        return (self.tiling_param or TilingParam()) if self.i2v_processor.i2v_vae_encode_tiling else None


class TextEncoderConfig(Section):
    """The UMT5 text encoder: its folder in the transformers layout and its precision."""

    model_id: Literal["UMT5"] = "UMT5"
    hub_backend: Literal["hf"] = "hf"
    from_pretrained: str = Field(min_length=1)
    dtype: Precision


class ExtractModel(Section):
    """`feature_extract/model_wan.json`. `task` may be said here, in tools.json, or in both."""

    task: TaskName | None = None
    ae: ExtractAutoencoder
    text_encoder: TextEncoderConfig


class SoraFeature(Section):
    """Where features go: `save_path`, one safetensors file a sample."""

    save_path: str = Field(min_length=1)
    extract_video_feature: Literal[True] = True
    extract_text_feature: Literal[True] = True
    data_storage_mode: Literal["sorafeatured"] = "sorafeatured"


class ExtractTools(Section):
    """`feature_extract/tools.json`. `task` may be said here, in model_wan.json, or in both."""

    sorafeature: SoraFeature
    task: TaskName | None = None


class ExtractFlags(Flags):
    """Encode videos and captions to features, once, for training. Start it with torchrun for several processes."""

    mm_data: str = Field(description="data.json: which videos, and what clip to take of each")
    mm_model: str = Field(description="model_wan.json: the encoders")
    mm_tool: str = Field(description="tools.json: the folder to write to")
    seed: int = Field(1234, ge=0, description="seed of the clip's start in a longer video and of the caption in a list")
    num_workers: int = Field(2, ge=1, description="videos that each process reads ahead, in processes of their own")
    decode_timeout: float = Field(120.0, gt=0, description="seconds to read one clip; a decoder that hangs is ended")
    on_bad_sample: str = Field("fail", description="a clip that cannot be read: fail, or skip:max=0.1% of all clips")
    overwrite: bool = Field(False, description="replace features that were made with another recipe")
    device: Literal["cpu", "cuda", "npu"] | None = Field(None, description="kind of device; default: the best there is")
    distributed_timeout_minutes: int = Field(1440, ge=1, description="how long a process waits for slower ones")


def extraction_task(model: ExtractModel, tools: ExtractTools | None) -> str:
    """What the features are for; text to video where neither file says a task."""
    return model.task or (tools.task if tools else None) or DEFAULT.name


def check_extraction(data: ExtractData, model: ExtractModel, tools: ExtractTools | None) -> None:
    """Check what the three files say together; without tools.json what the other two say.

    Raises:
        ConfigError: CFG-070 when two files say different tasks, CFG-074 when `ae.i2v_processor` and the task do not
            belong together, CFG-075 when clips may have one frame, which the image is; all at once.
    """
    if tools and model.task is not None and tools.task is not None and model.task != tools.task:
        message = f'"task" is {tools.task} in tools.json and {model.task} in model_wan.json.'
        raise ConfigError("CFG-070", message, "Make them agree; the task decides what is extracted.")
    raise_all(ConfigError, list(_image_problems(data, model, extraction_task(model, tools))))


def _image_problems(data: ExtractData, model: ExtractModel, task: str) -> Iterator[Problem]:
    takes_frames = bool(TASKS[task].frames)
    if takes_frames and model.ae.i2v_processor is None:
        yield Problem(
            "CFG-074",
            f"The task is {task}, and model_wan.json has no ae.i2v_processor.",
            'Add it with "image_encoder", the folder of that name of an I2V or FLF2V model; or set task to t2v.',
        )
    if not takes_frames and model.ae.i2v_processor is not None:
        others = named(other for other in TASKS.values() if other.frames)
        yield Problem(
            "CFG-074",
            f"ae.i2v_processor in model_wan.json has no effect with the task {task}.",
            f"Remove it, or set task to {others} in tools.json and model_wan.json.",
        )
    clip = data.dataset_param.preprocess_parameters
    for name, frames in (("num_frames", clip.num_frames), ("min_num_frames", clip.min_num_frames)):
        if takes_frames and frames is not None and frames <= TEMPORAL_STRIDE:
            yield Problem(
                "CFG-075",
                f"{name} is {frames}: a clip of one frame is its own first frame, and {task} has nothing to learn.",
                f"Use at least {TEMPORAL_STRIDE + 1}.",
            )


RETIRED_EXTRACT_FLAGS = dict.fromkeys(
    (
        "--tensor-model-parallel-size",
        "--pipeline-model-parallel-size",
        "--context-parallel-size",
        "--micro-batch-size",
        "--global-batch-size",
        "--num-layers",
        "--hidden-size",
        "--num-attention-heads",
        "--seq-length",
        "--max-position-embeddings",
        "--tokenizer-type",
        "--vocab-size",
        "--position-embedding-type",
        "--lr",
        "--train-iters",
        "--bf16",
        "--distributed-backend",
    ),
    "Remove it; each process encodes one sample at a time, and model_wan.json says in which precision.",
)
